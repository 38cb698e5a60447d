"""Where images come from: timm's sources, `path label` lists, the embedded digits."""
import gzip
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image
from timm.data import IterableImageDataset, create_dataset, get_img_extensions
from timm.data.dataset_factory import _search_split

from glmc.data.datasets import ImageSet, long_tailed, split_holdout
from glmc.data.profiles import Profile
from glmc.errors import InputError

_logger = logging.getLogger(__name__)
_PREFIXES = ('torch', 'hfds', 'hfids', 'wds', 'tfds')  # timm's
NO_SPLIT = 'none'  # what is chosen is chosen without a look at it
_FOLDERS = ('', 'torch/image_folder', 'torch/folder')  # sources that are a folder for each split


@dataclass(frozen=True)
class TrainingData:
    """All that a run reads.

    Args:
        train: Training images.
        validation: Images to evaluate on; None where only held-out ones are.
        holdout: Training images set aside, or None.
        class_names: C names.
        profile: Of the training images.
    """
    train: ImageSet | IterableImageDataset
    validation: ImageSet | IterableImageDataset | None
    holdout: ImageSet | None
    class_names: Sequence[str]
    profile: Profile


def load_training_data(
        *, data_dir: str | None = None, dataset: str = '', train_split: str = 'train', val_split: str = 'validation',
        train_list: str | None = None, val_list: str | None = None, num_classes: int | None = None,
        class_counts: str | None = None, holdout: float | None = None, imbalance_factor: float | None = None,
        lt_type: str = 'exp', lt_split: str = 'cao', lt_seed: int = 0, shot_thresholds: Sequence[int] = (20, 100),
        seed: int = 42, batch_size: int = 64, dataset_download: bool = False, **source_options) -> TrainingData:
    """Open, check and cut the sets that the options name.

    Raises:
        InputError: For anything missing, empty, inconsistent or unreadable.
    """
    if shot_thresholds[0] > shot_thresholds[1]:
        raise InputError(f'--shot-thresholds {shot_thresholds[0]} {shot_thresholds[1]}: expected FEW <= MANY')
    source = dict(name=dataset, root=data_dir, num_classes=num_classes, batch_size=batch_size, seed=seed,
                  download=dataset_download or None, **source_options)
    train = load_images(train_split, train_list, is_training=True, **source)
    if isinstance(train, IterableImageDataset):
        return _iterable_data(train, source, train_split, val_split, val_list, num_classes, class_counts,
                              shot_thresholds, cuts=(imbalance_factor, holdout))
    if num_classes is not None and num_classes != train.num_classes:
        raise InputError(f'--num-classes {num_classes}: {train.source} has {train.num_classes} classes')
    held = None
    if holdout is not None:
        train, held = split_holdout(train, holdout, seed)
    if imbalance_factor is not None:
        train = long_tailed(train, imbalance_factor, lt_type, lt_split, lt_seed)
    empty = np.flatnonzero(train.counts() == 0)
    if len(empty):
        raise InputError(f'{train.source}: class {train.class_names[empty[0]]!r} has no training image '
                         f'({len(empty)} of {train.num_classes} classes are empty)')
    validation = load_validation(train, source, val_split, val_list, optional=held is not None)
    profile = Profile.of(train.labels, train.num_classes, train.identities(), shot_thresholds)
    return TrainingData(train, validation, held, train.class_names, profile)


def load_validation(
        train: ImageSet, source: dict, split: str, list_path: str | None, optional: bool = False) -> ImageSet | None:
    """The set to evaluate on, labelled as the training set is.

    Raises:
        InputError: If there is none, unless `optional`, or it has a class that training has not.
    """
    if split == NO_SPLIT and not list_path:
        if not optional:
            raise InputError(f'--val-split {split}: expected --holdout, else there is nothing to evaluate on')
        return None
    root = source['root']
    try:
        if source['name'] in _FOLDERS and not list_path and root and _search_split(root, split) == root:
            raise InputError(f'--data-dir {root}: no folder for --val-split {split}; expected one beside the training '
                             'folder, a --val-list, or --holdout to set training images aside')
        images = load_images(split, list_path, **{**source, 'num_classes': train.num_classes})
    except InputError as error:
        if not optional:
            raise
        _logger.warning(f'No validation set, only held-out images: {error}')
        return None
    if list_path:  # numbers say which class it is
        return replace(images, class_names=train.class_names)
    return images.with_classes(train.class_names)


