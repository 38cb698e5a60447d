"""Image folders and tars: their classes are named by folders, in an order that does not depend on the process."""
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from timm.data.readers.class_map import load_class_map

from glmc.data.datasets import ImageSet, open_file
from glmc.data.profiles import pluralize
from glmc.data.walk import FoundImages, image_extensions, no_image, some_extensions, walk
from glmc.errors import InputError, first_line, printable

_logger = logging.getLogger(__name__)
DIGITS = re.compile(r'(\d+)')


def natural_key(text: str) -> list:
    """Sort key of timm, numbers by value and letters in lower case; keys of different texts can be equal."""
    parts = DIGITS.split(text.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts


def sorted_names(names: Iterable[str]) -> list[str]:
    """Different class names in the order of their labels, which is the same in every process.

    Names that differ only in case, leading zeros or the encoding of accents are warned about: they often mean one class.
    """
    ordered = sorted(sorted(set(names)), key=natural_key)
    seen: dict[str, str] = {}
    for name in ordered:
        alike = seen.setdefault(str(natural_key(unicodedata.normalize('NFC', name).casefold())), name)
        if alike != name:
            _logger.warning(f'Class names {ascii(alike)} and {ascii(name)} differ only in case, leading zeros or the '
                            'encoding of accents; they are two classes')
            break
    return ordered


def load_folders(
        root: str, where: str, *, class_from: str | None = None, class_map: str | None = None, input_key: str | None = None,
        key: Callable[[str], Sequence] = natural_key) -> ImageSet:
    """Load a folder of class folders.

    Args:
        root: Folder of one split.
        where: Start of the error line.
        class_from: See `name_classes`.
        class_map: timm's file that maps class names to indices; None for their sorted order.
        input_key: Extensions of the images, separated by semicolons; None for those that Pillow can open.
        key: Sort key of the relative paths.

    Raises:
        InputError: If there is no image, a folder is empty or unreadable, or the classes are ambiguous.
    """
    extensions = image_extensions()
    if input_key:
        extensions = {f".{word.strip().lower().removeprefix('.')}" for word in input_key.split(';') if word.strip()}
    found = FoundImages()
    paths = list(walk(root, extensions, found).values())
    if found.unreadable:
        raise InputError(f'{where}: cannot read the folder {found.unreadable[0]}')
    if not paths:
        raise no_image(where, found, extensions)
    start = len(root) if root.endswith(os.sep) else len(root) + 1
    names = sorted(sorted(path[start:] for path in paths), key=key)
    stray = next((name for name in names if os.sep not in name), None)
    if stray:
        raise InputError(f'{where}: image {printable(stray)} lies in no class folder, expected class/image')
    folders = [name.rpartition(os.sep)[0] for name in names]
    classes = name_classes(folders, where, class_from)
    for folder in found.empty:
        if class_name(os.path.relpath(folder, root), class_from) not in classes.values():
            others = found.passed_over() or 'nothing'
            raise InputError(f'{where}: class folder {printable(folder)} has no images, found {others}, expected '
                             f'{some_extensions(extensions)}')
    images = labelled(names, [classes[folder] for folder in folders], class_map, where, root)
    if found.passed_over():
        _logger.info(f'{printable(root)}: passed over {found.passed_over()}')
    return replace(images, read=partial(open_file, root, images.names))


def name_classes(folders: Iterable[str], where: str, class_from: str | None = None) -> dict[str, str]:
    """Name the classes of folders that contain images.

    Args:
        folders: Paths relative to the root of the set.
        where: Start of the error line.
        class_from: Part of the path that names the class: the innermost folder (`leaf`), the outermost (`top`), or all
            (`path`). None for leaf where this is the only sensible reading.

    Returns:
        Folder -> class name.

    Raises:
        InputError: Without `class_from`, if folders of different parents would be one class, or a folder with images
            contains another.
    """
    folders = sorted(sorted(set(folders)), key=natural_key)
    classes = {folder: class_name(folder, class_from) for folder in folders}
    if class_from is None:
        by_leaf: dict[str, str] = {}
        for folder, leaf in classes.items():
            other = by_leaf.setdefault(leaf, folder)
            if other != folder:
                raise InputError(
                    f'{where}: folders {printable(other)} and {printable(folder)} would be one class {printable(leaf)!r}; '
                    '--class-from top names classes by the outermost folder, path by the whole path, leaf merges them')
            parent = os.path.dirname(folder)
            while parent and parent not in classes:
                parent = os.path.dirname(parent)
            if parent:
                raise InputError(
                    f'{where}: folders {printable(parent)} and {printable(folder)} both contain images; --class-from top '
                    'names classes by the outermost folder, leaf and path make two classes of them')
        depths = {folder.count(os.sep): folder for folder in reversed(folders)}
        if len(depths) > 1:
            high, low = (printable(depths[depth]) for depth in (min(depths), max(depths)))
            _logger.warning(f'{where}: class folders lie at different depths, {high} and {low}; the innermost folder names '
                            'the class (--class-from)')
    return classes


def class_name(folder: str, class_from: str | None) -> str:
    """Class name by `class_from` of a folder relative to the root."""
    parts = folder.split(os.sep)
    return '/'.join(parts) if class_from == 'path' else parts[0 if class_from == 'top' else -1]


def labelled(
        names: Sequence[str], classes: Sequence[str], class_map: str | None, where: str,
        root: str | None = None) -> ImageSet:
    """Image set without a reader, with labels by the sorted order of the class names or by a class map.

    Args:
        names: N names of images.
        classes: N class names.
        class_map: timm's file; images of classes that it lacks are left out, with a warning.
        where: Start of the error line.
        root: Folder in which the class map is searched, too.
    """
    if class_map:
        index = read_class_map(class_map, root, where)
        missing = [name for name in classes if name not in index]
        if len(missing) == len(classes):
            raise InputError(f'--class-map {class_map}: has none of the classes, e.g. {printable(missing[0])!r}')
        if missing:
            _logger.warning(f"{where}: {pluralize(len(missing), 'image')} of classes that --class-map lacks are left out, "
                            f'e.g. {printable(missing[0])!r}')
            names, classes = zip(*((n, c) for n, c in zip(names, classes, strict=True) if c in index), strict=True)
        by_index = {label: name for name, label in index.items()}
        class_names = [by_index.get(c, str(c)) for c in range(max(by_index) + 1)]
    else:
        class_names = sorted_names(classes)
        index = {name: label for label, name in enumerate(class_names)}
    labels = np.array([index[name] for name in classes], dtype=np.int64)
    return ImageSet(None, labels, list(names), class_names, where)


def read_class_map(path: str, root: str | None, where: str) -> dict[str, int]:
    """Read timm's map from class names to indices.

    Raises:
        InputError: If the file cannot be read, or an index is no whole number from 0 on.
    """
    try:
        index = {str(name): label for name, label in load_class_map(path, root or '').items()}
    except Exception as error:  # timm and pickle raise anything
        raise InputError(f'{where}: --class-map {path}: cannot be opened: {first_line(error)}') from error
    if not index or not all(type(label) is int and label >= 0 for label in index.values()):
        raise InputError(f'--class-map {path}: expected class names with indices from 0 on')
    return index
