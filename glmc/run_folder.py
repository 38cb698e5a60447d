"""Folder of a run: its choice and lock, args.yaml, summary.csv, the log line of an epoch, and tables of its result."""
import csv
import errno
import io
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from glmc.cli import duration
from glmc.data.datasets import BadImages, ImageSet
from glmc.errors import InputError, first_line, printable
from glmc.evaluation.metrics import Predictions, confused_pairs
from glmc.evaluation.text import shot_legend, shot_line
from glmc.files import NAMES, atomic_write, set_aside

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_logger = logging.getLogger(__name__)
SUMMARY = 'summary.csv'
FORMULA = ('=', '+', '-', '@', '\t', '\r')  # first characters of cells that spreadsheets execute


class RunFolder:
    """Folder of a run.

    Args:
        path: Path of the folder.
        accelerator: Accelerator of the run; the main process writes.
        name: Name to number if another run takes the folder first; None for no other name.
    """

    def __init__(self, path: Path, accelerator: Accelerator, name: str | None = None):
        self.path, self.accelerator, self.name, self.num_bad = path, accelerator, name, 0
        self.seconds, self.explained = [], False  # seconds of each epoch; whether the log explains the shot groups

    @classmethod
    def choose(
            cls, accelerator: Accelerator, default_name: str, output: str, experiment: str | None,
            resume: str | None) -> 'RunFolder':
        """Choose the folder on the main process for all: that of the checkpoint in `resume`, or `open_run_folder`.

        Raises:
            InputError: If the experiment exists and is not to be resumed.
        """
        path = None
        if accelerator.is_main_process and resume not in (None, 'auto') and not experiment:
            found = Path(resume)
            path = found.parent if found.is_file() else found
            path = (path.parent if path.name == 'checkpoints' else path).resolve()
        elif accelerator.is_main_process:
            path = open_run_folder(output, experiment, default_name, resume=resume == 'auto')
        path = broadcast_object_list([path])[0]
        return cls(path, accelerator, None if experiment or resume else default_name)

    @property
    def checkpoints(self) -> Path:
        return self.path / 'checkpoints'

    def create(self, options: dict) -> None:
        """Create and lock the folder, and write the options into it, on the main process; the next number if it is taken."""
        if self.accelerator.is_main_process:
            if self.name:
                self.path = claim_folder(self.path.parent, self.name)
            self.lock = create_run_folder(self.path, options)
        self.path = broadcast_object_list([self.path])[0]

    def log_epoch(
            self, row: dict, train: dict, metrics: dict | None, num_epochs: int, trackers: Callable[[dict], None],
            seconds: float) -> None:
        """Write an epoch to summary.csv and the trackers, or warn if that fails, and log one line.

        The time left is that of as many epochs of the mean duration so far. The first line with an evaluation explains it.

        Args:
            row: Result of `summary_row`.
            train, metrics: Metrics of the training and, if there was one, of the evaluation.
            num_epochs: Epochs of the run.
            trackers: Called with the row.
            seconds: Duration of training and evaluation; a resumed epoch counts as a whole one by its images per second.
        """
        if self.accelerator.is_main_process:
            with record_errors_as_warnings(f"{SUMMARY}: epoch {row['epoch']}"):
                write_summary(self.path, row)
            with record_errors_as_warnings(f"Trackers: epoch {row['epoch']}"):
                trackers(row)
        if metrics and not self.explained:
            self.explained = True
            _logger.info(f"In brackets: many- / medium- / few-shot classes. {shot_legend(metrics['shot_thresholds'])}")
        self.seconds.append(max(seconds, train['images'] / max(train['images_per_second'], 1e-9)))
        left = sum(self.seconds) / len(self.seconds) * (num_epochs - row['epoch'] - 1)
        evaluation = f'{shot_line(metrics)}, ' if metrics else ''
        skipped = f"{train['skipped_steps']} steps skipped, " if train['skipped_steps'] else ''
        _logger.info(f"Epoch {row['epoch'] + 1}/{num_epochs}: loss {train['loss']:.3f}, {evaluation}{skipped}"
                     f"{train['images']:,} images at {train['images_per_second']:.0f}/s, "
                     f"{duration(self.seconds[-1])} per epoch{f', {duration(left)} left' if left else ''}")

    def count_bad(self, bad_images: BadImages | None) -> int:
        """Number of training images that could not be decoded; all processes must call this together.

        A warning names them when there are more than before.
        """
        if bad_images is None:
            return 0
        names = sorted({name for found in gather_object([bad_images.names()]) for name in found})
        if len(names) > self.num_bad:
            _logger.warning(f"{len(names)} training images cannot be decoded and were replaced by others of their class: "
                            f"{', '.join(names[:10])}{' …' if len(names) > 10 else ''}")
        self.num_bad = len(names)
        return self.num_bad


