"""Training and evaluation data from the data options: sources of timm, `path label` lists or the embedded digits."""
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM

from glmc.data.datasets import ImageSet, long_tailed, split_holdout
from glmc.data.lists import load_list, read_class_counts
from glmc.data.profiles import Profile, pluralize
from glmc.data.readers import CheckedReader, count_classes, evaluation_reader, has_split_folder, load_source
from glmc.errors import InputError

_logger = logging.getLogger(__name__)
NO_SPLIT = 'none'  # --val-split for a run that is evaluated on held-out training images only
_FOLDERS = ('', 'torch/image_folder', 'torch/folder')  # sources that have a folder per split


@dataclass(frozen=True)
class TrainingData:
    """Image sets of a run.

    Args:
        train: Training images.
        validation: Images to evaluate on, or None if there are only held-out ones.
        holdout: Images that choose the epoch: training images set aside, or a split of their own; or None.
        class_names: C names.
        profile: Profile of the training images.
    """
    train: ImageSet | IterableImageDataset
    validation: ImageSet | IterableImageDataset | None
    holdout: ImageSet | IterableImageDataset | None
    class_names: Sequence[str]
    profile: Profile


def load_training_data(
        *, train_split: str = 'train', val_split: str = 'validation', train_list: str | None = None,
        val_list: str | None = None, num_classes: int | None = None, class_counts: str | None = None,
        holdout: float | None = None, select_split: str | None = None, imbalance_factor: float | None = None,
        lt_type: str = 'exp', lt_split: str = 'cao', lt_seed: int = 0, shot_thresholds: Sequence[int] = (20, 100),
        seed: int = 42, **source) -> TrainingData:
    """Load and check the sets, set the held-out images aside, then cut the long tail.

    Args:
        train_split, val_split: Names of the splits; `none` for no validation split.
        train_list, val_list: `path label` files instead of splits.
        num_classes: C, checked against the data; None to accept any number.
        class_counts: File of `read_class_counts` for a source without an index; None to count in one pass.
        holdout: Images per class to set aside, or if below 1, their fraction.
        select_split: Name of the split that takes their place; None for none.
        imbalance_factor, lt_type: Long tail, see `profiles.long_tail_counts`.
        lt_split, lt_seed: Images that it keeps, see `profiles.long_tail_indices`.
        shot_thresholds: (few, many) of `profiles.shot_groups`.
        seed: Seed of the held-out images, and of timm's sources without an index.
        **source: Other arguments of `load_images`.

    Raises:
        InputError: If a set is missing, empty, inconsistent or unreadable.
    """
    if shot_thresholds[0] > shot_thresholds[1]:
        raise InputError(f'--shot-thresholds {shot_thresholds[0]} {shot_thresholds[1]}: expected FEW <= MANY')
    if select_split is not None:
        _check_select_split(select_split, holdout, train_split, NO_SPLIT if val_list else val_split)
    source.update(num_classes=num_classes, seed=seed)
    train = load_images(train_split, train_list, is_training=True, **source)
    if isinstance(train, IterableImageDataset):
        if imbalance_factor is not None or holdout is not None:
            raise InputError(f"--dataset {source['dataset']}: --imbalance-factor and --holdout need a source with an index")
        return _iterable_data(train, train_split, val_split, val_list, class_counts, shot_thresholds, source, select_split)
    if num_classes is not None and num_classes != train.num_classes:
        raise InputError(f"--num-classes {num_classes}: {train.source} has {pluralize(train.num_classes, 'class')}")
    held_out = None
    if holdout is not None:
        train, held_out = split_holdout(train, holdout, seed)
    if imbalance_factor is not None:
        train = long_tailed(train, imbalance_factor, lt_type, lt_split, lt_seed)
    empty = np.flatnonzero(train.counts() == 0)
    if len(empty):
        raise InputError(f'{train.source}: class {train.class_names[empty[0]]!r} has no training image '
                         f'({len(empty)} of {train.num_classes} classes are empty)')
    validation = load_validation(
        train, val_split, val_list, source, optional=holdout is not None or bool(select_split) and val_split == NO_SPLIT)
    if select_split is not None:
        held_out = load_validation(train, select_split, None, source, option='--select-split')
    profile = Profile.of(train.labels, train.num_classes, train.identities(), shot_thresholds)
    return TrainingData(train, validation, held_out, train.class_names, profile)


def load_validation(
        train: ImageSet, split: str, list_path: str | None, source: dict, optional: bool = False,
        option: str = '--val-split') -> ImageSet | None:
    """Load the validation set, labelled as the training set is.

    Args:
        train: Training set.
        split, list_path: Name of the split, or a `path label` file.
        source: Arguments of `load_images`.
        optional: Warn and return None if there is no such set.
        option: Flag that names the split.

    Raises:
        InputError: If there is no such set and it is not optional, or it has a class that the training set lacks.
    """
    if split == NO_SPLIT and not list_path:
        if not optional:
            raise InputError(f'{option} {split}: expected --holdout, else there is nothing to evaluate on')
        return None
    root = source.get('data_dir')
    try:
        if source.get('dataset', '') in _FOLDERS and not list_path and root and not has_split_folder(root, split):
            raise InputError(f'--data-dir {root}: no folder for {option} {split}; expected one beside the training '
                             'folder, a --val-list, or --holdout to set training images aside')
        images = load_images(split, list_path, **{**source, 'num_classes': train.num_classes})
    except InputError as error:
        if not optional:
            raise
        _logger.warning(f'No validation set, only held-out images: {error}')
        return None
    return _with_classes(images, train.class_names, list_path)


