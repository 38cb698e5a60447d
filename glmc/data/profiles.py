"""Class counts, long-tail profiles, shot groups and the fingerprint of a training set (pure numpy)."""
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

SHOT_NAMES = ('many', 'medium', 'few')


def long_tail_counts(n_max: int, num_classes: int, imbalance_factor: float, kind: str = 'exp') -> np.ndarray:
    """Images per class of a long-tail profile, largest class first (Cui et al., arXiv 1901.05555).

    `exp`: n_c = int(n_max · F^(-c/(C-1))). `step`: the first half of the classes keeps n_max, the rest int(n_max / F).

    Args:
        n_max: Images of the largest class.
        num_classes: C.
        imbalance_factor: F = n_max / n_min, at least 1.
        kind: `exp` or `step`.

    Returns:
        (C,) int64 counts.

    Raises:
        ValueError: If an argument is out of range or a class would be left without an image.
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
    """Which images a long-tailed subset keeps: `counts[c]` of the images of class c.

    `cao` shuffles inside each class, classes in label order, with one numpy `RandomState(0)`, as the subset that
    the field compares on (Cao et al., arXiv 1906.07413); `first` keeps the first of each class; `random` is `cao`
    with a seed of one's own.

    Args:
        labels: (N,) label of each image.
        counts: (C,) images to keep per class.
        split: `cao`, `first` or `random`.
        seed: For `random`.

    Returns:
        Sorted int64 indices into `labels`.

    Raises:
        ValueError: If a class has fewer images than asked for, or `split` is unknown.
    """
    if split not in ('cao', 'first', 'random'):
        raise ValueError(f"split must be 'cao', 'first' or 'random', got {split!r}")
    rng = np.random.RandomState(seed if split == 'random' else 0)
    kept = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise ValueError(f'class {label} has {len(members)} images, {count} are needed')
        if split != 'first':
            rng.shuffle(members)
        kept.append(members[:count])
    return np.sort(np.concatenate(kept))


def shot_groups(counts: Sequence[int], few: int = 20, many: int = 100) -> dict[str, np.ndarray]:
    """Classes by the number of their training images: few <= `few` < medium <= `many` < many (Liu et al., arXiv 1904.05160).

    Args:
        counts: (C,) training images per class.
        few: Largest count that is still few-shot.
        many: Largest count that is not yet many-shot.

    Returns:
        {'many', 'medium', 'few'} -> class indices; a group may be empty.
    """
    if few > many:
        raise ValueError(f'the few-shot threshold must not exceed the many-shot one, got {few} and {many}')
    counts = np.asarray(counts)
    masks = (counts > many, (counts > few) & (counts <= many), counts <= few)
    return {name: np.flatnonzero(mask) for name, mask in zip(SHOT_NAMES, masks, strict=True)}


def fingerprint(names: Iterable[str]) -> str:
    """Identity of a set of training images: sha256 over the sorted names, one a line, whatever their order was."""
    return hashlib.sha256('\n'.join(sorted(names)).encode()).hexdigest()


@dataclass(frozen=True)
class Profile:
    """Class counts of a training set, its shot groups and its identity: what is logged and stored about it.

    Args:
        counts: C training images per class.
        thresholds: (few, many) of `shot_groups`.
        fingerprint: sha256 over the names of the images; None for a source without an index.
    """
    counts: tuple[int, ...]
    thresholds: tuple[int, int] = (20, 100)
    fingerprint: str | None = None

    @classmethod
    def of(cls, labels: np.ndarray, num_classes: int, names: Iterable[str],
           thresholds: Sequence[int] = (20, 100)) -> 'Profile':
        """Profile of a set of (N,) labels with N names."""
        counts = np.bincount(labels, minlength=num_classes).tolist()
        return cls(tuple(counts), tuple(thresholds), fingerprint(names))

    @property
    def num_images(self) -> int:
        return sum(self.counts)

    def groups(self) -> dict[str, np.ndarray]:
        """{'many', 'medium', 'few'} -> class indices."""
        return shot_groups(self.counts, *self.thresholds)

    def summary(self) -> str:
        """One line: images, classes, largest and smallest class, and the number of classes in each group."""
        groups = ', '.join(f'{len(classes)} {name}' for name, classes in self.groups().items())
        return (f'{self.num_images:,} images of {len(self.counts)} classes, {max(self.counts):,} … {min(self.counts):,} '
                f'per class ({groups})')

    def as_dict(self) -> dict:
        """Plain values for JSON, as `config.json` of an export has them."""
        return {
            'num_images': self.num_images, 'class_counts': list(self.counts), 'shot_thresholds': list(self.thresholds),
            'shot_classes': {name: len(classes) for name, classes in self.groups().items()},
            'fingerprint': self.fingerprint}