@contextmanager
def record_errors_as_warnings(name: str) -> Iterator[None]:
    """Turn any error in the body into a warning: a file that records the training must not end it."""
    try:
        yield
    except Exception as error:  # a disk, a server
        _logger.warning(printable(f'{name} not written: {type(error).__name__}: {first_line(error)}'))


def open_run_folder(output: str, experiment: str | None, default_name: str, resume: bool) -> Path:
    """Folder of a run: `output/experiment`, or `output/default_name` with a number if that is taken.

    Args:
        output: Parent of all runs.
        experiment: Name of the run; None for `default_name`.
        default_name: Name without `experiment`.
        resume: Continue in the newest such folder.

    Raises:
        InputError: If the experiment exists and is not to be resumed, or the path is not UTF-8.
    """
    parent = Path(output)
    try:
        f'{output}{experiment}{default_name}'.encode()
    except UnicodeEncodeError as error:  # safetensors opens no such path
        path = printable(str(parent / (experiment or default_name)))
        raise InputError(f'--output: {path} is not UTF-8, expected another --output or --experiment') from error
    if experiment:
        folder = parent / experiment
        place = os.path.normpath(experiment)
        if os.path.isabs(place) or place.split(os.sep)[0] in ('.', '..') or '\0' in place:
            raise InputError(f'--experiment {printable(experiment)}: expected the name of a folder in --output {output}')
        if folder.exists() and not resume:
            raise InputError(f'--experiment {experiment}: {folder} exists; --resume auto continues it, '
                             'another name starts anew')
        return folder
    number = 1
    while (parent / _numbered(default_name, number)).exists():
        number += 1
    return parent / _numbered(default_name, max(number - 1, 1) if resume else number)