def load_evaluation_data(
        *, class_names: Sequence[str] | None, num_classes: int, data_dir: str | None = None, dataset: str = '',
        val_split: str = 'validation', val_list: str | None = None, batch_size: int = 64, dataset_download: bool = False,
        **source_options) -> ImageSet | IterableImageDataset:
    """The images that a trained model is evaluated on, labelled as it was trained.

    Args:
        class_names: C names in the order of the model's outputs; None if unknown: the set's own order must be the model's.
        num_classes: C.
        **source_options: As those of `load_training_data`.

    Raises:
        InputError: If there is none, or its classes are not the model's.
    """
    source = dict(name=dataset, root=data_dir, num_classes=num_classes, batch_size=batch_size,
                  download=dataset_download or None, **source_options)
    images = load_images(val_split, val_list, **source)
    if isinstance(images, IterableImageDataset):
        reader = _unsharded(images.reader)
        images.reader = _CheckedReader(reader, num_classes, f'--dataset {dataset}', *_rank_and_world_size())
        return images
    if val_list:  # numbers say which class it is
        return replace(images, class_names=class_names or images.class_names)
    if class_names is not None:
        return images.with_classes(class_names)
    if images.num_classes != num_classes:
        raise InputError(f'{images.source}: has {images.num_classes} classes, the model has {num_classes}')
    return images


def _iterable_data(
        train: IterableImageDataset, source: dict, train_split: str, val_split: str, val_list: str | None,
        num_classes: int | None, class_counts: str | None, thresholds: Sequence[int], cuts: tuple) -> TrainingData:
    """A source without an index: its class counts come from a file, or from one pass over it."""
    where = f"--dataset {source['name']}"
    if any(cut is not None for cut in cuts):
        raise InputError(f'{where}: --imbalance-factor and --holdout need a source with an index')
    if class_counts:
        counts = read_class_counts(class_counts)
    else:
        _logger.info(f'{where}: counting the images of each class; --class-counts FILE spares this pass')
        counts = count_classes(load_images(train_split, None, **source))
    if num_classes is not None and num_classes != len(counts):
        raise InputError(f'--num-classes {num_classes}: found counts of {len(counts)} classes')
    if not counts or min(counts) < 1:
        raise InputError(f'{where}: class {int(np.argmin(counts or [0]))} has no training image')
    train.reader = _CheckedReader(train.reader, len(counts), where)
    validation = load_images(val_split, val_list, **{**source, 'num_classes': len(counts)})
    if isinstance(validation, IterableImageDataset):
        validation.reader = _CheckedReader(_unsharded(validation.reader), len(counts), where, *_rank_and_world_size())
    names = [str(c) for c in range(len(counts))]
    return TrainingData(train, validation, None, names, Profile(tuple(counts), tuple(thresholds)))


def count_classes(dataset: IterableImageDataset) -> list[int]:
    """Images per class by one pass over an iterable source, opened as for evaluation: training repeats some."""
    counts: dict[int, int] = {}
    for _, label in _unsharded(dataset.reader):
        counts[int(label)] = counts.get(int(label), 0) + 1
    return [counts.get(c, 0) for c in range(max(counts, default=-1) + 1)]


def _unsharded(reader):
    """timm's iterable reader, reading everything in every process; its own division pads and leaves out."""
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    return reader


def _rank_and_world_size() -> tuple[int, int]:
    """Rank and number of the processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class _CheckedReader:
    """timm's iterable reader with labels checked; every `world_size`-th image of it, from `rank` on."""

    def __init__(self, reader, num_classes: int, where: str, rank: int = 0, world_size: int = 1):
        self.reader, self.num_classes, self.where = reader, num_classes, where
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for image, label in islice(self.reader, self.rank, None, self.world_size):
            if not 0 <= label < self.num_classes:
                raise InputError(f'{self.where}: expected labels 0…{self.num_classes - 1}, found {label}')
            yield image, label

    def __len__(self) -> int:
        return len(range(self.rank, len(self.reader), self.world_size))

    def set_epoch(self, epoch: int) -> None:
        self.reader.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        self.reader.set_loader_cfg(num_workers)


