"""Checkpoints: one safetensors file each, tensors as they are, all other state as JSON in its header; no pickle."""
import json
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glmc.parsing import InputError

SUFFIX = '.safetensors'
BEST = f'best{SUFFIX}'


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write a nested state of tensors and plain values, whole or not at all.

    Args:
        path: Of the file; it is written beside, synced and renamed.
        state: Dicts, lists, tuples (read back as lists), tensors, str, int, float, bool, None.
    """
    _write(path, *_freeze(state))


def _freeze(state: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies of the tensors on the CPU, and all else as text: what training does from now on changes neither."""
    tensors: dict[str, Tensor] = {}
    return tensors, {'state': json.dumps(_flatten(state, '', tensors))}


def _write(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    beside = Path(f'{path}.tmp')
    beside.touch()
    mode = beside.stat().st_mode
    save_file(tensors, beside, metadata=header)
    beside.chmod(mode)  # safetensors makes files that only their owner may read
    with open(beside, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


class CheckpointWriter:
    """Writes checkpoints beside the training: `save` returns once the state is copied, `wait` once it is on disk."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def save(self, path: str | Path, state: dict, then: Callable[[], None]) -> None:
        """Save after the save before; errors of that one come up here. `then` runs when the file is in place."""
        self.wait()
        frozen = _freeze(state)
        self._pending = self._pool.submit(lambda: (_write(path, *frozen), then()))

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def load_checkpoint(path: str | Path) -> dict:
    """The state that `save_checkpoint` wrote, tensors on the CPU.

    Raises:
        InputError: If the file is missing, broken or not a checkpoint.
    """
    try:
        with safe_open(path, 'pt') as file:
            state = json.loads((file.metadata() or {})['state'])
            state = _unflatten(state, file.get_tensor)
            if not isinstance(state, dict):
                raise TypeError('its header holds no state')
            return state
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f'{path}: expected a checkpoint of train_glmc.py, cannot read it: {error}') from error


def _flatten(value, path: str, tensors: dict[str, Tensor]):
    """The value as JSON, its tensors moved to `tensors` and replaced by {'tensor': name}."""
    if isinstance(value, Tensor):
        path = f'{path}#{len(tensors)}' if path in tensors else path  # {'a.b': …} and {'a': {'b': …}} meet
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {'tensor': path}
    if isinstance(value, dict):
        return {'items': [[key, _flatten(item, f'{path}.{key}' if path else str(key), tensors)]
                          for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, f'{path}.{index}', tensors) for index, item in enumerate(value)]
    return value


def _unflatten(value, get_tensor):
    if isinstance(value, dict):
        if 'tensor' in value:
            return get_tensor(value['tensor'])
        return {key: _unflatten(item, get_tensor) for key, item in value['items']}
    return [_unflatten(item, get_tensor) for item in value] if isinstance(value, list) else value


def rng_state() -> dict:
    """State of this process's global generators, for `set_rng_state`."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict) -> None:
    """Put the global generators of this process back."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Where the checkpoint after 0-based `epoch` lies."""
    return folder / f'epoch-{epoch:04d}{SUFFIX}'


def epoch_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob(f'epoch-*{SUFFIX}'))


def find_checkpoint(path: Path) -> Path:
    """The file that `--resume PATH` means: itself, or the newest in a folder of checkpoints or of a run.

    Raises:
        InputError: If the folder has none.
    """
    if not path.is_dir():
        return path
    found = epoch_checkpoints(path / 'checkpoints') or epoch_checkpoints(path)
    if not found:
        raise InputError(f'--resume {path}: no checkpoint in this folder')
    return found[-1]


def keep_best(path: Path) -> None:
    """Keep this checkpoint under a name that pruning leaves alone."""
    beside = path.with_name(f'{BEST}.tmp')
    shutil.copyfile(path, beside)
    beside.replace(path.with_name(BEST))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in epoch_checkpoints(folder)[:-keep]:
        path.unlink()
