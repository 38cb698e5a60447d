"""Resuming: find the checkpoint, check where it comes from, and translate its position to this run's batch size."""
import logging
import math
import re
from pathlib import Path

from glmc.errors import InputError
from glmc.methods import canonical_name
from glmc.training.checkpoint import SUFFIX, load_checkpoint
from glmc.training.schema import check_state
from glmc.training.state import Position

_logger = logging.getLogger(__name__)
_NAME = re.compile(rf'epoch-([0-9]{{1,18}})(?:-step-([0-9]{{1,18}}))?{re.escape(SUFFIX)}')


def find_checkpoint(resume: str | None, folder: Path) -> tuple[Path, dict] | None:
    """Load the checkpoint that `--resume` names.

    Args:
        resume: A checkpoint, a folder of checkpoints or of a run, `auto` for the newest in `folder`, or None.
        folder: Checkpoints of this run.

    Returns:
        Its path and state; None without `resume`, and for `auto` in a folder without checkpoints.

    Raises:
        InputError: If there is no checkpoint at the path, or none of them can be read.
    """
    if resume == 'auto' or resume is None:
        return load_newest(folder) if resume else None
    path = Path(resume)
    if not path.is_dir():
        return path, check_state(path, load_checkpoint(path))
    found = load_newest(path)
    if found is None:
        raise InputError(f'--resume {path}: no checkpoint in this folder')
    return found


def epoch_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, by the numbers in their names."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob(f'epoch-*{SUFFIX}')}
    order = {path: (int(name[1]), int(name[2]) if name[2] else math.inf) for path, name in found.items() if name}
    return sorted(order, key=order.__getitem__)


def load_newest(path: Path) -> tuple[Path, dict] | None:
    """Load the newest readable checkpoint in a folder of checkpoints or of a run; None if there is no checkpoint.

    Raises:
        InputError: If there are checkpoints, but none can be read.
    """
    found = epoch_checkpoints(path / 'checkpoints') or epoch_checkpoints(path)
    for candidate in reversed(found):
        try:
            return candidate, check_state(candidate, load_checkpoint(candidate))
        except InputError as error:
            _logger.warning(f'Checkpoint ignored: {error}')
    if found:
        raise InputError(f'--resume {path}: none of its {len(found)} checkpoints can be read')
    return None


def check_origin(path: Path, state: dict, description: dict, method: str, fingerprint: str) -> None:
    """Compare a checkpoint with this run, which must have the same model, method and optimizer.

    Args:
        path, state: Checkpoint and its content.
        description: `model` and `training` options of this run.
        method: Method of this run.
        fingerprint: Fingerprint of its training set; a warning if the checkpoint has another.

    Raises:
        InputError: If the model, the method or the optimizer differs.
    """
    wanted, found = ({**each['model'], **each['training']} for each in (description, state['description']))
    trained = state['metrics']
    trained_by = canonical_name(trained['method'], found.pop('balanced', False))  # an option of 0.1.0, now a row
    if wanted['name'] != found['name'] or method != trained_by:
        raise InputError(f"--resume {path}: holds {found['name']} with {found['num_classes']} classes by {trained_by}, this "
                         f"run trains {wanted['name']} with {wanted['num_classes']} classes by {method}")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(f'--resume {path}: was trained with {name} {found.get(name)}, this run has {wanted.get(name)}')
    if trained['fingerprint'] != fingerprint:
        _logger.warning('The training set differs from the one of the checkpoint (fingerprints).')


def translate(saved: Position, start: Position, steps_per_epoch: int) -> Position:
    """Position of a checkpoint in steps of this run; the next epoch if this run has fewer steps than are done.

    Args:
        saved: Position in the checkpoint.
        start: Position of this run before any step, with its batch size.
        steps_per_epoch: Steps per epoch of this run.
    """
    position = saved.for_batch(start.global_batch, start.accum_steps)
    if (saved.global_batch, saved.accum_steps) != (start.global_batch, start.accum_steps):
        _logger.warning(
            f'The global batch was {saved.global_batch} x {saved.accum_steps} steps an update, now it is '
            f'{start.global_batch} x {start.accum_steps}: from here on this is another training.')
    return position if position.step <= steps_per_epoch else position.at(position.epoch + 1)