def read_class_counts(path: str) -> list[int]:
    """Training images per class: a JSON list, JSON with `train_counts` or `class_counts`, or one number a line.

    Raises:
        InputError: If the file is none of these.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
        content = json.loads(text) if text.lstrip()[:1] in ('[', '{') else [int(line) for line in text.split()]
        if isinstance(content, dict):
            content = content['train_counts'] if 'train_counts' in content else content['class_counts']
        if not content or not all(isinstance(n, int) and n >= 0 for n in content):
            raise ValueError('not a list of counts')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'--class-counts {path}: expected a list of images per class: {error}') from error
    return content


def load_digits_set(split: str) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8x8: the last 50 of each class for validation, the others for training."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    validation = np.concatenate([np.flatnonzero(labels == c)[-50:] for c in range(10)])
    chosen = np.setdiff1d(np.arange(len(labels)), validation) if split == 'train' else np.sort(validation)
    names = [f'{labels[i]}/{i}' for i in chosen]
    return ImageSet(_ArrayReader(pixels[chosen]), labels[chosen], names, [str(c) for c in range(10)], 'digits')


@dataclass(frozen=True)
class _ArrayReader:
    pixels: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def load_list(path: str, root: str | None, num_classes: int | None = None) -> ImageSet:
    """A list of `path label` lines as ImageNet-LT, Places-LT and iNaturalist have; may be gzipped.

    A class is called after the folder its images share, or after its label where that is not unique.

    Raises:
        InputError: If the list cannot be read, a line is not of that form, a label is outside 0…C-1 or an image is
            missing; it names the line.
    """
    try:
        opener = gzip.open if path.endswith('.gz') else open
        with opener(path, 'rt', encoding='utf-8-sig') as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f'{path}: cannot read this list: {error}') from error
    files, labels = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            file, label = _parse_line(line.strip(), f'{path}, line {number}', num_classes)
            files.append(file)
            labels.append(label)
    if not files:
        raise InputError(f'{path}: the list is empty, expected `path label` lines')
    paths = [os.path.join(root or '', file) for file in files]
    _require_files(path, paths)
    labels = np.array(labels, dtype=np.int64)
    return ImageSet(_FileReader(paths), labels, files, _folder_names(files, labels, num_classes), path)


def _parse_line(line: str, where: str, num_classes: int | None) -> tuple[str, int]:
    file, *label = line.rsplit(maxsplit=1)
    try:
        label = int(*label) if label else None
    except ValueError:
        label = None
    if label is None:
        raise InputError(f'{where}: expected `path label`, found {line[:80]!r}')
    if label < 0 or (num_classes is not None and label >= num_classes):
        expected = '0 or more' if num_classes is None else f'0…{num_classes - 1}'
        raise InputError(f'{where}: expected a label {expected}, found {label}')
    return file, label


@dataclass(frozen=True)
class _FileReader:
    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])


def _require_files(list_path: str, paths: Sequence[str]) -> None:
    """All files must be there; folders are listed once, which takes seconds where a look at each file takes minutes."""
    listed: dict[str, set] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else set()
        if name not in listed[folder]:
            raise InputError(f'{list_path}: image {path} does not exist (paths are relative to --data-dir)')


def _folder_names(files: Sequence[str], labels: np.ndarray, num_classes: int | None) -> list[str]:
    folders: dict[int, set] = {}
    for file, label in zip(files, labels.tolist(), strict=True):
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(file)))
    size = num_classes or int(labels.max()) + 1
    names = [next(iter(folders[c])) if len(folders.get(c, ())) == 1 else str(c) for c in range(size)]
    return names if len(set(names)) == size and all(names) else [str(c) for c in range(size)]


def load_source(name: str, root: str | None, split: str, **kwargs) -> 'ImageSet | IterableImageDataset':
    """A source of `timm.data.create_dataset`: an ImageSet where it can be indexed, else timm's iterable dataset.

    Raises:
        InputError: If it is missing, empty or cannot be read.
    """
    is_folder = not name
    where = f'--data-dir {root}' if is_folder else f'--dataset {name}'
    if is_folder:
        _check_folder(root, split)
    else:
        _check_name(name, root)
    try:
        dataset = create_dataset(name, root=root, split=split, **kwargs)
    except ImportError as error:
        raise InputError(f'{where}: needs a package that is not installed: {error}') from error
    except Exception as error:  # timm, torchvision and datasets raise anything from AssertionError to OSError
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f'{where}, split {split}: cannot be opened: {detail[0]}') from error
    if isinstance(dataset, IterableImageDataset):
        return dataset
    images = _from_reader(dataset.reader, where) if hasattr(dataset, 'reader') else _from_torch(dataset, where)
    if is_folder and os.path.isdir(root):
        _reject_empty_class_folders(_search_split(root, split), kwargs.get('input_key'))
    return images


def _check_name(name: str, root: str | None) -> None:
    prefix = name.partition('/')[0].lower()
    if prefix not in _PREFIXES or '/' not in name:
        raise InputError(f"--dataset {name}: expected {', '.join(f'{known}/NAME' for known in _PREFIXES)}, or nothing "
                         'for the image folders of --data-dir')
    if prefix in ('torch', 'wds') and not root:
        raise InputError(f'--dataset {name}: expected its folder as --data-dir')


def _check_folder(root: str, split: str) -> None:
    if not os.path.exists(root):
        raise InputError(f'--data-dir {root}: no such folder')
    if os.path.isfile(root):
        return
    if _search_split(root, split) == root and any(
            _search_split(root, other) != root for other in ('train', 'validation', split)):
        found = ', '.join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:8])
        raise InputError(f'--data-dir {root}: no folder for split {split!r}, found {found}')


def _reject_empty_class_folders(folder: str, input_key: str | None) -> None:
    """timm passes over a folder without images; it is more often a mistake than meant."""
    extensions = tuple(input_key.split(';')) if input_key else tuple(get_img_extensions())
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        if not folders and not any(name.lower().endswith(extensions) for name in files):
            raise InputError(f"--data-dir: class folder {path} has no images ({', '.join(extensions)})")


def _from_reader(reader, where: str) -> ImageSet:
    """timm's folder, tar and hfds readers."""
    if hasattr(reader, 'dataset'):
        labels, names = _hfds_labels(reader, where), _hfds_names(reader, where)
        class_to_idx = reader.class_to_idx
    elif hasattr(reader, 'targets'):  # tar
        labels, names = np.asarray(reader.targets, dtype=np.int64), reader.filenames()
        class_to_idx = reader.class_name_to_idx
    else:
        labels, names = np.array([target for _, target in reader.samples], dtype=np.int64), reader.filenames()
        class_to_idx = reader.class_to_idx
    by_index = {index: str(name) for name, index in class_to_idx.items()}
    if '' in by_index.values():
        stray = next(name for name, label in zip(names, labels, strict=True) if by_index[label] == '')
        raise InputError(f'{where}: image {stray} lies in no class folder, expected class/image')
    class_names = [by_index.get(c, str(c)) for c in range(max([int(labels.max()), *by_index]) + 1)]
    return ImageSet(_TimmReader(reader), labels, names, class_names, where)


