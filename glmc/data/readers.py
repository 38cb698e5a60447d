"""Image sets from timm's sources: folders, tars, Hugging Face and torchvision sets, and sources without an index."""
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import IO

import numpy as np
import torch.distributed as dist
from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from timm.data.dataset_factory import _search_split

from glmc.data.datasets import ImageSet
from glmc.data.folders import labelled, load_folders, name_classes, sorted_names
from glmc.errors import InputError, printable

FOLDERS = ('', 'torch/image_folder', 'torch/folder')  # sources that have a folder per split
MAX_LABEL = 10 ** 7  # larger ones are identifiers, not labels
_PREFIXES = ('torch', 'hfds', 'hfids', 'wds', 'tfds')  # timm's


def load_source(
        name: str, root: str | None, split: str, class_from: str | None = None, **kwargs) -> ImageSet | IterableImageDataset:
    """Load a source of `timm.data.create_dataset`.

    Args:
        name: PREFIX/NAME, or empty for image folders and tars.
        root: Folder or tar; for other sources the folder they are downloaded to.
        split: Name of the split.
        class_from: See `folders.name_classes`; for torch/image_folder, `top` is the default.
        **kwargs: For `create_dataset`.

    Returns:
        An ImageSet, or timm's iterable dataset for a source without an index (hfids/, wds/, tfds/).

    Raises:
        InputError: If the source is missing, empty or unreadable.
    """
    if name:
        where = f'--dataset {name}'
        _check_name(name, root)
    else:
        where = f'--data-dir {root}'
        _check_folder(root, split)
    folder = _search_split(root, split) if name.lower() in FOLDERS else ''
    if os.path.isdir(folder):
        if name:  # torchvision's classes and order
            return load_folders(folder, where, class_from=class_from or 'top', key=os.path.split)
        return load_folders(folder, where, class_from=class_from, class_map=kwargs.get('class_map'),
                            input_key=kwargs.get('input_key'))
    try:
        if os.path.isfile(folder) and tarfile.is_tarfile(folder):
            _check_members(folder, os.path.getsize(folder))
        dataset = create_dataset(name, root=root, split=split, **kwargs)
    except InputError as error:
        raise InputError(f'{where}: {error}') from error
    except ImportError as error:
        raise InputError(f'{where}: needs a package that is not installed: {error}') from error
    except Exception as error:  # timm, torchvision and datasets raise anything from AssertionError to OSError
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f'{where}, split {split}: cannot be opened: {detail[0]}') from error
    if isinstance(dataset, IterableImageDataset):
        return dataset
    if not hasattr(dataset, 'reader'):
        return _from_torch(dataset, where)
    if hasattr(dataset.reader, 'targets') and not kwargs.get('class_map'):
        return _from_tar(dataset.reader, where, class_from)
    return _from_reader(dataset.reader, where)


def has_split_folder(root: str, split: str) -> bool:
    """Whether timm finds a folder or file for this split, or for a synonym, inside `root`."""
    return _search_split(root, split) != root


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
    if os.path.isfile(root) or has_split_folder(root, split):
        return
    if has_split_folder(root, 'train') or has_split_folder(root, 'validation'):
        found = ', '.join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:8])
        raise InputError(f'--data-dir {root}: no folder for split {split!r}, found {found}')


# --- sources with an index ---


def _from_reader(reader, where: str) -> ImageSet:
    """Image set of timm's tar or hfds reader."""
    if hasattr(reader, 'dataset'):  # hfds
        names, (labels, class_to_idx) = _hfds_names(reader, where), _hfds_labels(reader, where)
    else:  # tar
        labels, names, class_to_idx = reader.targets, reader.filenames(), reader.class_name_to_idx
    labels = np.array(labels, dtype=np.int64)
    by_index = {index: str(name) for name, index in class_to_idx.items()}
    if '' in by_index.values():
        stray = next(name for name, label in zip(names, labels, strict=True) if by_index[label] == '')
        raise InputError(f'{where}: image {stray} lies in no class folder, expected class/image')
    class_names = [by_index.get(c, str(c)) for c in range(max([int(labels.max()), *by_index]) + 1)]
    return ImageSet(partial(_open_from_reader, reader), labels, names, class_names, where)


