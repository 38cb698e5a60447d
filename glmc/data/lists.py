"""Image sets from `path label` lists, and training images per class from a file."""
import gzip
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from glmc.data.datasets import ImageSet
from glmc.errors import InputError


def load_list(path: str, root: str | None, num_classes: int | None = None) -> ImageSet:
    """Load a list of `path label` lines, the format of ImageNet-LT, Places-LT and iNaturalist.

    The name of a class is the folder that all its images share, or its label if the folder is not unique.

    Args:
        path: Text file, or gzipped text if it ends in `.gz`.
        root: Folder that the paths are relative to.
        num_classes: C; None for the largest label + 1.

    Raises:
        InputError: If the list cannot be read, a line has another format, a label is outside 0…C-1, or an image is missing.
    """
    try:
        opener = gzip.open if path.endswith('.gz') else open
        with opener(path, 'rt', encoding='utf-8-sig') as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f'{path}: cannot read this list: {error}') from error
    rows = [_parse_line(line.strip(), f'{path}, line {number}', num_classes)
            for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f'{path}: the list is empty, expected `path label` lines')
    files, labels = zip(*rows, strict=True)
    paths = [os.path.join(root or '', file) for file in files]
    _require_files(path, paths)
    labels = np.array(labels, dtype=np.int64)
    return ImageSet(partial(_open_file, paths), labels, list(files), _class_names(files, labels, num_classes), path)


def _parse_line(line: str, where: str, num_classes: int | None) -> tuple[str, int]:
    try:
        file, label = line.rsplit(maxsplit=1)
        label = int(label)
    except ValueError:
        raise InputError(f'{where}: expected `path label`, found {line[:80]!r}') from None
    if label < 0 or (num_classes is not None and label >= num_classes):
        expected = '0 or more' if num_classes is None else f'0…{num_classes - 1}'
        raise InputError(f'{where}: expected a label {expected}, found {label}')
    return file, label


def _require_files(list_path: str, paths: Sequence[str]) -> None:
    """Check that all files exist; listing each folder once takes seconds, a system call per file takes minutes."""
    listed: dict[str, set] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else set()
        if name not in listed[folder]:
            raise InputError(f'{list_path}: image {path} does not exist (paths are relative to --data-dir)')


def _class_names(files: Sequence[str], labels: np.ndarray, num_classes: int | None) -> list[str]:
    folders: dict[int, set] = {}
    for file, label in zip(files, labels.tolist(), strict=True):
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(file)))
    size = num_classes or int(labels.max()) + 1
    names = [next(iter(folders[c])) if len(folders.get(c, ())) == 1 else str(c) for c in range(size)]
    return names if len(set(names)) == size and all(names) else [str(c) for c in range(size)]


def _open_file(paths: Sequence[str], index: int) -> Image.Image:
    return Image.open(paths[index])


def read_class_counts(path: str) -> list[int]:
    """Read the training images per class: a JSON list, JSON with `train_counts` or `class_counts`, or one number a line.

    Returns:
        C numbers, each at least 0.

    Raises:
        InputError: If the file has none of these formats.
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