def load_evaluation_data(
        *, class_names: Sequence[str] | None, num_classes: int, val_split: str = 'validation', val_list: str | None = None,
        **source) -> ImageSet | IterableImageDataset:
    """Load the images that a trained model is evaluated on, with labels in the order of its outputs.

    Args:
        class_names: C names in the order of the outputs; None if unknown, which requires a set in that order.
        num_classes: C.
        val_split, val_list: Name of the split, or a `path label` file.
        **source: Other arguments of `load_images`.

    Raises:
        InputError: If there is no such set, or its classes are not those of the model.
    """
    images = load_images(val_split, val_list, num_classes=num_classes, **source)
    if isinstance(images, IterableImageDataset):
        images.reader = evaluation_reader(images.reader, num_classes, f"--dataset {source['dataset']}")
        return images
    if class_names is not None:
        return _with_classes(images, class_names, val_list)
    if images.num_classes != num_classes:
        raise InputError(f"{images.source}: has {pluralize(images.num_classes, 'class')}, the model has {num_classes}")
    return images


def _with_classes(images: ImageSet, class_names: Sequence[str], list_path: str | None) -> ImageSet:
    """Name the classes by label for a list, whose labels are numbers; match them by name for other sets."""
    return replace(images, class_names=class_names) if list_path else images.with_classes(class_names)


def _iterable_data(
        train: IterableImageDataset, train_split: str, val_split: str, val_list: str | None, class_counts: str | None,
        thresholds: Sequence[int], source: dict, select_split: str | None = None) -> TrainingData:
    """Data of a source without an index, whose class counts come from a file or from one pass."""
    where, num_classes = f"--dataset {source['dataset']}", source['num_classes']
    if class_counts:
        counts = read_class_counts(class_counts)
    else:
        _logger.info(f'{where}: counting the images of each class in one pass; --class-counts FILE avoids it')
        counts = count_classes(load_images(train_split, None, **source))
    if num_classes is not None and num_classes != len(counts):
        raise InputError(f"--num-classes {num_classes}: found counts of {pluralize(len(counts), 'class')}")
    if not counts or min(counts) < 1:
        raise InputError(f'{where}: class {int(np.argmin(counts or [0]))} has no training image')
    train.reader = CheckedReader(train.reader, len(counts), where)

    def evaluated(split: str, list_path: str | None) -> ImageSet | IterableImageDataset:
        images = load_images(split, list_path, **{**source, 'num_classes': len(counts)})
        if isinstance(images, IterableImageDataset):
            images.reader = evaluation_reader(images.reader, len(counts), where)
        return images
    validation = None if val_split == NO_SPLIT and select_split and not val_list else evaluated(val_split, val_list)
    selected = evaluated(select_split, None) if select_split else None
    names = [str(c) for c in range(len(counts))]
    return TrainingData(train, validation, selected, names, Profile(tuple(counts), tuple(thresholds)))


def _check_select_split(select: str, holdout: float | None, train: str, validation: str) -> None:
    """Raise an InputError if the images of `--select-split` are those of another split, or `--holdout` chooses, too."""
    if holdout is not None:
        raise InputError(f'--select-split {select}: its images choose the epoch, expected no --holdout, found {holdout:g}')
    for option, other in (('--train-split', train), ('--val-split', validation)):
        if select == other or any({select, other} <= names.keys() for names in (_TRAIN_SYNONYM, _EVAL_SYNONYM)):
            raise InputError(f'--select-split {select}: is the split of {option} {other}, expected another one, such as '
                             '--select-split val --val-split test')


def load_images(
        split: str, list_path: str | None = None, *, data_dir: str | None = None, dataset: str = '',
        num_classes: int | None = None, dataset_download: bool = False, batch_size: int = 64,
        **options) -> ImageSet | IterableImageDataset:
    """Load one set: a list, a source of timm, or the digits if neither `dataset` nor `data_dir` is given.

    Args:
        split: Name of the split.
        list_path: `path label` file instead of a split.
        data_dir: Image folders or a tar, root of the list, or download folder.
        dataset: PREFIX/NAME of timm, or empty for folders.
        num_classes: C of the list; None for its largest label + 1.
        dataset_download: Download a torch/, hfids/ or tfds/ source that `data_dir` does not yet contain.
        batch_size: Images per process and step of a source without an index.
        **options: Other arguments of `timm.data.create_dataset`: `class_map`, `input_key`, `target_key`, …
    """
    if list_path:
        return load_list(list_path, data_dir, num_classes)
    if dataset or data_dir:
        return load_source(dataset, data_dir, split, download=dataset_download, batch_size=batch_size, **options)
    return load_digits_set(split)


def load_digits_set(split: str) -> ImageSet:
    """Load scikit-learn's 1,797 handwritten digits, 8x8; the last 50 of each class are the validation set."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    validation = np.concatenate([np.flatnonzero(labels == c)[-50:] for c in range(10)])
    chosen = np.setdiff1d(np.arange(len(labels)), validation) if split == 'train' else np.sort(validation)
    names = [f'{labels[i]}/{i}' for i in chosen]
    return ImageSet(partial(_image_from_array, pixels[chosen]), labels[chosen], names, [str(c) for c in range(10)], 'digits')


def _image_from_array(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])
