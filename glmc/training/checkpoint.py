"""Checkpoints: one safetensors file each, tensors as they are, all other state as JSON in its header; no pickle."""
import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glmc.errors import InputError
from glmc.files import atomic_write

SUFFIX = '.safetensors'
_logger = logging.getLogger(__name__)


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write a nested state of tensors and plain values; a failed write keeps the previous file.

    Args:
        path: File to write.
        state: Dicts, lists, tuples (read back as lists), tensors, str, int, float, bool, None.

    Raises:
        OSError: If the file cannot be written.
    """
    _write(Path(path), *_freeze(state))


def _freeze(state: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy the tensors to the CPU and turn the rest into JSON, so that later training steps change neither."""
    tensors: dict[str, Tensor] = {}
    return tensors, {'state': json.dumps(_flatten(state, '', tensors))}


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    with atomic_write(path) as beside:
        write_tensors(beside, tensors, {**header, 'crc32': _checksum(tensors, header['state'])})


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write contiguous CPU tensors and text as a safetensors file, if the disk has the space.

    Raises:
        OSError: If the file cannot be written.
    """
    need = sum(tensor.nbytes for tensor in tensors.values()) + sum(map(len, header.values())) + 2 ** 20
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise OSError(errno.ENOSPC, f'needs {need / 2 ** 20:.0f} MiB, {free / 2 ** 20:.0f} MiB are free', str(path.parent))
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:  # which hides the error of the system
        found = re.search(r'\(os error (\d+)\)', str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error
    path.chmod(mode)  # safetensors makes files that only their owner may read


def _checksum(tensors: dict[str, Tensor], state: str) -> str:
    crc = zlib.crc32(state.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return f'{crc:08x}'


class CheckpointWriter:
    """Write checkpoints in a thread: `save` returns when the state is copied, `wait` when the file is on disk."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def save(self, path: Path, state: dict, then: Callable[[], None]) -> None:
        """Copy `state` and start to write it, after any earlier save; call `then` when the file is in place."""
        self.wait()
        frozen = _freeze(state)
        self._pending = self._pool.submit(lambda: (_write(path, *frozen), then()))

    def wait(self) -> bool:
        """Wait for the pending save.

        Returns:
            False, with a warning, if the file cannot be written, as on a full disk; the previous file is kept.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
            return True
        except OSError as error:
            _logger.warning(f'Checkpoint not saved, the previous one is kept: {error}')
            return False


def load_checkpoint(path: str | Path) -> dict:
    """Read the state that `save_checkpoint` wrote, tensors on the CPU.

    Raises:
        InputError: If the file is missing, broken or not a checkpoint.
    """
    try:
        with safe_open(path, 'pt') as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
            if header['crc32'] != _checksum(tensors, header['state']):
                raise ValueError('the checksum is wrong')
            state = _unflatten(json.loads(header['state']), tensors.__getitem__)
            if not isinstance(state, dict):
                raise TypeError('its header holds no state')
            return state
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f'{path}: expected a checkpoint of train_glmc.py, cannot read it: {error}') from error


def _flatten(value, path: str, tensors: dict[str, Tensor]):
    """Return the value as JSON; copy its tensors into `tensors` and replace each by {'tensor': name}."""
    if isinstance(value, Tensor):
        path = f'{path}#{len(tensors)}' if path in tensors else path  # {'a.b': …} and {'a': {'b': …}} meet
        tensors[path] = value.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)
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
