"""Scan an image set before training: unreadable images, duplicates, unusual formats, and the command to run next.

    python -m glmc.data.check my_images
    python -m glmc.data.check --train-list train.txt --val-list test.txt --data-dir images

The scan takes the data options of train_glmc.py, decodes every image once and changes nothing. The exit code is 1 if an
image cannot be decoded, is in two sets or has two labels.
"""
import hashlib
import logging
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from glmc.cli import Options, Progress, pick, run_script, show_help
from glmc.config import DATA, as_words, check_parser, has_data, names

if __name__ == '__main__':
    show_help(check_parser)  # before the imports that take seconds
# isort: split
import numpy as np
from torch.utils.data import DataLoader, Dataset

from glmc.data.advice import advise, measure
from glmc.data.datasets import ImageSet
from glmc.data.profiles import Profile, classes_without_images, pluralize
from glmc.data.sources import TrainingData, load_training_data
from glmc.errors import ImageError, InputError, printable

ORIENTATION = 0x112  # EXIF
MAX_LISTED = 10  # findings of each kind
NOTES = {  # attribute of ScanResult -> the images and how training and evaluation handle them
    'rotated': 'with an EXIF rotation, which is ignored, as in timm',
    'animated': 'with several frames, of which the first is used',
    'small': 'with a side of less than 8 pixels, which is enlarged',
}


class ScanResult(NamedTuple):
    """Result of decoding one image.

    Args:
        error: Error line, or empty.
        digest: SHA-256 of mode, size and pixels.
        format: File format and mode, e.g. `PNG RGB`.
        side: Shorter side in pixels.
        rotated: Whether an EXIF tag asks for a rotation or a flip.
        animated: Whether the file has several frames.
    """
    error: str = ''
    digest: bytes = b''
    format: str = ''
    side: int = 0
    rotated: bool = False
    animated: bool = False

    @property
    def small(self) -> bool:
        """Whether a side has less than 8 pixels."""
        return self.side < 8


class _ScanDataset(Dataset):
    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ScanResult:
        try:
            with self.images.opened(index) as image:
                file_format = f"{image.format or 'raw'} {image.mode}"
                animated = getattr(image, 'n_frames', 1) > 1
                rotated = image.getexif().get(ORIENTATION, 1) not in (0, 1)
                image.load()
                digest = hashlib.sha256(f'{image.mode} {image.size}'.encode() + image.convert('RGBA').tobytes()).digest()
                return ScanResult('', digest, file_format, min(image.size), rotated, animated)
        except ImageError as error:
            return ScanResult(error=str(error))


def scan(images: ImageSet, workers: int = 0) -> list[ScanResult]:
    """Decode every image once.

    Args:
        images: N images.
        workers: Processes that decode; 0 for the calling process.

    Returns:
        N results in the order of the set.
    """
    results = []
    with Progress(len(images), name='data check') as progress:
        for result in DataLoader(_ScanDataset(images), batch_size=None, num_workers=workers):
            results.append(result)
            progress.update()
    return results


def readable_subset(images: ImageSet, workers: int = 0) -> tuple[ImageSet, list[str]]:
    """Scan a set; returns the images that can be decoded, and the error lines of the others."""
    results = scan(images, workers)
    keep = [index for index, result in enumerate(results) if not result.error]
    return images.subset(np.array(keep)), [result.error for result in results if result.error]


def main() -> None:
    args = check_parser().parse_args()
    logging.basicConfig(format='%(message)s')
    logging.getLogger('glmc').setLevel(logging.INFO)
    args.data_dir = args.data_dir or args.folder
    data = load_training_data(**pick(args, names(*DATA)))
    sets = {name: images for name, images in (('train', data.train), ('holdout', data.holdout),
                                              ('validation', data.validation)) if images is not None}
    if not all(isinstance(images, ImageSet) for images in sets.values()):
        raise InputError(f'--dataset {args.dataset}: has no index and cannot be scanned; expected image folders, a list, '
                         'torch/NAME or hfds/NAME')
    results = {name: scan(images, args.workers) for name, images in sets.items()}
    problems = list(find_problems(sets, results))
    lines = [*describe(data, sets), '', *describe_images(results), '', *(problems or ['no problems found']), '',
             *final_advice(args, data.profile, results['train'])]
    print('\n'.join(map(printable, lines)))
    if problems:
        sys.exit(1)


