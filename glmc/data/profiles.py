"""Class counts, long-tail profiles, shot groups and the fingerprint of a training set, in numpy."""
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from glmc.errors import printable

SHOT_NAMES = ('many', 'medium', 'few')


def long_tail_counts(n_max: int, num_classes: int, imbalance_factor: float, kind: str = 'exp') -> np.ndarray:
    """Compute the images per class of a long-tail profile, largest class first (Cui et al., arXiv 1901.05555).

    `exp`: n_c = int(n_max · F^(-c/(C-1))). `step`: the first half of the classes keeps n_max, the rest int(n_max / F).

    Args:
        n_max: Images in the largest class.
        num_classes: C.
        imbalance_factor: F = n_max / n_min, at least 1.
        kind: `exp` or `step`.

    Returns:
        (C,) int64 counts.

    Raises:
        ValueError: If an argument is out of range or a class would have no image.
    """
    if n_max < 1 or num_classes < 1:
        raise ValueError(f'n_max and num_classes must be >= 1, got {n_max} and {num_classes}')
    if not imbalance_factor >= 1:
        raise ValueError(f'imbalance_factor must be >= 1, got {imbalance_factor}')
    if kind == 'exp':
        rank = np.arange(num_classes) / max(num_classes - 1, 1)
        counts = [int(n_max * imbalance_factor ** -r) for r in rank.tolist()]
    elif kind == 'step':
        head = (num_classes + 1) // 2
        counts = [n_max] * head + [int(n_max / imbalance_factor)] * (num_classes - head)
    else:
        raise ValueError(f"kind must be 'exp' or 'step', got {kind!r}")
    if min(counts) < 1:
        raise ValueError(f'imbalance_factor {imbalance_factor} leaves a class of {n_max} images with none')
    return np.array(counts, dtype=np.int64)


def long_tail_indices(
        labels: np.ndarray, counts: Sequence[int], split: str = 'cao', seed: int = 0) -> np.ndarray:
    """Choose the images of a long-tailed subset: `counts[c]` images of class c.

    `cao` shuffles each class in label order with one numpy `RandomState(0)`, which gives the subset that the field
    compares on (Cao et al., arXiv 1906.07413). `first` keeps the first images of each class. `random` is `cao` with
    `RandomState(seed)`.

    Args:
        labels: (N,) label of each image.
        counts: (C,) images to keep per class.
        split: `cao`, `first` or `random`.
        seed: Seed of `random`.

    Returns:
        (sum of counts,) int64 indices into `labels`, ascending.

    Raises:
        ValueError: If a class has fewer than `counts[c]` images, or `split` is unknown.
    """
    if split not in ('cao', 'first', 'random'):
        raise ValueError(f"split must be 'cao', 'first' or 'random', got {split!r}")
    rng = np.random.RandomState(seed if split == 'random' else 0)
    kept = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise ValueError(f"class {label} has {pluralize(len(members), 'image')}, {count} are needed")
        if split != 'first':
            rng.shuffle(members)
        kept.append(members[:count])
    return np.sort(np.concatenate(kept))


def shot_groups(counts: Sequence[int], few: int = 20, many: int = 100) -> dict[str, np.ndarray]:
    """Group the classes by training images: few <= `few` < medium <= `many` < many (Liu et al., arXiv 1904.05160).

    Args:
        counts: (C,) training images per class.
        few: Largest few-shot count.
        many: Largest medium-shot count.

    Returns:
        {'many', 'medium', 'few'} -> class indices; a group may be empty.

    Raises:
        ValueError: If `few` exceeds `many`.
    """
    if few > many:
        raise ValueError(f'the few-shot threshold must not exceed the many-shot one, got {few} and {many}')
    counts = np.asarray(counts)
    masks = (counts > many, (counts > few) & (counts <= many), counts <= few)
    return {name: np.flatnonzero(mask) for name, mask in zip(SHOT_NAMES, masks, strict=True)}


def pluralize(number: int, noun: str) -> str:
    """The number with its noun: `1 image`, `2 images`, `2 classes`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def classes_without_images(
        counts: Sequence[int], class_names: Sequence[str] | None = None, max_names: int = 10) -> str:
    """One line with the number and the names of the classes that no evaluation measures; empty if each has images.

    Args:
        counts: (C,) evaluated images per class.
        class_names: C names; None for 0…C-1.
        max_names: Maximal number of names.
    """
    empty = np.flatnonzero(np.asarray(counts) == 0).tolist()
    if not empty:
        return ''
    names = [printable(str(class_names[c] if class_names else c)) for c in empty[:max_names]]
    names += [f'{len(empty) - max_names:,} more'] if len(empty) > max_names else []
    return f"{pluralize(len(empty), 'class')} without images, not evaluated: {', '.join(names)}"


def fingerprint(names: Iterable[str]) -> str:
    """Identify a set of training images by the sha256 of their sorted names, one a line."""
    return hashlib.sha256('\n'.join(sorted(names)).encode('utf-8', 'surrogateescape')).hexdigest()


@dataclass(frozen=True)
class Profile:
    """Class counts, shot groups and identity of a training set.

    Args:
        counts: (C,) training images per class.
        thresholds: (few, many) of `shot_groups`.
        fingerprint: See `fingerprint`; None for a source without an index.
    """
    counts: tuple[int, ...]
    thresholds: tuple[int, int] = (20, 100)
    fingerprint: str | None = None

    @classmethod
    def of(cls, labels: np.ndarray, num_classes: int, names: Iterable[str],
           thresholds: Sequence[int] = (20, 100)) -> 'Profile':
        """Profile of a set with (N,) labels, C classes and N names."""
        counts = np.bincount(labels, minlength=num_classes).tolist()
        return cls(tuple(counts), tuple(thresholds), fingerprint(names))

    @property
    def num_images(self) -> int:
        return sum(self.counts)

    def groups(self) -> dict[str, np.ndarray]:
        """{'many', 'medium', 'few'} -> class indices."""
        return shot_groups(self.counts, *self.thresholds)

    def summary(self) -> str:
        """One line with the images, classes, largest and smallest class, and classes per group."""
        groups = ', '.join(f'{len(classes)} {name}' for name, classes in self.groups().items())
        return (f"{pluralize(self.num_images, 'image')} of {pluralize(len(self.counts), 'class')}, "
                f'{max(self.counts):,} … {min(self.counts):,} per class ({groups})')

    def as_dict(self) -> dict:
        """Plain values for JSON, as in `config.json` of an export."""
        return {
            'num_images': self.num_images, 'class_counts': list(self.counts), 'shot_thresholds': list(self.thresholds),
            'shot_classes': {name: len(classes) for name, classes in self.groups().items()},
            'fingerprint': self.fingerprint}
