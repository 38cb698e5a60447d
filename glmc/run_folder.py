"""What a run leaves behind: its folder, summary.csv, and the facts of metrics.json."""
import csv
import errno
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import yaml

from glmc.errors import InputError
from glmc.evaluation.metrics import Predictions, confused_pairs

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SUMMARY = 'summary.csv'


def open_run_folder(output: str, experiment: str | None, default_name: str, resume: bool) -> Path:
    """The folder of a run: `output/experiment`, or `output/default_name` with a number where that is taken.

    Args:
        output: Parent of all runs.
        experiment: What the user calls the run; None for `default_name`.
        default_name: See above.
        resume: Whether to go on in the newest such folder.

    Raises:
        InputError: If the experiment exists and is not to be resumed, or the folder cannot be written.
    """
    parent = Path(output)
    if experiment:
        folder = parent / experiment
        if folder.exists() and not resume:
            raise InputError(f'--experiment {experiment}: {folder} exists; --resume auto continues it, '
                             'another name starts anew')
    else:
        number = 1
        while (parent / _numbered(default_name, number)).exists():
            number += 1
        folder = parent / _numbered(default_name, max(number - 1, 1) if resume else number)
    return folder


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f'{name}-{number}'


def create_run_folder(folder: Path, options: dict, before_writing: Callable[[], None] = lambda: None) -> None:
    """Make the folder and write the options into it, in a form that `--config` reads back.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
        before_writing()
        (folder / 'args.yaml').write_text(yaml.safe_dump(options, sort_keys=False), encoding='utf-8')
    except OSError as error:
        raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error


def lock_run_folder(folder: Path) -> IO:
    """Claim the folder for this process, as long as it lives and the returned file is open; on Windows there is no claim.

    Raises:
        InputError: If another run has claimed it.
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
    """Add an epoch to summary.csv, in place of it and later ones that a resumed run does again."""
    path = folder / SUMMARY
    rows = []
    if path.exists():
        with open(path, newline='', encoding='utf-8') as file:
            rows = [old for old in csv.DictReader(file) if int(old['epoch']) < row['epoch']]
    beside = path.with_suffix('.tmp')
    with open(beside, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(row), extrasaction='ignore')
        writer.writeheader()
        writer.writerows([*rows, row])
    beside.replace(path)


def summary_row(epoch: int, train: dict, metrics: dict | None, alpha: float | None, bad_images: int = 0) -> dict:
    """timm's columns, then those of the long tail; empty where there is no value, as in an epoch without evaluation."""
    row = {'epoch': epoch, 'train_loss': train['loss']}
    names = ('loss', 'top1', 'top5', 'many', 'medium', 'few', 'class_mean')
    row.update({f'eval_{name}': (metrics or {}).get(name) for name in names})
    row.update(lr=train['lr'], alpha=alpha)
    row.update({name: train.get(name) for name in ('loss_c', 'loss_cb', 'loss_sim')})
    row.update(skipped_steps=train['skipped_steps'], bad_images=bad_images)
    row['images_per_second'] = round(train['images_per_second'], 1)
    return {name: '' if value is None else value for name, value in row.items()}


def write_tables(
        folder: Path, metrics: dict, class_names: Sequence[str] | None, predictions: Predictions | None = None) -> None:
    """per_class.csv, and the most frequent mistakes as confused_pairs.csv where there are predictions."""
    names = class_names or list(map(str, range(len(metrics['train_counts']))))
    columns = ('train_counts', 'per_class_images', 'per_class_accuracy', 'per_class_predictions')
    rows = zip(range(len(names)), names, *(metrics[column] for column in columns), strict=True)
    _write_csv(folder / 'per_class.csv', ('class', 'name', 'train_images', 'images', 'accuracy', 'predictions'), rows)
    if predictions is not None:
        pairs = ((names[label], names[predicted], images) for label, predicted, images in confused_pairs(predictions, 100))
        _write_csv(folder / 'confused_pairs.csv', ('label', 'prediction', 'images'), pairs)


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def read_summary(folder: Path) -> list[dict[str, float | None]]:
    """Rows of summary.csv, None where a cell is empty; none where there is no file."""
    path = folder / SUMMARY
    if not path.exists():
        return []
    with open(path, newline='', encoding='utf-8') as file:
        return [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]


def provenance() -> dict:
    """Command, versions and commit of this run."""
    packages = ('torch', 'torchvision', 'timm', 'accelerate', 'numpy')
    return {
        'command': shlex.join(sys.argv),
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
    """Commit of this package's checkout, with `-dirty` where it was changed; None outside of one."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=40']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
