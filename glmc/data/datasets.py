"""Image sets whose labels and names are known without decoding, long-tailed and held-out parts of them."""
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from glmc.data.profiles import long_tail_counts, long_tail_indices
from glmc.errors import ImageError, InputError


@dataclass(frozen=True)
class ImageSet:
    """An indexable set of labelled images.

    Args:
        read: Index -> open PIL image, in whatever mode the file has.
        labels: (N,) int64.
        names: N names, `class/file` where there are files, else indices.
        class_names: C names, in label order.
        source: What the user called it, for messages.
    """
    read: Callable[[int], Image.Image]
    labels: np.ndarray
    names: Sequence[str]
    class_names: Sequence[str]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def counts(self) -> np.ndarray:
        """(C,) images per class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def identities(self) -> list[str]:
        """`class/file` of each image, without suffix and outer folders: the same from folders, a tar or a parquet file."""
        files = (os.path.splitext(os.path.basename(name))[0] for name in self.names)
        return [f'{self.class_names[label]}/{file}' for label, file in zip(self.labels.tolist(), files, strict=True)]

    def image(self, index: int, mode: str = 'RGB') -> Image.Image:
        """The decoded image in `mode`, RGB or L; errors as in `opened`."""
        with self.opened(index) as image:
            return to_mode(image, mode)

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """The image with its size known and its pixels not yet decoded.

        Raises:
            ImageError: If it cannot be decoded, now or inside the block, naming the file.
        """
        try:
            with self.read(index) as image:
                yield image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageError(f'{self.source}: cannot decode image {self.names[index]}: {error}') from error

    def subset(self, indices: np.ndarray) -> 'ImageSet':
        """The images at these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        read = self.read
        return replace(self, read=_Reindexed(read, indices), labels=self.labels[indices],
                       names=[self.names[i] for i in indices.tolist()])

    def with_classes(self, class_names: Sequence[str]) -> 'ImageSet':
        """The same images, labelled by the place of their class in `class_names`, matched by name.

        Raises:
            InputError: If a class that has images here is not among them.
        """
        if list(self.class_names) == list(class_names):
            return self
        index = {name: label for label, name in enumerate(class_names)}
        unknown = [self.class_names[c] for c in np.unique(self.labels) if self.class_names[c] not in index]
        if unknown:
            raise InputError(
                f'{self.source}: class {unknown[0]!r} is not in the training data, which has {len(class_names)} classes')
        lookup = np.array([index.get(name, -1) for name in self.class_names])
        return replace(self, labels=lookup[self.labels], class_names=class_names)


class BadImages:
    """Images of a set that could not be decoded, known to all processes of its loader, and what stands in for them.

    Args:
        images: The set.
    """

    def __init__(self, images: ImageSet):
        self.images = images
        self.flags = torch.zeros(len(images), dtype=torch.bool).share_memory_()

    def first_readable(self, index: int, use: Callable[[int], object]):
        """`use(index)`, or of the next image of the same class for which it does not fail, in the order of the set.

        Raises:
            ImageError: If it fails for all images of the class.
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
        """Those that were met so far."""
        return [self.images.names[index] for index in self.flags.nonzero().flatten().tolist()]


@dataclass(frozen=True)
class _Reindexed:
    read: Callable[[int], Image.Image]
    indices: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        return self.read(int(self.indices[index]))


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Pixels in `mode`, RGB or L; 16-bit grey keeps its upper 8 bits, where PIL alone would clip it to white."""
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def long_tailed(images: ImageSet, imbalance_factor: float, kind: str, split: str, seed: int) -> ImageSet:
    """Cut a long tail into a balanced set; the largest class keeps as many images as the smallest class of all has.

    Raises:
        InputError: If the profile leaves a class without an image.
    """
    try:
        counts = long_tail_counts(int(images.counts().min()), images.num_classes, imbalance_factor, kind)
    except ValueError as error:
        raise InputError(f'--imbalance-factor {imbalance_factor:g}: {error}') from error
    return images.subset(long_tail_indices(images.labels, counts, split, seed))


def split_holdout(images: ImageSet, holdout: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Set images of every class aside: `holdout` of each if it is at least 1, else that fraction, at least one.

    Returns:
        (training set, held-out set).

    Raises:
        InputError: If a class would be left without a training image.
    """
    rng = np.random.default_rng((seed, 1))
    held = []
    for label, count in enumerate(images.counts().tolist()):
        take = int(holdout) if holdout >= 1 else max(int(count * holdout), 1)
        if take >= count:
            raise InputError(f'--holdout {holdout:g}: class {images.class_names[label]!r} has {count} training images, '
                             f'setting {take} aside leaves none')
        held.append(rng.permutation(np.flatnonzero(images.labels == label))[:take])
    held = np.sort(np.concatenate(held))
    return images.subset(np.setdiff1d(np.arange(len(images)), held)), images.subset(held)
