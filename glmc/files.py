"""Files that are written whole or not at all."""
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        _sync(beside)
        os.replace(beside, path)
        if os.name == 'posix':  # elsewhere a folder cannot be opened
            _sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_is_full(error: Exception) -> bool:
    """Whether a write failed for lack of space or quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
