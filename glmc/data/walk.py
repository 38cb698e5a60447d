"""Image files in folders: sorted, each once, without hidden files and what operating systems add."""
import os
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from glmc.data.profiles import pluralize
from glmc.errors import InputError, first_line, printable

# Written by file managers, archivers and network drives; in lower case.
SYSTEM_NAMES = {'thumbs.db', 'desktop.ini', '__macosx', '@eadir', '$recycle.bin', 'system volume information'}
ONLY_IDENTIFIED = {'BUFR', 'GRIB', 'HDF5', 'MPEG'}  # formats that Pillow recognises and cannot decode
MAX_LISTED = 5  # extensions in the line on the files that are no images


@dataclass
class FoundImages:
    """Image files, and the number of entries that are none.

    Args:
        files: Paths that start as the user wrote them.
        hidden: Hidden or system files and folders, not entered.
        others: Extension -> files that are no images by it.
        unreadable: One text per folder that cannot be read.
    """
    files: list[str] = field(default_factory=list)
    hidden: int = 0
    others: Counter = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def passed_over(self) -> str:
        """One line on the entries that are no images; empty if there are none."""
        items = [pluralize(self.hidden, 'hidden or system file')] if self.hidden else []
        if self.others:
            kinds = [f'{number:,} {printable(extension)}' for extension, number in self.others.most_common(MAX_LISTED)]
            more = ', …' if len(self.others) > MAX_LISTED else ''
            items += [f"{pluralize(self.others.total(), 'other file')} ({', '.join(kinds)}{more})"]
        if self.unreadable:
            items += [f"{pluralize(len(self.unreadable), 'unreadable folder')} ({self.unreadable[0]})"]
        return ', '.join(items)


def find_images(paths: Iterable[str]) -> FoundImages:
    """Find the image files among files and in folders.

    A file that is named is taken whatever its extension. A folder is searched with its subfolders for the extensions that
    Pillow can open; its files are sorted by code point. Links are followed. A file with several paths comes once, by the
    path without links if there is one, so that circles end.

    Args:
        paths: Files and folders.

    Raises:
        InputError: If a path does not exist, is a pipe or device, or there is no image.
    """
    paths, found, seen, extensions = list(paths), FoundImages(), set(), image_extensions()
    files: dict[str, str] = {}  # real path -> path as found
    for path in paths:
        if os.path.isdir(path):
            new = {}
            for file, real in _walk(path, extensions, seen, found):
                new.setdefault(real, file)
            for real, file in sorted(new.items(), key=lambda item: item[1].split(os.sep)):
                files.setdefault(real, file)
        elif os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path)):  # a broken link is an image too
            files.setdefault(os.path.realpath(path), path)
        else:
            expected = 'not a regular file' if os.path.exists(path) else 'no such file or folder'
            raise InputError(f'{printable(path)}: {expected}')
    if not files:
        passed_over = found.passed_over()
        raise InputError(f"{printable(paths[0])}{' …' if len(paths) > 1 else ''}: found no image"
                         f"{f' but {passed_over}' if passed_over else ''}, expected files with the extension "
                         f"{' '.join(sorted(extensions))}")
    found.files = list(files.values())
    return found


def image_extensions() -> frozenset[str]:
    """Extensions in lower case of the formats that Pillow can open."""
    known = Image.registered_extensions().items()
    readable = {*Image.OPEN, 'MPO'} - ONLY_IDENTIFIED  # MPO, of cameras with two lenses, is opened as a JPEG
    return frozenset(extension.lower() for extension, name in known if name in readable)


def _walk(
        folder: str, extensions: Collection[str], seen: set[str], found: FoundImages) -> Iterator[tuple[str, str]]:
    """Path and real path of the image files below a folder; links come last.

    Args:
        folder: Root.
        extensions: Extensions of images.
        seen: Real paths of the folders that were searched; extended.
        found: Counts the other entries.
    """
    pending = deque([folder])
    while pending:
        path = pending.pop()
        if not os.path.isdir(path):  # a link to a file, or to nothing, which is an image that cannot be read
            if _extension(path) in extensions and (os.path.isfile(path) or not os.path.exists(path)):
                yield path, os.path.realpath(path)
            else:
                found.others[_extension(path)] += 1
            continue
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(path) as entries:
                entries = list(entries)
        except OSError as error:
            found.unreadable.append(printable(f'{path}: {error.strerror or first_line(error)}'))
            continue
        for entry in entries:
            if entry.name.startswith('.') or entry.name.lower() in SYSTEM_NAMES:
                found.hidden += 1
            elif entry.is_symlink():
                pending.appendleft(entry.path)
            elif entry.is_dir():
                pending.append(entry.path)
            elif _extension(entry.name) in extensions and entry.is_file():  # no pipe, which would block the reader
                yield entry.path, os.path.join(real, entry.name)
            else:
                found.others[_extension(entry.name)] += 1


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower() or 'without extension'
