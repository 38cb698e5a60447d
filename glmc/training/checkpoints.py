"""The checkpoints of a run: their names, the newest, the best, and which are kept."""
import logging
import shutil
from pathlib import Path

from glmc.errors import InputError
from glmc.training.checkpoint import SUFFIX, load_checkpoint

_logger = logging.getLogger(__name__)
BEST = f'best{SUFFIX}'


def checkpoint_path(folder: Path, epoch: int, step: int = 0) -> Path:
    """Where a checkpoint lies: after 0-based `epoch`, or after `step` steps of it. By name, newer ones come later."""
    return folder / f"epoch-{epoch:04d}{f'-step-{step:08d}' if step else ''}{SUFFIX}"


def epoch_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob(f'epoch-*{SUFFIX}'))


def load_newest(path: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read in a folder of checkpoints or of a run, and its state; None without any.

    Raises:
        InputError: If none of those that are there can be read.
    """
    found = epoch_checkpoints(path / 'checkpoints') or epoch_checkpoints(path)
    for candidate in reversed(found):
        try:
            return candidate, load_checkpoint(candidate)
        except InputError as error:
            _logger.warning(f'Passed over: {error}')
    if found:
        raise InputError(f'--resume {path}: none of its {len(found)} checkpoints can be read')
    return None


def keep_best(path: Path) -> None:
    """Keep this checkpoint under a name that pruning leaves alone."""
    beside = path.with_name(f'{BEST}.tmp')
    shutil.copyfile(path, beside)
    beside.replace(path.with_name(BEST))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in epoch_checkpoints(folder)[:-keep]:
        path.unlink()


def remove_half_written(folder: Path) -> None:
    """Delete what a run that was killed in the middle of a save left."""
    for path in folder.glob('*.tmp'):
        path.unlink()
