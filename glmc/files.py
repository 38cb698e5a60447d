"""Files that are written whole or not at all, and space that is reserved for them."""
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmc.errors import RunError

NAMES = dict(encoding='utf-8', errors='surrogateescape')  # text files that keep file names of other encodings byte by byte
ESCAPED = dict(encoding='utf-8', errors='backslashreplace')  # JSON, which keeps them as \\udc80, and pages, which show that


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end, sync that file to disk and rename it to `path`.

    `path` always holds the old content or the new content in full.

    Raises:
        OSError: If the file cannot be written; the old content is kept.
    """
    beside = path.with_name(f'{path.name}.{os.getpid()}.tmp')  # two processes may write the same file
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        if os.name == 'posix':  # elsewhere a folder cannot be opened
            sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_is_full(error: Exception) -> bool:
    """Whether a write failed for lack of space or quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reserve(path: Path, descriptor: int, size: int) -> None:
    """Extend an open file to `size` bytes that later writes cannot lack; its content is kept.

    Args:
        path: Path of the file.
        descriptor: Writable descriptor of the file.
        size: Bytes.

    Raises:
        RunError: If the disk has too little space or quota; the file is shortened to its old size.
    """
    before = os.fstat(descriptor).st_size
    try:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except (AttributeError, OSError) as error:  # macOS, Windows; some file systems
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.lseek(descriptor, before, os.SEEK_SET)
            for start in range(before, size, 2 ** 20):
                write_all(descriptor, bytes(min(2 ** 20, size - start)))
    except OSError as error:
        if not disk_is_full(error):
            raise
        os.ftruncate(descriptor, before)
        raise RunError(f'{path}: needs {size - before:,} bytes, {shutil.disk_usage(path.parent).free:,} bytes are free: '
                       f'{error.strerror}') from error


def write_all(descriptor: int, data) -> None:
    """Write a bytes-like object at the position of the descriptor."""
    view = memoryview(data).cast('B')
    while view:
        view = view[os.write(descriptor, view):]
