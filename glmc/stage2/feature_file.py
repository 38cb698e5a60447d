"""A file of features that one or several processes extract block by block, and the reader of its rows."""
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glmc.errors import RunError
from glmc.files import reserve, sync, write_all

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_logger = logging.getLogger(__name__)
_BINARY = getattr(os, 'O_BINARY', 0)  # Windows
_ENTRY = re.compile(r'(\d{1,9}) ([0-9a-f]{64}|damaged)')  # a line of the log
BLOCK = 2048  # images that are extracted, written and checked together
IN_MEMORY = 2 ** 28  # bytes of float32 features; larger ones are bfloat16 and remain on the disk


class FeatureFile:
    """(1 + V, N, D) features on the disk: float32, or bfloat16 if float32 would need more than 256 MiB.

    KEY.npy.part receives blocks of images, and is renamed to KEY.npy when all are finished. KEY.blocks is its log: a first
    line of JSON with shape, dtype, block size and precision, then a line `block sha256` for each finished block. Locks on
    bytes of the log deal the blocks out to the processes, also on several machines, and end with their process. A block is
    used only if its content has the checksum of the log. bfloat16 values are stored as uint16 bits, which NumPy can load.

    Args:
        path: Path without suffix: folder and key.
        shape: (1 + V, N, D).
        choose_precision: Returns the precision of the encoder; called if the log has none.

    Raises:
        RunError: If a file cannot be written, or the disk has too little space for all features.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], choose_precision: Callable[[], str]):
        self.path, self.part, self.log_path = (Path(f'{path}.{suffix}') for suffix in ('npy', 'npy.part', 'blocks'))
        self.shape, self.num_blocks, self.claimed = shape, math.ceil(shape[1] / BLOCK), set()
        self.dtype = torch.float32 if 4 * math.prod(shape) <= IN_MEMORY else torch.bfloat16
        self.stored = np.dtype(np.float32 if self.dtype == torch.float32 else np.uint16)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, dict(descr=self.stored.str, fortran_order=False, shape=shape))
        self.header, self.log, self.data, self.denied = header.getvalue(), None, None, None
        self.size = len(self.header) + math.prod(shape) * self.stored.itemsize
        try:
            self._open(choose_precision)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> 'FeatureFile':
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and release all claims."""
        for descriptor in filter(None, (self.log, self.data)):
            os.close(descriptor)
        self.log = self.data = None

    def _open(self, choose_precision: Callable[[], str]) -> None:
        with _disk_errors(self.log_path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.log = os.open(self.log_path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS) or not self.path.exists():
                    raise
                self.log = os.open(self.log_path, os.O_RDONLY | _BINARY)  # complete features need no more
                self.denied = error
        with self._locked():
            exists = self.path.exists() or self.part.exists()
            settings = dict(shape=list(self.shape), dtype=str(self.dtype).split('.')[-1], block=BLOCK)
            recorded = self._read_log()
            self.precision = recorded.pop('precision', None) if exists else None
            if recorded == settings and self.precision in ('float32', 'bfloat16', 'float16'):
                self._check()
                return
            self._require_writable()
            with _disk_errors(self.log_path):
                os.ftruncate(self.log, 0)
            self.finished = {}
            self._check()
            self.precision = choose_precision()
            self._append(json.dumps(dict(settings, precision=self.precision)))

    def _check(self) -> None:
        """Compare finished blocks with their checksums; prepare KEY.npy.part unless all are finished and agree."""
        complete = self.path.exists()
        if complete or self.finished:
            file = self.path if complete else self.part
            with _disk_errors(file):
                self.data = os.open(file, os.O_RDONLY | _BINARY)
                damaged = [block for block, digest in self.finished.items() if _digest(*self._read(block)) != digest]
            if complete and not damaged and self.is_finished():
                return
            os.close(self.data)
            self.data = None
            self._require_writable()
            for block in damaged:
                self._append(f'{block} damaged')
                del self.finished[block]
            if complete or damaged:
                missing = self.num_blocks - len(self.finished) if complete else len(damaged)
                _logger.warning(f'{file}: {missing:,} of {self.num_blocks:,} blocks are damaged or have no checksum; these '
                                'are extracted anew')
        with _disk_errors(self.part):
            if complete:
                os.replace(self.path, self.part)
            self.data = os.open(self.part, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
            try:
                reserve(self.part, self.data, self.size)
            except RunError:
                if not self.finished:
                    self.part.unlink()
                raise
            os.ftruncate(self.data, self.size)  # a file of another shape may be longer
            self._write(0, self.header)

    def _require_writable(self) -> None:
        if self.denied:
            raise RunError(f'{self.log_path}: {self.denied.strerror}') from self.denied

    def is_finished(self) -> bool:
        """Whether all blocks are finished, as of the last look at the log."""
        return len(self.finished) == self.num_blocks

    def num_finished(self) -> int:
        """Images in finished blocks."""
        return sum(len(self.images(block)) for block in self.finished)

    def images(self, block: int) -> range:
        """Indices of the images of a block."""
        return range(block * BLOCK, min((block + 1) * BLOCK, self.shape[1]))

    def claim(self) -> int | None:
        """Claim a block that is neither finished nor claimed by any process; None if there is none."""
        for block in range(self.num_blocks):
            if block not in self.finished and block not in self.claimed and self._lock(1 + block, wait=False):
                self._read_log()
                if block not in self.finished:
                    self.claimed.add(block)
                    return block
                self._unlock(1 + block)
        return None

    def write(self, block: int, values: Tensor) -> None:
        """Write the (1 + V, n, D) float32 features of a claimed block to the disk, then its line of the log."""
        values = values.to(self.dtype).contiguous()
        array = (values if self.dtype == torch.float32 else values.view(torch.int16)).numpy()
        with _disk_errors(self.part):
            for view, rows in enumerate(array):
                self._write(self._offset(view, block), rows)
            os.fsync(self.data)
        with self._locked():
            self._append(f'{block} {_digest(*([self.header] if block == 0 else []), array)}')
            self._read_log()
        self.claimed.discard(block)
        self._unlock(1 + block)

    def finish(self) -> bool:
        """Rename the file if all blocks are finished, by whichever process; return whether they are."""
        with self._locked():
            self._read_log()
            if self.is_finished() and self.part.exists():
                with _disk_errors(self.path):
                    os.close(self.data)  # Windows renames no open file
                    self.data = None
                    os.replace(self.part, self.path)
                    if os.name == 'posix':
                        sync(self.path.parent)
        return self.is_finished()

    def views(self) -> 'Tensor | StoredViews':
        """(1 + V, N, D) features: a float32 tensor in memory, or the reader of a bfloat16 file."""
        if self.dtype == torch.bfloat16:
            return StoredViews(self.path, self.shape, len(self.header))
        with _disk_errors(self.path):
            values = np.fromfile(self.path, np.float32, math.prod(self.shape), offset=len(self.header))
        return torch.from_numpy(values.reshape(self.shape))

    def _offset(self, view: int, block: int) -> int:
        """Position of the rows of a block in the file."""
        return len(self.header) + (view * self.shape[1] + block * BLOCK) * self.shape[2] * self.stored.itemsize

    def _write(self, offset: int, data) -> None:
        os.lseek(self.data, offset, os.SEEK_SET)
        write_all(self.data, data)

    def _read(self, block: int) -> list[bytes]:
        """Rows of a block, view by view; before those of the first block, the header of the file."""
        length = len(self.images(block)) * self.shape[2] * self.stored.itemsize
        places = [(self._offset(view, block), length) for view in range(self.shape[0])]
        return [_read_at(self.data, *place) for place in ([(0, len(self.header))] if block == 0 else []) + places]

    def _read_log(self) -> dict:
        """Return the settings of the log and update `finished`, block -> checksum; unfinished lines are ignored."""
        content = _read_at(self.log, 0, os.fstat(self.log).st_size).decode('utf-8', 'replace')
        first, *lines = content.split('\n')[:-1] or ['']
        self.finished = {}
        for line in lines:
            if (entry := _ENTRY.fullmatch(line)) and int(entry[1]) < self.num_blocks:
                self.finished[int(entry[1])] = entry[2]
        self.finished = {block: digest for block, digest in self.finished.items() if digest != 'damaged'}
        try:
            settings = json.loads(first)
        except (ValueError, RecursionError):
            settings = {}
        return settings if isinstance(settings, dict) else {}

    def _append(self, line: str) -> None:
        """Append a line to the log, on a line of its own even if a process died while it wrote one."""
        with _disk_errors(self.log_path):
            size = os.lseek(self.log, 0, os.SEEK_END)
            cut = size and _read_at(self.log, size - 1, 1) != b'\n'
            write_all(self.log, f"{chr(10) if cut else ''}{line}\n".encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude other processes from the log."""
        self._lock(0, wait=True)
        try:
            yield
        finally:
            self._unlock(0)

    def _lock(self, byte: int, wait: bool) -> bool:
        """Lock a byte of the log; return False if another process has. Without locks of the system, every process may."""
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self.log, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def _unlock(self, byte: int) -> None:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(self.log, fcntl.LOCK_UN, 1, byte)


class StoredViews:
    """(1 + V, N, D) bfloat16 features in a file, indexed like a tensor.

    Rows are read, not mapped: a mapping's pages would count as memory of the process, and a lost disk would kill it.

    Args:
        path: Path of the file.
        shape: (1 + V, N, D).
        offset: Bytes before the first row.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], offset: int):
        self.path, self.shape, self.offset = path, shape, offset
        self.file = open(path, 'rb', buffering=0)  # noqa: SIM115, open as long as the object

    def __getitem__(self, index: tuple[Tensor | int, Tensor]) -> Tensor:
        """Read (n, D) bfloat16 rows of (n,) views, or one for all, and (n,) images.

        Raises:
            RunError: If the file has become shorter or cannot be read.
        """
        views, images = index
        rows = (torch.as_tensor(views) * self.shape[1] + images).numpy()
        values = np.empty((len(rows), self.shape[2]), np.int16)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()  # of runs of neighbours, each read at once
        with _disk_errors(self.path):
            for start, end in zip(starts, [*starts[1:], len(rows)], strict=False):
                target = values[start:end]
                self.file.seek(self.offset + int(rows[start]) * 2 * self.shape[2])
                if self.file.readinto(target) != target.nbytes:
                    raise RunError(f'{self.path}: has become shorter; delete it, the next run extracts it anew')
        return torch.from_numpy(values).view(torch.bfloat16)


def _read_at(descriptor: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes from a position of a file."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    parts = []
    while length and (part := os.read(descriptor, min(length, 2 ** 24))):
        parts.append(part)
        length -= len(part)
    return b''.join(parts)


def _digest(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the system into a RunError of one line that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError(f'{path}: {error.strerror or error}') from error
