"""Image sets with labels and names that are known without decoding; their long-tailed and held-out subsets."""
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image

from glmc.data.profiles import long_tail_counts, long_tail_indices, pluralize
from glmc.data.texts import Texts
from glmc.errors import ImageError, InputError, first_line

DECODING_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageSet:
    """An indexable set of labelled images.

    Args:
        read: Index -> open PIL image in the mode of its file.
        labels: (N,) int64 labels.
        names: N names, `class/file` for files, else indices; kept as `Texts`.
        class_names: C names in label order.
        source: Option and value that name the set in messages, or the path of its list.
        numbered: Whether the source has numbers as labels, so that `class_names` are only likely ones.
    """
    read: Callable[[int], Image.Image]
    labels: np.ndarray
    names: Sequence[str]
    class_names: Sequence[str]
    source: str
    numbered: bool = False

    def __post_init__(self):
        object.__setattr__(self, 'names', Texts.of(self.names))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def counts(self) -> np.ndarray:
        """(C,) images per class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def identities(self) -> list[str]:
        """`class/file` of each image without suffix and outer folders, equal for folders, tars and parquet files."""
        classes = self.class_names
        return [f'{classes[label]}/{stem_of(name)}' for label, name in zip(self.labels.tolist(), self.names, strict=True)]

    def image(self, index: int, mode: str = 'RGB') -> Image.Image:
        """Decode an image to `mode`, RGB or L; raises an ImageError as `opened` does."""
        with self.opened(index) as image:
            return to_mode(image, mode)

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """Open an image without decoding its pixels.

        Raises:
            ImageError: If the image cannot be decoded, here or inside the `with` block; one line that names the file. Other
                errors of the block pass.
        """
        passes = False
        try:
            with self.read(index) as image:
                try:
                    yield image
                except Exception as error:
                    passes = isinstance(error, ImageError) or not isinstance(error, DECODING_ERRORS) and _decodes(image)
                    raise
        except Exception as error:  # Pillow's formats raise anything, and rows without an image raise a TypeError
            if passes:
                raise
            raise ImageError(f'{self.source}: cannot decode image {self.names[index]}: {first_line(error)}') from error

    def subset(self, indices: np.ndarray) -> 'ImageSet':
        """Image set with the images at these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        return replace(self, read=partial(_read_at, self.read, indices), labels=self.labels[indices],
                       names=self.names.take(indices))

    def with_classes(self, class_names: Sequence[str]) -> 'ImageSet':
        """Image set with labels that index `class_names`; classes are matched by name, or by number if that is known.

        Raises:
            InputError: If `class_names` lacks a class that has images here, or the folders of the images contradict it.
        """
        if list(self.class_names) == list(class_names):
            return self
        if self.numbered:
            return replace(self._with_names(class_names), class_names=class_names)
        index = {name: label for label, name in enumerate(class_names)}
        unknown = [self.class_names[c] for c in np.unique(self.labels) if self.class_names[c] not in index]
        if unknown:
            raise InputError(
                f'{self.source}: class {unknown[0]!r} is not in the training data, '
                f"which has {pluralize(len(class_names), 'class')}")
        lookup = np.array([index.get(name, -1) for name in self.class_names])
        return replace(self, labels=lookup[self.labels], class_names=class_names)

    def _with_names(self, class_names: Sequence[str]) -> 'ImageSet':
        """This set, checked: no folder with the name of a class may have the number of another one."""
        named = {name: label for label, name in enumerate(class_names) if name != str(label)}
        for folder, label in folder_labels(*folder_codes(self.names), self.labels).items():
            if named.get(folder, label) != label:
                raise InputError(f'{self.source}: images in folder {folder!r} have label {label}, which is class '
                                 f'{class_names[label]!r} of the training data, expected {named[folder]}')
        return self