def describe(data: TrainingData, sets: dict[str, ImageSet]) -> Iterable[str]:
    """Lines on the class counts of each set, and on classes that cannot be evaluated."""
    counts = data.profile.counts
    yield f'train: {data.profile.summary()}, imbalance {max(counts) / min(counts):.3g}'
    for name, images in sets.items():
        if name == 'train':
            continue
        counts = images.counts()
        yield f"{name}: {pluralize(len(images), 'image')}, {counts.max():,} … {counts.min():,} per class"
        missing = classes_without_images(counts, data.class_names)
        if missing:
            yield f'{name}: {missing}'


def describe_images(results: dict[str, list[ScanResult]]) -> Iterable[str]:
    """Lines on the file formats, and on unusual images that can be decoded."""
    decoded = [result for found in results.values() for result in found if not result.error]
    formats = Counter(result.format for result in decoded).most_common()
    yield 'formats: ' + ', '.join(shorten([f'{number:,} {name}' for name, number in formats]))
    for attribute, note in NOTES.items():
        number = sum(getattr(result, attribute) for result in decoded)
        if number:
            yield f"{pluralize(number, 'image')} {note}"


def find_problems(sets: dict[str, ImageSet], results: dict[str, list[ScanResult]]) -> Iterable[str]:
    """Lines on unreadable images, and on equal pixels in two sets or with two labels; each image has one indented line."""
    places = defaultdict(list)  # digest -> (name of the set, index) of the images with these pixels
    for name, found in results.items():
        start = f'{sets[name].source}: cannot decode image '
        errors = [result.error.removeprefix(start) for result in found if result.error]
        yield from _section(f"{name}: {pluralize(len(errors), 'image')} that cannot be decoded "
                            '(--on-bad-image skip trains without them)', errors)
        for index, result in enumerate(found):
            if not result.error:
                places[result.digest].append((name, index))
    copies = [group for group in places.values() if len(group) > 1]
    for heading, keys in (
            ('in more than one set (the measured accuracy is too high)', lambda name, index: name),
            ('with more than one label', lambda name, index: int(sets[name].labels[index]))):
        groups = [group for group in copies if len({keys(*place) for place in group}) > 1]
        yield from _section(f"{pluralize(len(groups), 'image')} {heading}", [
            ' = '.join(f'{name} {sets[name].names[index]}' for name, index in group[:4]) for group in groups])


def _section(heading: str, lines: Sequence[str]) -> list[str]:
    return [f'{heading}:', *(f'    {line}' for line in shorten(lines))] if lines else []


def shorten(items: Sequence[str]) -> list[str]:
    """The first `MAX_LISTED` items, then the number of the others."""
    more = len(items) - MAX_LISTED
    return [*items[:MAX_LISTED], *([f'{more:,} more'] if more > 0 else [])]


def final_advice(args: Options, profile: Profile, results: Sequence[ScanResult]) -> Iterable[str]:
    """Lines of advice, and the commands to run next, with the data options of this command.

    Args:
        args: Options of `check_parser`.
        profile: Profile of the training images.
        results: Results of the training set.
    """
    parser, words = check_parser(), []
    for name in names(*DATA):
        value = getattr(args, name)
        if value != parser.get_default(name):
            words += as_words(name, value)
    advice = advise(profile, [result.side for result in results if not result.error], default_data=not has_data(args))
    if args.shot_thresholds == parser.get_default('shot_thresholds'):
        words += advice.data
    yield from ('advice:', *(f'    {line}' for line in advice.lines))
    if args.measure:
        yield f'    {measure(advice, words, profile.num_images)}'
    else:
        yield '    time and memory: --measure trains three steps'
    train = shlex.join(['accelerate', 'launch', 'train_glmc.py', *advice.training, *words])
    if advice.photos:
        yield 'next: classifiers on the features of a pretrained model, then training of the whole model:'
        yield shlex.join(['python', 'finetune_glmc.py', '--model', 'resnet50', *words])
    else:
        yield 'next: training from scratch:'
    yield train


if __name__ == '__main__':
    sys.exit(run_script(main))
