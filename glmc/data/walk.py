"""Image files in folders: sorted, each once, without hidden files and what operating systems add."""
import os
from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image

from glmc.data.profiles import pluralize
from glmc.errors import InputError, first_line, printable

# Written by file managers, archivers and network drives; in lower case.
SYSTEM_NAMES = {'thumbs.db', 'desktop.ini', '__macosx', '@eadir', '$recycle.bin', 'system volume information'}
ONLY_IDENTIFIED = {'BUFR', 'GRIB', 'HDF5', 'MPEG'}  # formats that Pillow recognises and cannot decode
USUAL = ('.jpg', '.png', '.webp')
MAX_LISTED = 5  # extensions in the line on the files that are no images


@dataclass
class FoundImages:
    """Image files, and the entries that are none.

    Args:
        files: Paths that start as the user wrote them.
        hidden: Number of hidden or system files and folders, not entered.
        repeated: Links to an image or folder that comes by another path.
        others: Extension -> number of files that are no images by it.
        unreadable: One text per folder that cannot be read.
        empty: Folders without images and subfolders.
    """
    files: list[str] = field(default_factory=list)
    hidden: int = 0
    repeated: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def passed_over(self) -> str:
        """One line on the entries that are no images; empty if there are none."""
        items = [pluralize(self.hidden, 'hidden or system file')] if self.hidden else []
        if self.others:
            largest = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))[:MAX_LISTED]
            kinds = [f'{number:,} {printable(extension)}' for extension, number in largest]
            more = ', …' if len(self.others) > MAX_LISTED else ''
            items += [f"{pluralize(self.others.total(), 'other file')} ({', '.join(kinds)}{more})"]
        if self.repeated:
            items += [f"{pluralize(len(self.repeated), 'link')} to images that come by another path "
                      f'({printable(self.repeated[0])})']
        if self.unreadable:
            items += [f"{pluralize(len(self.unreadable), 'unreadable folder')} ({self.unreadable[0]})"]
        return ', '.join(items)


def find_images(paths: Iterable[str]) -> FoundImages:
    """Find the image files among files and in folders.

    A file that is named is taken whatever its extension. A folder is searched by `walk`; its files are sorted by code
    point. A file with several paths comes once.

    Args:
        paths: Files and folders.

    Raises:
        InputError: If a path does not exist, is a pipe or device, or there is no image.
    """
    paths, found, extensions = list(paths), FoundImages(), image_extensions()
    files: dict[str, str] = {}  # real path -> path as found
    searched: set[str] = set()
    for path in paths:
        if os.path.isdir(path):
            new = walk(path, extensions, found, searched)
            for real, file in sorted(new.items(), key=lambda item: item[1].split(os.sep)):
                files.setdefault(real, file)
        elif os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path)):  # a broken link is an image too
            files.setdefault(os.path.realpath(path), path)
        else:
            expected = 'not a regular file' if os.path.exists(path) else 'no such file or folder'
            raise InputError(f'{printable(path)}: {expected}')
    if not files:
        raise no_image(f"{printable(paths[0])}{' …' if len(paths) > 1 else ''}", found, extensions)
    found.files = list(files.values())
    return found


def no_image(where: str, found: FoundImages, extensions: Collection[str]) -> InputError:
    """Error for folders without images, after `where`."""
    but = f' but {found.passed_over()}' if found.passed_over() else ''
    return InputError(f'{where}: found no image{but}, expected {some_extensions(extensions)}')


def some_extensions(extensions: Collection[str]) -> str:
    """Words for the extensions of images, the usual ones if there are many."""
    if len(extensions) <= MAX_LISTED:
        return ' or '.join(sorted(extensions))
    return f"{', '.join(USUAL)} or another of Pillow's {len(extensions)} extensions"


@lru_cache(1)
def image_extensions() -> frozenset[str]:
    """Extensions in lower case of the formats that Pillow can open."""
    known = Image.registered_extensions().items()
    readable = {*Image.OPEN, 'MPO'} - ONLY_IDENTIFIED  # MPO, of cameras with two lenses, is opened as a JPEG
    return frozenset(extension.lower() for extension, name in known if name in readable)


def walk(
        folder: str, extensions: Collection[str], found: FoundImages, searched: set[str] | None = None) -> dict[str, str]:
    """Search a folder and its subfolders for image files.

    Links are followed. A file or folder with several paths comes once, by the path without links if there is one, so
    that circles end. Pipes and devices are no images; a link to nothing is one, which cannot be read.

    Args:
        folder: Root.
        extensions: Extensions of images, in lower case.
        found: Counts the other entries.
        searched: Real paths of folders that are not searched again; extended.

    Returns:
        Real path -> path below `folder`, in no particular order.
    """
    files: dict[str, str] = {}
    searched = set() if searched is None else searched
    folders, links = [folder], deque()
    while folders or links:
        is_link = not folders
        path = links.popleft() if is_link else folders.pop()
        if is_link and not os.path.isdir(path):
            real = os.path.realpath(path)
            if _extension(path) not in extensions or (os.path.exists(path) and not os.path.isfile(path)):
                found.others[_extension(path)] += 1
            elif files.setdefault(real, path) != path:
                found.repeated.append(f'{path} = {files[real]}')
            continue
        real = os.path.realpath(path)
        if real in searched:
            found.repeated += [f'{path} = {real}'] * is_link
            continue
        searched.add(real)
        try:
            with os.scandir(path) as scanned:
                entries = list(scanned)
        except OSError as error:
            found.unreadable.append(printable(f'{path}: {error.strerror or first_line(error)}'))
            continue
        before = len(files), len(folders), len(links)
        for entry in entries:
            name, extension = entry.name, _extension(entry.name)
            if name[0] == '.' or name.lower() in SYSTEM_NAMES:
                found.hidden += 1
            elif extension in extensions and entry.is_file(follow_symlinks=False):  # no pipe, which would block the reader
                files[f'{real}{os.sep}{name}'] = entry.path
            elif entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                folders.append(entry.path)
            else:
                found.others[extension] += 1
        if before == (len(files), len(folders), len(links)):
            found.empty.append(path)
    return files


def _extension(path: str) -> str:
    stem, dot, extension = path.rpartition('.')
    return f'.{extension.lower()}' if stem and os.sep not in extension else 'without extension'