def folder_codes(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Names of the innermost folders of files, each once, and the (N,) index of each file's own."""
    index: dict[str, int] = {}
    codes = np.fromiter((index.setdefault(folder_of(name), len(index)) for name in names), np.int64, len(names))
    return list(index), codes


def folder_labels(folders: Sequence[str], codes: np.ndarray, labels: np.ndarray) -> dict[str, int]:
    """Folder -> label of most of its images, for the folders where one label has more than half of them.

    Args:
        folders, codes: As `folder_codes` returns them.
        labels: (N,) labels, at least 0.
    """
    classes = int(labels.max()) + 1
    pairs, counts = np.unique(codes * classes + labels, return_counts=True)
    most = 2 * counts > np.bincount(codes)[pairs // classes]
    return {folders[pair // classes]: pair % classes for pair in pairs[most].tolist()}


def folder_of(name: str) -> str:
    """Name of the folder that contains a file."""
    return name.rpartition(os.sep)[0].rstrip(os.sep).rpartition(os.sep)[2]


def stem_of(name: str) -> str:
    """Name of a file without folders and suffix, as `os.path.splitext` parts them in three times the time."""
    file = name.rpartition(os.sep)[2]
    stem = file.rpartition('.')[0]
    return stem if stem.strip('.') else file


def _decodes(image: Image.Image) -> bool:
    try:
        image.load()
    except Exception:
        return False
    return True


def open_file(root: str, names: Sequence[str], index: int) -> Image.Image:
    """Open an image by its path relative to `root`; a pipe, which would block, or a device is an OSError."""
    path = os.path.join(root, names[index])
    if not os.path.isfile(path):
        raise OSError('no such file' if not os.path.exists(path) else 'not a regular file')
    return Image.open(path)


class BadImages:
    """Record of the images that cannot be decoded, in memory shared with the loader processes, with their replacement.

    Args:
        images: Image set.

    Attributes:
        flags: (N,) bool, True for an image that could not be decoded so far.
    """

    def __init__(self, images: ImageSet):
        self.images = images
        self.flags = torch.zeros(len(images), dtype=torch.bool).share_memory_()

    def first_readable(self, index: int, use: Callable[[int], object]):
        """Call `use(index)`; if it raises an ImageError, replace the image by the next one of its class that can be used.

        Returns:
            The result of `use`.

        Raises:
            ImageError: If no image of the class can be used.
        """
        try:
            return use(index)
        except ImageError as error:
            self.flags[index] = True
            same = np.flatnonzero(self.images.labels == self.images.labels[index])
            for candidate in np.roll(same, -np.searchsorted(same, index) - 1)[:-1].tolist():
                try:
                    return use(candidate)
                except ImageError:
                    self.flags[candidate] = True
            raise error

    def names(self) -> list[str]:
        """Names of the images that could not be decoded so far."""
        return [self.images.names[index] for index in self.flags.nonzero().flatten().tolist()]


def _read_at(read: Callable[[int], Image.Image], indices: np.ndarray, index: int) -> Image.Image:
    return read(int(indices[index]))


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to `mode`, RGB or L; 16-bit grey keeps its upper 8 bits, which PIL would clip to white."""
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def long_tailed(images: ImageSet, imbalance_factor: float, kind: str, split: str, seed: int) -> ImageSet:
    """Cut a long tail into a balanced set; its largest class has as many images as the smallest class of `images`.

    Args:
        images: Image set.
        imbalance_factor, kind: See `profiles.long_tail_counts`.
        split, seed: See `profiles.long_tail_indices`.

    Raises:
        InputError: If a class would have no image.
    """
    try:
        counts = long_tail_counts(int(images.counts().min()), images.num_classes, imbalance_factor, kind)
    except ValueError as error:
        raise InputError(f'--imbalance-factor {imbalance_factor:g}: {error}') from error
    return images.subset(long_tail_indices(images.labels, counts, split, seed))


def split_holdout(images: ImageSet, holdout: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Set images of every class aside at random.

    Args:
        images: Image set.
        holdout: Images per class, or if below 1, their fraction, at least one image. A class that would have no training
            image left keeps all.
        seed: Seed of the choice.

    Returns:
        (training set, held-out set).

    Raises:
        InputError: If no image can be set aside.
    """
    rng = np.random.default_rng((seed, 1))
    held = []
    for label, count in enumerate(images.counts().tolist()):
        take = int(holdout) if holdout >= 1 else max(int(count * holdout), 1)
        if take < count:
            held.append(rng.permutation(np.flatnonzero(images.labels == label))[:take])
    if not held:
        raise InputError(f'--holdout {holdout:g}: no class has enough images, the largest has {images.counts().max():,}')
    held = np.sort(np.concatenate(held))
    return images.subset(np.setdiff1d(np.arange(len(images)), held)), images.subset(held)