@dataclass(frozen=True)
class _TimmReader:
    reader: object

    def __call__(self, index: int) -> Image.Image:
        return Image.open(self.reader[index][0])


def _hfds_labels(reader, where: str) -> np.ndarray:
    """The label column, read without touching the images."""
    if reader.label_key not in reader.dataset.column_names:
        columns = ', '.join(reader.dataset.column_names)
        raise InputError(f'{where}: no label column {reader.label_key!r} (--target-key), found {columns}')
    labels = list(reader.iter_targets()) if reader.remap_class else reader.dataset.data.column(reader.label_key).to_pylist()
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        found = next(label for label in labels if not isinstance(label, int) or label < 0)
        raise InputError(f'{where}: expected labels 0…C-1 in column {reader.label_key!r}, found {found!r}')
    return np.array(labels, dtype=np.int64)


def _hfds_names(reader, where: str) -> list[str]:
    import pyarrow.compute as pc
    images = reader.dataset.data.column(reader.image_key)
    if images.null_count == len(images):  # what timm's reader makes of a column that is not there
        columns = ', '.join(name for name in reader.dataset.column_names if name != reader.image_key)
        raise InputError(f'{where}: no image column {reader.image_key!r} (--input-key), found {columns}')
    return [path or str(index) for index, path in enumerate(pc.struct_field(images, 'path').to_pylist())]


def _from_torch(dataset, where: str) -> ImageSet:
    """torchvision's data sets; labels and file names are attributes of various names, or labels take a pass over it."""
    if hasattr(dataset, 'samples'):  # folders
        names, targets = zip(*((os.path.relpath(path, dataset.root), label) for path, label in dataset.samples), strict=True)
    elif getattr(dataset, 'target_type', None) == ['full']:  # iNaturalist
        targets, names = zip(*dataset.index, strict=True)
    else:
        targets, names = getattr(dataset, 'targets', getattr(dataset, 'labels', None)), map(str, range(len(dataset)))
    if targets is None:
        targets = [dataset[index][1] for index in range(len(dataset))]
    labels = np.asarray(targets).astype(np.int64)
    labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST: the class is the first of eight columns
    classes = getattr(dataset, 'classes', None) or range(int(labels.max()) + 1)
    class_names = [', '.join(name) if isinstance(name, tuple) else str(name) for name in classes]
    return ImageSet(_TorchReader(dataset), labels, list(names), class_names, where)


@dataclass(frozen=True)
class _TorchReader:
    dataset: object

    def __call__(self, index: int) -> Image.Image:
        return self.dataset[index][0]


def load_images(
        split: str, list_path: str | None, name: str, root: str | None, **kwargs) -> 'ImageSet | IterableImageDataset':
    """What the user named: a list, a source of timm's, or nothing, which is the digits."""
    if list_path:
        return load_list(list_path, root, kwargs.get('num_classes'))
    kwargs.pop('num_classes', None)
    if name or root:
        return load_source(name, root, split, **kwargs)
    return load_digits_set(split)
