"""Look at an image set before it is trained on: what cannot be read, what is there twice, what to set.

    python -m glmc.data.check my_images
    python -m glmc.data.check --train-list train.txt --val-list test.txt --data-dir images

Takes the data options of train_glmc.py, decodes every image once, and changes nothing. Exit code 1 if an image cannot be
read, stands in training and validation, or is there with two labels.
"""
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from glmc.cli import Parser, pick, run_script
from glmc.config import DATA, add_groups, names
from glmc.data.datasets import ImageSet
from glmc.data.profiles import Profile
from glmc.data.sources import TrainingData, load_training_data
from glmc.errors import ImageError, InputError

ORIENTATION = 0x112  # EXIF
SHOWN = 10  # of each kind of finding


class ScanResult(NamedTuple):
    """What decoding an image showed."""
    error: str = ''
    digest: bytes = b''  # of mode, size and pixels
    kind: str = ''  # format and mode, as PNG RGB
    small: bool = False  # a side of less than 8 pixels
    rotated: bool = False  # by EXIF, which training ignores, as timm does
    animated: bool = False


class _Scan(Dataset):
    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple:
        return tuple(self.look(index))

    def look(self, index: int) -> ScanResult:
        try:
            with self.images.opened(index) as image:
                kind, animated = f"{image.format or 'raw'} {image.mode}", getattr(image, 'n_frames', 1) > 1
                rotated = image.getexif().get(ORIENTATION, 1) not in (0, 1)
                image.load()
                digest = hashlib.sha256(f'{image.mode} {image.size}'.encode() + image.convert('RGBA').tobytes()).digest()
                return ScanResult('', digest, kind, min(image.size) < 8, rotated, animated)
        except ImageError as error:
            return ScanResult(error=str(error))


def scan(images: ImageSet, workers: int = 0) -> list[ScanResult]:
    """Decode every image once."""
    loader = DataLoader(_Scan(images), batch_size=None, num_workers=workers)
    return [ScanResult(*look) for look in loader]


def readable_subset(images: ImageSet, workers: int = 0) -> tuple[ImageSet, list[str]]:
    """The images that can be decoded, and the errors of the others."""
    looks = scan(images, workers)
    keep = [index for index, look in enumerate(looks) if not look.error]
    return images.subset(np.array(keep)), [look.error for look in looks if look.error]


def main() -> None:
    parser = Parser(prog='python -m glmc.data.check',
                    description='Scan an image set before training on it.')
    parser.add_argument('folder', nargs='?', metavar='DIR', help='the same as --data-dir DIR')
    add_groups(parser, *DATA)
    parser.add_argument('-j', '--workers', type=int, default=2, help='processes that decode')
    args = parser.parse_args()
    args.data_dir = args.data_dir or args.folder
    data = load_training_data(**pick(args, names(*DATA)))
    sets = {name: images for name, images in (('train', data.train), ('holdout', data.holdout),
                                              ('validation', data.validation)) if images is not None}
    if not all(isinstance(images, ImageSet) for images in sets.values()):
        raise InputError(f'--dataset {args.dataset}: cannot be scanned, it has no index')
    looks = {name: scan(images, args.workers) for name, images in sets.items()}
    problems = list(find_problems(sets, looks))
    print('\n'.join([*describe(data, sets), '', *remarks(looks), *problems, '', *suggest(data.profile)]))
    if problems:
        sys.exit(1)


def describe(data: TrainingData, sets: dict[str, ImageSet]) -> Iterable[str]:
    """The profile, and classes that are missing on one side."""
    counts, names = data.profile.counts, data.class_names
    yield f'train: {data.profile.summary()}, imbalance {max(counts) / min(counts):.3g}'
    for name, images in list(sets.items())[1:]:
        held = images.counts()
        yield f'{name}: {len(images):,} images, {held.max():,} … {held.min():,} per class'
        missing = [str(names[c]) for c in np.flatnonzero(held == 0)]
        if missing:
            yield f'{name}: no image of {_some(missing)}; their accuracy cannot be measured'


def remarks(looks: dict[str, list[ScanResult]]) -> Iterable[str]:
    """What is decided for unusual images, where there are any."""
    everything = [look for found in looks.values() for look in found if not look.error]
    yield 'kinds: ' + ', '.join(f'{n:,} {kind}' for kind, n in Counter(look.kind for look in everything).most_common(SHOWN))
    for attribute, remark in (
            ('rotated', 'turned by an EXIF tag, which is ignored in training and evaluation, as timm does'),
            ('animated', 'with several frames, of which the first is taken'),
            ('small', 'with a side of less than 8 pixels, which are enlarged')):
        number = sum(getattr(look, attribute) for look in everything)
        if number:
            yield f'{number:,} images {remark}'


def find_problems(sets: dict[str, ImageSet], looks: dict[str, list[ScanResult]]) -> Iterable[str]:
    """Unreadable images, and the same pixels in two sets or under two labels."""
    places = defaultdict(list)
    for name, found in looks.items():
        broken = [look.error for look in found if look.error]
        if broken:
            yield f'{name}: {len(broken):,} images cannot be decoded (--on-bad-image skip trains without them):'
            yield from (f'    {error}' for error in broken[:SHOWN])
        for index, look in enumerate(found):
            if not look.error:
                places[look.digest].append((name, index))
    twice = [found for found in places.values() if len(found) > 1]
    yield from _duplicates(sets, [found for found in twice if len({name for name, _ in found}) > 1],
                           'stand in more than one set, so that the evaluation is too good')
    yield from _duplicates(sets, [found for found in twice if len({int(sets[name].labels[k]) for name, k in found}) > 1],
                           'are there with different labels')


def _duplicates(sets: dict[str, ImageSet], groups: Sequence[list], what: str) -> Iterable[str]:
    if groups:
        yield f'{len(groups):,} images {what}:'
        for found in groups[:SHOWN]:
            yield '    ' + ' = '.join(f'{name} {sets[name].names[index]}' for name, index in found[:4])


def suggest(profile: Profile) -> Iterable[str]:
    """Options for this profile, by the published recipes."""
    counts = np.array(profile.counts)
    imbalance = counts.max() / counts.min()
    if imbalance < 1.5:
        yield 'suggestion: --balanced, the classes have about the same number of images'
        return
    q = 0 if imbalance >= 100 else 0.2
    yield (f'suggestion: --resample-power {q} --reweight-power 1 (published: q 0 at an imbalance of 100, 0.2 below and for '
           'ImageNet-LT and iNaturalist; k 1.2 for CIFAR, 1 elsewhere)')
    if not all(len(classes) for classes in profile.groups().values()) and len(counts) >= 3:
        few, many = (int(t) for t in np.quantile(counts, (1 / 3, 2 / 3)))
        yield f'suggestion: --shot-thresholds {few} {many}, thirds of the classes: one of the usual groups is empty'


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:SHOWN]) + (f' and {len(names) - SHOWN} more' if len(names) > SHOWN else '')


if __name__ == '__main__':
    sys.exit(run_script(main))
