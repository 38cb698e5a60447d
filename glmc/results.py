"""What a run leaves behind: its folder, summary.csv, and the facts of metrics.json."""
import csv
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from glmc.parsing import InputError

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


def create_run_folder(folder: Path, options: dict) -> None:
    """Make the folder and write the options into it, in a form that `--config` reads back.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
        (folder / 'args.yaml').write_text(yaml.safe_dump(options, sort_keys=False), encoding='utf-8')
    except OSError as error:
        raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error


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


def summary_row(epoch: int, train: dict, metrics: dict | None, alpha: float | None) -> dict:
    """timm's columns, then those of the long tail; empty where there is no value, as in an epoch without evaluation."""
    row = {'epoch': epoch, 'train_loss': train['loss']}
    names = ('loss', 'top1', 'top5', 'many', 'medium', 'few', 'class_mean')
    row.update({f'eval_{name}': (metrics or {}).get(name) for name in names})
    row.update(lr=train['lr'], alpha=alpha)
    row.update({name: train.get(name) for name in ('loss_c', 'loss_cb', 'loss_sim')})
    row['images_per_second'] = round(train['images_per_second'], 1)
    return {name: '' if value is None else value for name, value in row.items()}


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


def _commit() -> str | None:
    """Commit of this package's checkout, with `-dirty` where it was changed; None outside of one."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=40']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
