"""Image sets from lists, `path label` lines or CSV with columns, and training images per class from a file."""
import csv
import gzip
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glmc.data.datasets import ImageSet, folder_codes, folder_labels, open_file
from glmc.data.folders import sorted_names
from glmc.data.profiles import pluralize
from glmc.data.texts import Texts
from glmc.errors import InputError, first_line, printable

_logger = logging.getLogger(__name__)
MAX_BYTES = 2 ** 30  # of a list; iNaturalist 2018 has 2 ** 25
MAX_UNPACKED = 2 ** 28  # of a compressed one
IMAGE_COLUMNS = ('image', 'images', 'file', 'filename', 'file_name', 'filepath', 'file_path', 'path', 'image_path',
                 'image_file', 'image_name', 'img', 'img_path', 'image_id')
LABEL_COLUMNS = ('label', 'labels', 'class', 'class_name', 'class_id', 'target', 'category',
                 'category_id', 'label_name', 'y')
MAX_DIGITS = 18  # of a label, which has 64 bits
DECIMAL = re.compile(r'-?\d*\.\d*[1-9]\d*')
NUMBER = re.compile(r'-?\d+(\.0*)?')  # pandas writes integers of a column with gaps as 3.0


class Table(NamedTuple):
    """Rows of a list.

    Args:
        lines: N line numbers, from 1.
        files: N paths.
        labels: N labels as text.
    """
    lines: list[int]
    files: list[str]
    labels: list[str]


def load_list(
        path: str, root: str | None, num_classes: int | None = None, image_column: str | None = None,
        label_column: str | None = None) -> ImageSet:
    """Load a list of images.

    A line is `path label`, the format of ImageNet-LT, Places-LT and iNaturalist, or a row of a CSV with commas, semicolons
    or tabs, with or without a header. Labels are numbers from 0, or class names, whose sorted order gives the numbers. With
    numbers, the name of a class is the folder that all its images share, or its number if the folder is not unique.

    Args:
        path: Text file, or gzipped text if it ends in `.gz`.
        root: Folder that the paths are relative to.
        num_classes: C of a list of numbers; None for the largest label + 1.
        image_column, label_column: Columns of a CSV; None for a usual name, or the first and the second without a header.

    Raises:
        InputError: If the list cannot be read, a line has another format, a label is outside 0…C-1, or an image is missing.
    """
    table = read_table(path, image_column, label_column)
    if not table.files:
        raise InputError(f'{path}: the list is empty, expected `path label` lines, or a CSV')
    _require_files(path, table, root)
    different = set(table.labels)
    numbers = {label for label in different if NUMBER.fullmatch(label)}
    if any(map(DECIMAL.fullmatch, different)):
        row = next(row for row, label in enumerate(table.labels) if DECIMAL.fullmatch(label))
        raise InputError(f'{path}, line {table.lines[row]}: expected a whole number or a class name as label, found '
                         f'{table.labels[row][:MAX_DIGITS]}')
    folders, codes = folder_codes(table.files)
    if numbers == different:
        labels = _numbers(path, table, num_classes)
        names = _folder_names(folders, codes, labels, num_classes or int(labels.max()) + 1)
    else:
        if numbers:
            _refuse_mixed(path, table)
        names = sorted_names(different)
        index = {name: label for label, name in enumerate(names)}
        labels = np.array([index[name] for name in table.labels], dtype=np.int64)
    _warn_other_folders(path, table, folders, codes, labels, None if numbers else names)
    files = Texts.of(table.files)
    return ImageSet(partial(open_file, root or '', files), labels, files, names, path, bool(numbers))