def claim_folder(parent: Path, name: str) -> Path:
    """Create the first folder of this name and a number that no run has, even one that starts at the same moment."""
    number = 1
    while True:
        folder = parent / _numbered(name, number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f'{name}-{number}'


def create_run_folder(folder: Path, options: dict) -> IO:
    """Create and lock the folder, delete half-written files of a killed run, and write args.yaml for `--config`.

    Returns:
        The lock, as `lock_run_folder`.

    Raises:
        InputError: If the folder cannot be written, or another run has locked it.
    """
    try:
        (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
        lock = lock_run_folder(folder)
        for path in (folder / 'checkpoints').glob('*.tmp'):
            path.unlink()
        with atomic_write(folder / 'args.yaml') as beside:
            beside.write_text(yaml.safe_dump(options, sort_keys=False), encoding='utf-8')
    except OSError as error:
        raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error
    return lock


def lock_run_folder(folder: Path) -> IO:
    """Lock the folder while this process runs and the returned file is open; on Windows there is no lock.

    Raises:
        InputError: If another run has locked it.
    """
    path = folder / '.lock'
    file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115, open as long as the run
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file  # a file system without locks
        file.seek(0)
        raise InputError(f'--experiment {folder.name}: {file.read() or "another process"} is writing to {folder}; wait for '
                         'it, or give another name') from error
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}')
    file.flush()
    return file


def write_summary(folder: Path, row: dict) -> None:
    """Add an epoch to summary.csv and drop its later epochs, which a resumed run repeats."""
    path, rows = folder / SUMMARY, []
    if path.exists():
        rows, damaged = _read_rows(path)
        rows = [old for old in rows if int(old['epoch']) < row['epoch']]
        if damaged:
            _logger.warning(f'{path}: is damaged, set aside as {set_aside(path).name}; its readable rows are kept')
    with atomic_write(path) as beside, open(beside, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(row), extrasaction='ignore')
        writer.writeheader()
        writer.writerows([*rows, row])


def _read_rows(path: Path) -> tuple[list[dict[str, str]], bool]:
    """Rows of summary.csv whose cells are numbers or empty, and whether the file has anything else."""
    rows, damaged = [], False
    try:
        text = path.read_bytes().decode('utf-8', 'replace')
        damaged = '\0' in text
        for row in csv.DictReader(io.StringIO(text.replace('\0', ''), newline='')):
            if _is_row(row):
                rows.append(row)
            else:
                damaged = True
    except (OSError, csv.Error):  # a folder, a cell of 100 kB
        damaged = True
    return rows, damaged or not rows


def _is_row(row: dict) -> bool:
    try:
        return None not in row and re.fullmatch('[0-9]{1,18}', row['epoch']) and all(
            cell == '' or isinstance(float(cell), float) for cell in row.values())
    except (KeyError, TypeError, ValueError):
        return False


def summary_row(epoch: int, train: dict, metrics: dict | None, alpha: float | None, bad_images: int = 0) -> dict:
    """Row of summary.csv: timm's columns, then the long tail's; empty without a value, as in an epoch without evaluation."""
    row = {'epoch': epoch, 'train_loss': train['loss']}
    names = ('loss', 'top1', 'top5', 'many', 'medium', 'few', 'class_mean')
    row.update({f'eval_{name}': (metrics or {}).get(name) for name in names})
    row.update(lr=train['lr'], alpha=alpha)
    parts = dict.fromkeys(('loss_c', 'loss_cb', 'loss_sim', *(name for name in train if name.startswith('loss_'))))
    row.update({name: train.get(name) for name in parts})
    row.update(skipped_steps=train['skipped_steps'], bad_images=bad_images)
    row['images_per_second'] = round(train['images_per_second'], 1)
    return {name: '' if value is None else value for name, value in row.items()}


def write_tables(
        folder: Path, metrics: dict, class_names: Sequence[str] | None, predictions: Predictions | None = None,
        images=None) -> None:
    """Write per_class.csv and, if there are predictions, predictions.csv and confused_pairs.csv; warn if one fails.

    Names are exact, byte by byte; a name that a spreadsheet would execute starts with a quote, a file with ./.

    Args:
        folder: Folder of the results.
        metrics: Result of an evaluation.
        class_names: C names; None for 0…C-1.
        predictions: Predictions of every evaluated image.
        images: Evaluated set, whose names are in predictions.csv; a set without an index has positions instead.
    """
    names = list(map(spreadsheet_safe, class_names or range(len(metrics['train_counts']))))
    columns = ('train_counts', 'per_class_images', 'per_class_accuracy', 'per_class_predictions')
    rows = zip(range(len(names)), names, *(metrics[column] for column in columns), strict=True)
    _write_csv(folder / 'per_class.csv', ('class', 'name', 'train_images', 'images', 'accuracy', 'predictions'), rows)
    if predictions is None:
        return
    pairs = ((names[label], names[predicted], count) for label, predicted, count in confused_pairs(predictions, 100))
    _write_csv(folder / 'confused_pairs.csv', ('label', 'prediction', 'images'), pairs)
    files = images.names if isinstance(images, ImageSet) else range(len(predictions.labels))
    rows = ((spreadsheet_safe(file, f'.{os.sep}'), names[label], names[predicted], f'{confidence:.6f}')
            for file, label, predicted, confidence in zip(files, *(part.tolist() for part in predictions), strict=True))
    _write_csv(folder / 'predictions.csv', ('file', 'label', 'prediction', 'probability'), rows)


def spreadsheet_safe(name, prefix: str = "'") -> str:
    """The name, after a prefix if a spreadsheet would execute it."""
    return f'{prefix}{name}' if str(name).startswith(FORMULA) else str(name)


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence]) -> None:
    with record_errors_as_warnings(str(path)), open(path, 'w', newline='', **NAMES) as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def read_summary(folder: Path) -> list[dict[str, float | None]]:
    """Readable rows of summary.csv, None for an empty cell; an empty list without the file."""
    path = folder / SUMMARY
    rows = _read_rows(path)[0] if path.exists() else []
    return [{name: float(cell) if cell else None for name, cell in row.items()} for row in rows]


def provenance() -> dict:
    """Command, versions and commit of this run; on a CPU the command sets the threads, which change the last digits."""
    threads = [] if torch.cuda.is_available() else [f'OMP_NUM_THREADS={torch.get_num_threads()}']
    packages = ('torch', 'torchvision', 'timm', 'accelerate', 'numpy')
    return {
        'command': shlex.join([*threads, *sys.argv]),
        'versions': {'python': platform.python_version(), **{name: _version(name) for name in packages}},
        'commit': _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache(1)
def _commit() -> str | None:
    """Commit of this package's checkout, with `-dirty` if it was changed; None outside of a checkout."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=40']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