def _check_members(tar: str | IO[bytes], limit: int) -> None:
    """Raise an InputError if a member of a tar, or of a tar inside, claims more bytes than the file has.

    timm reads a tar as a stream, and would look for them for days.
    """
    with tarfile.open(**{'name' if isinstance(tar, str) else 'fileobj': tar}) as file:
        while (member := file.next()) is not None:
            if not 0 <= member.size <= limit:
                raise InputError(f'member {printable(member.name)[:80]} has {member.size:,} bytes, the tar has {limit:,}')
            if member.isfile() and member.name.lower().endswith('.tar'):
                _check_members(file.extractfile(member), member.size)
            file.members = []  # which grow with the tar


def _from_tar(reader, where: str, class_from: str | None) -> ImageSet:
    """Image set of timm's tar reader, with the classes of `load_folders`."""
    names = [name.replace(os.sep, '/') for name in reader.filenames()]
    folders = [name.rpartition('/')[0] for name in names]
    if '' in folders:
        stray = printable(names[folders.index('')])
        raise InputError(f'{where}: image {stray} lies in no class folder, expected class/image')
    if len(set(folders)) > 1:
        start = len(os.path.commonpath(folders))  # folders around the class folders
        folders = [folder[start:].lstrip('/') or folder for folder in folders]
    classes = name_classes(folders, where, class_from)
    images = labelled(names, [classes[folder] for folder in folders], None, where)
    return replace(images, read=partial(_open_from_reader, reader))


def _open_from_reader(reader, index: int) -> Image.Image:
    return Image.open(reader[index][0])


def _hfds_labels(reader, where: str) -> tuple[list[int], dict[str, int]]:
    """Label column, read without the images, and class name -> label; names in the column are sorted."""
    if reader.label_key not in reader.dataset.column_names:
        columns = ', '.join(reader.dataset.column_names)
        raise InputError(f'{where}: no label column {reader.label_key!r} (--target-key), found {columns}')
    labels = list(reader.iter_targets()) if reader.remap_class else reader.dataset.data.column(reader.label_key).to_pylist()
    if any(isinstance(label, str) for label in labels):
        missing = next((row for row, label in enumerate(labels) if not isinstance(label, str) or not label), None)
        if missing is not None:
            raise InputError(f'{where}: expected a class name in each row of column {reader.label_key!r}, found '
                             f'{labels[missing]!r} in row {missing}')
        index = {name: label for label, name in enumerate(sorted_names(labels))}
        return [index[name] for name in labels], index
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < MAX_LABEL:
            raise InputError(f'{where}: expected labels 0…C-1 or class names in column {reader.label_key!r}, found '
                             f'{label!r} in row {row}')
    return labels, reader.class_to_idx


def _hfds_names(reader, where: str) -> list[str]:
    """File names in the image column, or indices where it has none."""
    import pyarrow.compute as pc
    images = reader.dataset.data.column(reader.image_key)
    if images.null_count == len(images):  # timm's reader adds an empty column if there is none of this name
        columns = ', '.join(name for name in reader.dataset.column_names if name != reader.image_key)
        raise InputError(f'{where}: no image column {reader.image_key!r} (--input-key), found {columns}')
    return [path or str(index) for index, path in enumerate(pc.struct_field(images, 'path').to_pylist())]


def _from_torch(dataset, where: str) -> ImageSet:
    """Image set of a torchvision dataset; its labels are an attribute of some name, or require one pass over it."""
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
    return ImageSet(partial(_get_from_torch, dataset), labels, list(names), class_names, where)


def _get_from_torch(dataset, index: int) -> Image.Image:
    return dataset[index][0]


# --- sources without an index ---


class CheckedReader:
    """timm's iterable reader with checked labels; yields every `world_size`-th image from `rank` on.

    Args:
        reader: timm's reader.
        num_classes: C; a label outside 0…C-1 raises an InputError.
        where: Start of the error line.
        rank, world_size: This process and the number of processes that share the images.
    """

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


def evaluation_reader(reader, num_classes: int, where: str) -> CheckedReader:
    """Checked reader for evaluation, by which all processes together read each image once."""
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    return CheckedReader(_unsharded(reader), num_classes, where, rank, world_size)


def count_classes(dataset: IterableImageDataset) -> list[int]:
    """Count the images per class in one pass; open the dataset as for evaluation, since training repeats images."""
    counts: dict[int, int] = {}
    for _, label in _unsharded(dataset.reader):
        counts[int(label)] = counts.get(int(label), 0) + 1
    return [counts.get(c, 0) for c in range(max(counts, default=-1) + 1)]


def _unsharded(reader):
    """timm's reader, set to read all images in every process; its sharding over processes pads and drops images."""
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    return reader