def read_table(path: str, image_column: str | None = None, label_column: str | None = None) -> Table:
    """Read the rows of a list; see `load_list` for the arguments.

    Raises:
        InputError: If the list cannot be read, or a line has another format.
    """
    text = _read_text(path).replace('\r\n', '\n').replace('\r', '\n')
    lines = [(number, line) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
    if not lines:
        return Table([], [], [])
    delimiter = _delimiter(lines[0][1], image_column or label_column)
    if delimiter is None:
        rows = [_split_line(path, number, line) for number, line in lines]
    else:
        rows = _split_csv(path, lines, delimiter)
    head = [cell.strip() for cell in rows[0][1]]
    columns = _columns(path, head, image_column, label_column)
    if columns is None:
        if len(head) != 2:
            raise InputError(f'{path}, line {rows[0][0]}: found {len(head)} columns, expected path and label, or a header '
                             f"such as {IMAGE_COLUMNS[0]}{delimiter or ','}{LABEL_COLUMNS[0]}")
        columns = 0, 1
    else:
        rows = rows[1:]
        others = [printable(name) for index, name in enumerate(head) if index not in columns]
        if others:
            _logger.info(f'{path}: columns {printable(head[columns[0]])} and {printable(head[columns[1]])} are read, '
                         f"{', '.join(others[:8])} {'is' if len(others) == 1 else 'are'} not")
    files, labels = [], []
    for number, cells in rows:
        if len(cells) != len(head):
            raise InputError(f'{path}, line {number}: found {pluralize(len(cells), "column")}, expected {len(head)} as in '
                             'the first line; a comma inside a cell needs quotes')
        file, label = (cells[column].strip() for column in columns)
        if not file or not label:
            raise InputError(f"{path}, line {number}: found no {'label' if file else 'path'}")
        files.append(file)
        labels.append(label)
    return Table([number for number, _ in rows], files, labels)


def _read_text(path: str) -> str:
    """Text of a list; names that are not UTF-8 keep their bytes."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f'{path}: cannot read this list: not a regular file')
    packed = path.endswith('.gz')
    limit = MAX_UNPACKED if packed else MAX_BYTES
    try:
        with (gzip.open if packed else open)(path, 'rb') as file:
            content = file.read(limit + 1) if packed or os.path.getsize(path) <= limit else None
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f'{path}: cannot read this list: {first_line(error)}') from error
    if content is None or len(content) > limit:
        raise InputError(f'{path}: cannot read this list: has more than {limit >> 20} MiB of text')
    if content.startswith((b'\xff\xfe', b'\xfe\xff')):  # Excel's "Unicode text"
        return content.decode('utf-16', errors='replace')
    if b'\0' in content:
        raise InputError(f'{path}: cannot read this list: is not a text file')
    return content.decode('utf-8-sig', errors='surrogateescape')


def _delimiter(line: str, has_header: str | None) -> str | None:
    """Delimiter of the columns by the first line; None for `path label` lines."""
    words = line.rsplit(maxsplit=1)
    if not has_header and len(words) == 2 and NUMBER.fullmatch(words[1]) and not words[0].endswith((',', ';')):
        return None
    unquoted = re.sub(r'"[^"]*"', '', line)
    return next((mark for mark in '\t,;' if mark in unquoted), ',' if has_header else None)


def _split_line(path: str, number: int, line: str) -> tuple[int, list[str]]:
    words = line.rsplit(maxsplit=1)
    if len(words) != 2:
        raise InputError(f'{path}, line {number}: expected `path label`, or columns separated by commas, found '
                         f'{printable(line[:80])!r}')
    return number, words


def _split_csv(path: str, lines: Sequence[tuple[int, str]], delimiter: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO('\n'.join(line for _, line in lines)), delimiter=delimiter, skipinitialspace=True)
    rows, start = [], 0
    try:
        for cells in reader:
            rows.append((lines[start][0], cells))
            start = reader.line_num
    except csv.Error as error:
        raise InputError(f'{path}, line {lines[min(start, len(lines) - 1)][0]}: cannot be read as a CSV: {error}') from error
    return rows


def _columns(path: str, head: Sequence[str], image: str | None, label: str | None) -> tuple[int, int] | None:
    """Places of the two columns in a header; None if the first row is not one.

    Raises:
        InputError: If a column that is asked for is missing, or a header names only one of the two.
    """
    lower = [cell.lower() for cell in head]

    def place(wanted: str | None, option: str, usual: Sequence[str]) -> int | None:
        if wanted is None:
            return next((lower.index(name) for name in usual if name in lower), None)
        if wanted not in head:
            raise InputError(f"{path}: no column {wanted!r} ({option}), found {', '.join(map(printable, head[:12]))}")
        return head.index(wanted)
    found = place(image, '--input-key', IMAGE_COLUMNS), place(label, '--target-key', LABEL_COLUMNS)
    if None not in found:
        return found
    if found == (None, None):
        return None
    missing, option = ('images', '--input-key') if found[0] is None else ('labels', '--target-key')
    raise InputError(f"{path}: which column has the {missing}? expected {option} with one of "
                     f"{', '.join(map(printable, head[:12]))}")


def _numbers(path: str, table: Table, num_classes: int | None) -> np.ndarray:
    """(N,) labels of a list of numbers."""
    values = {label: int(label.partition('.')[0][:MAX_DIGITS]) for label in set(table.labels)}
    labels = np.array([values[label] for label in table.labels], dtype=np.int64)
    limit = num_classes if num_classes is not None else max(len(labels), 1)  # else a class would have no image
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        row = int(wrong[0])
        expected = f'0…{num_classes - 1}' if num_classes is not None else '0 or more' if labels[row] < 0 else (
            f'0…C-1, each with an image, in a list of {pluralize(len(labels), "image")}')
        raise InputError(f'{path}, line {table.lines[row]}: expected a label {expected}, found '
                         f'{table.labels[row][:MAX_DIGITS]}')
    return labels


def _refuse_mixed(path: str, table: Table) -> None:
    number, name = (next(row for row, label in enumerate(table.labels) if bool(NUMBER.fullmatch(label)) is wanted)
                    for wanted in (True, False))
    raise InputError(f'{path}: expected numbers or names as labels, found {table.labels[number][:MAX_DIGITS]} in line '
                     f'{table.lines[number]} and {printable(table.labels[name][:80])!r} in line {table.lines[name]}')


def _require_files(list_path: str, table: Table, root: str | None) -> None:
    """Check that all files exist; listing each folder once takes seconds, a system call per file takes minutes."""
    listed: dict[str, set] = {}

    def exists(file: str) -> bool:
        name = file.rpartition(os.sep)[2]
        folder = file[:len(file) - len(name)]
        if folder not in listed:
            path = os.path.join(root or '', folder) or '.'
            listed[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        return name in listed[folder]
    for number, file in zip(table.lines, table.files, strict=True):
        if exists(file):
            continue
        path = os.path.join(root or '', file)
        first = file.rsplit(maxsplit=1)
        if len(first) == 2 and exists(first[0]):
            raise InputError(f'{list_path}, line {number}: found a third column, expected `path label`, or a CSV with a '
                             'header')
        header = '; columns of a header are named by --input-key and --target-key' if number == table.lines[0] else ''
        raise InputError(f'{list_path}, line {number}: image {printable(path)} does not exist (paths are relative to '
                         f'--data-dir{header})')


def _warn_other_folders(
        path: str, table: Table, folders: Sequence[str], codes: np.ndarray, labels: np.ndarray,
        names: Sequence[str] | None) -> None:
    """Warn about images whose label is not that of their folder, where folders and labels correspond otherwise.

    Args:
        path, table: The list and its rows.
        folders, codes: As `folder_codes` returns them.
        labels: (N,) labels.
        names: C class names, if the list has names.
    """
    by_folder = folder_labels(folders, codes, labels)
    if names is not None:
        index = {name: label for label, name in enumerate(names)}
        by_folder.update({folder: index[folder] for folder in by_folder if folder in index})
    if len(by_folder) < 2 or len(set(by_folder.values())) < len(by_folder):
        return
    own = np.array([by_folder.get(folder, -1) for folder in folders])[codes]
    other = np.flatnonzero((own != labels) & (own >= 0))
    if len(other):
        row = int(other[0])
        _logger.warning(f"{path}: {pluralize(len(other), 'label')} contradict the folder of the image, e.g. line "
                        f'{table.lines[row]}: {printable(table.files[row])} has label {printable(table.labels[row])}')


def _folder_names(folders: Sequence[str], codes: np.ndarray, labels: np.ndarray, size: int) -> list[str]:
    """Names of `size` classes of a list of numbers: the one folder of the class, or numbers if that names no class alone."""
    names, seen = [str(c) for c in range(size)], np.zeros(size, dtype=np.int64)
    for pair in np.unique(labels * len(folders) + codes).tolist():
        label, code = divmod(pair, len(folders))
        seen[label] += 1
        names[label] = folders[code] if seen[label] == 1 else str(label)
    return names if len(set(names)) == size and all(names) else [str(c) for c in range(size)]


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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'--class-counts {path}: expected a list of images per class: {error}') from error
    return content
