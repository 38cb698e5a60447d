"""Predict the classes of images with a trained model, as a CSV.

    python -m glmc.predict output/RUN my_photos
    python -m glmc.predict hf-hub:ORG/NAME a.jpg b.png --output -
    python -m glmc.predict output/RUN my_photos --threshold 0.5 --target-prior uniform --flip-tta

Columns: file, label, probability, then label_2, probability_2 … of the next classes; `uncertain` with --threshold: the class
of an image below it, whose label is empty; `error` of an image that cannot be read. File names are exact, byte by byte.
A spreadsheet would execute a cell that starts with = + - or @: such a file is written as ./NAME, a label as 'LABEL.
"""
import csv
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from glmc.cli import Options, Progress, parse_args, run_script, show_help
from glmc.config import PRECISIONS, Need, predict_parser, unused_options

if __name__ == '__main__':
    show_help(predict_parser)  # before the imports that take seconds
# isort: split
import torch
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor
from torch.utils.data import Dataset

from glmc.data.datasets import to_mode
from glmc.data.loaders import create_normalize, data_loader, eval_transform, image_mode, larger_input, prefetched
from glmc.data.profiles import pluralize
from glmc.data.walk import find_images
from glmc.errors import InputError, RunError, first_line, printable
from glmc.evaluation.priors import AdjustedModel, resolve_shift
from glmc.export.load import TrainedModel, check_model, load_trained, trained_precision, training_counts
from glmc.files import atomic_write
from glmc.models.classifier import float32_classifier
from glmc.run_folder import spreadsheet_safe
from glmc.training.launch import create_accelerator, is_main_process

_logger = logging.getLogger('glmc.predict')
STDOUT = '-'  # --output
LISTED_CLASSES = 10  # classes in the summary
ADJUSTMENT_NEEDS = (
    Need(('source_prior', 'class_counts'), 'without --target-prior', lambda o: o.target_prior),
    Need(('target_imbalance',), 'without --target-prior forward or backward',
         lambda o: o.target_prior in ('forward', 'backward')),
    Need(('amp',), 'with --amp-dtype', lambda o: not o.amp_dtype))


# --- as a library ---


def predict(
        trained: TrainedModel, files: Sequence[str], *, batch_size: int = 64, workers: int = 2, shift: Tensor | None = None,
        flip_tta: bool = False, crop_tta: bool = False, accelerator: Accelerator | None = None) -> Tensor:
    """Predict class probabilities.

    Args:
        trained: Model of `load_trained`.
        files: N image files, e.g. of `find_images(paths).files`.
        batch_size: Images per batch.
        workers: Processes that decode; 0 for the calling process.
        shift: (C,) adjustment of the logits to another class prior, by `resolve_shift`.
        flip_tta: Average the logits of image and mirror image.
        crop_tta: Average the logits of the centre and the corners.
        accelerator: Device and precision; default: Accelerate's.

    Returns:
        (N, C) float32 on the CPU; a row of nan for an image that cannot be read.

    Raises:
        InputError: If the model is no classifier of images of its input size.
    """
    batches = predict_batches(
        trained, files, batch_size=batch_size, workers=workers, shift=shift, flip_tta=flip_tta,
        crop_tta=crop_tta, accelerator=accelerator or Accelerator())
    return torch.cat([torch.zeros(0, trained.num_classes), *(probabilities for probabilities, _ in batches)])


def predict_batches(
        trained: TrainedModel, files: Sequence[str], *, accelerator: Accelerator, batch_size: int, workers: int,
        shift: Tensor | None = None, flip_tta: bool = False, crop_tta: bool = False) -> Iterator[tuple[Tensor, list[str]]]:
    """Predict class probabilities batch by batch, in the order of the files; arguments as those of `predict`.

    The encoder computes in the accelerator's precision, the classifier and the softmax in float32.

    Yields:
        (B, C) float32 probabilities on the CPU, and B error lines; an error line is empty or its row is nan.
    """
    check_model(trained)
    device = accelerator.device
    data_config = larger_input(trained.data_config) if crop_tta else trained.data_config
    model = AdjustedModel(trained.model, shift, flip_tta, crop_tta and trained.data_config['input_size'][-2:])
    model = model.to(device, memory_format=torch.channels_last).eval()
    normalize = create_normalize(data_config, device)
    loader = data_loader(ImageFiles(files, data_config), workers, device, seed=0, batch_size=batch_size)
    errors_ahead = deque()

    def images() -> Iterator[tuple[Tensor]]:
        for batch, errors in loader:
            errors_ahead.append(list(errors))
            yield (batch,)
    for (batch,) in prefetched(images(), device):
        with torch.inference_mode(), accelerator.autocast(), float32_classifier(model):  # not while the caller runs
            probabilities = model(normalize(batch)).float().softmax(-1).cpu()
        errors = errors_ahead.popleft()
        errors = [error or ('' if ok else 'the output of the model is not finite')
                  for error, ok in zip(errors, probabilities.isfinite().all(1).tolist(), strict=True)]
        yield probabilities.where(torch.tensor([[not error] for error in errors]), torch.nan), errors


class ImageFiles(Dataset):
    """Image files by timm's evaluation transform.

    Args:
        files: N paths.
        data_config: timm's data config.
    """

    def __init__(self, files: Sequence[str], data_config: dict):
        self.files, self.mode, self.transform = files, image_mode(data_config), eval_transform(data_config)
        self.black = torch.zeros(data_config['input_size'], dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """(c, H, W) uint8 image and an empty text, or a black image and an error line."""
        try:
            with Image.open(self.files[index]) as image:
                return self.transform(to_mode(image, self.mode)), ''
        except UnidentifiedImageError:  # its text is the path
            return self.black, 'not an image that Pillow can read'
        except Exception as error:  # Pillow's plugins raise anything for a damaged file
            return self.black, printable(getattr(error, 'strerror', None) or first_line(error))


def class_names(trained: TrainedModel) -> list[str]:
    """C class names: the model's, ImageNet's for a timm model with as many classes, else 0…C-1."""
    subset = None if trained.metadata else infer_imagenet_subset(trained.model)
    names = trained.class_names or (subset and ImageNetInfo(subset).label_descriptions()) or range(trained.num_classes)
    return [str(name).encode('utf-8', 'replace').decode() for name in names]  # JSON may contain half a character


# --- python -m glmc.predict ---


def main() -> None:
    args, explicit = parse_args(predict_parser())
    found = find_images(args.files)
    check_output(args.output, found.files)
    trained = load_trained(args.model, data_options={'img_size': args.img_size}, num_classes=None, img_size=args.img_size,
                           in_chans=getattr(args, 'in_chans', None))
    accelerator = create_accelerator(args.amp, args.amp_dtype or trained_precision(trained, args.amp))
    if accelerator.num_processes > 1:
        raise InputError(f'glmc.predict: found {accelerator.num_processes} processes, expected one')
    for warning in unused_options(args, explicit, ADJUSTMENT_NEEDS):
        _logger.warning(warning)
    if found.passed_over():
        _logger.info(f'Passed over: {found.passed_over()}')
    height, width = trained.data_config['input_size'][-2:]
    _logger.info(f"Predicting {pluralize(len(found.files), 'image')} with {printable(args.model)}: {trained.architecture}, "
                 f"{pluralize(trained.num_classes, 'class')}, {height}x{width} pixels, "
                 f'{PRECISIONS.get(accelerator.mixed_precision)} on {accelerator.device.type}')
    batches = predict_batches(
        trained, found.files, accelerator=accelerator, batch_size=args.batch_size, workers=args.workers,
        shift=logit_shift(args, trained), flip_tta=args.flip_tta, crop_tta=args.crop_tta)
    names, start = class_names(trained), time.perf_counter()
    with open_output(args.output) as file:
        tally = write_predictions(file, found.files, batches, names, args.topk, args.threshold)
    report(args, tally, names, time.perf_counter() - start)
    if len(tally.failed) == len(found.files):
        raise RunError(f'{printable(args.files[0])}: no image can be read; see column error')


def logit_shift(args: Options, trained: TrainedModel) -> Tensor | None:
    """Return the (C,) shift of the logits for `--target-prior`, or None without it."""
    if not args.target_prior:
        return None
    return resolve_shift(args.target_prior, args.source_prior or trained.metadata.get('prior', 'train'),
                         training_counts(trained, args.class_counts), args.target_imbalance)


def check_output(output: str, files: Sequence[str]) -> None:
    """Raise an InputError, before the model is loaded, if the CSV cannot be written or would replace an image."""
    if output == STDOUT:
        return
    path = Path(output)
    if path.exists() and not path.is_file():
        raise InputError(f'--output {output}: not a regular file, expected a file, or - for standard output')
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f'--output {output}: cannot write to the folder {path.parent}')
    if any(os.path.realpath(file) == os.path.realpath(path) for file in files if os.path.basename(file) == path.name):
        raise InputError(f'--output {output}: is one of the images, expected another file')


@contextmanager
def open_output(output: str) -> Iterator[TextIO]:
    """Open the CSV, which replaces an earlier one when it is complete; file names are written byte by byte.

    Raises:
        RunError: If it cannot be written, or memory runs out meanwhile; an earlier file is kept.
    """
    text = dict(encoding='utf-8', errors='surrogateescape', newline='')
    try:
        if output == STDOUT:
            sys.stdout.reconfigure(**text)
            yield sys.stdout
            sys.stdout.flush()
        else:
            with atomic_write(Path(output)) as temporary, open(temporary, 'w', **text) as file:
                yield file
    except BrokenPipeError as error:
        raise RunError('--output -: the reader has closed standard output') from error
    except torch.OutOfMemoryError as error:
        raise RunError(f'out of memory: {first_line(error)}; use a smaller --batch-size') from error
    except OSError as error:
        raise RunError(f'--output {output}: cannot be written: {error.strerror or first_line(error)}') from error


@dataclass
class Tally:
    """Numbers of the summary.

    Args:
        classes: Class -> images, without the uncertain ones.
        uncertain: Images below the threshold.
        failed: File and error of each image that was not predicted.
    """
    classes: Counter = field(default_factory=Counter)
    uncertain: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def write_predictions(
        file: TextIO, files: Sequence[str], batches: Iterable[tuple[Tensor, list[str]]], names: Sequence[str], topk: int = 5,
        threshold: float | None = None) -> Tally:
    """Write a CSV with one row per image, in the columns of the module's docstring.

    Args:
        file: Open for text, without translation of line ends.
        files: N paths.
        batches: Result of `predict_batches`.
        names: C class names.
        topk: Classes per row.
        threshold: Probability below which the label is empty; None for no threshold and no column `uncertain`.
    """
    k, tally = min(topk, len(names)), Tally()
    labels = list(map(spreadsheet_safe, names))
    shown = printable if file.isatty() else str  # a terminal would obey control characters
    writer = csv.writer(file)
    ranks = [f'{column}_{rank}' for rank in range(2, k + 1) for column in ('label', 'probability')]
    uncertain = [] if threshold is None else ['uncertain']
    writer.writerow(['file', 'label', 'probability', *ranks, *uncertain, 'error'])
    remaining = iter(files)
    with Progress(len(files), name='prediction') as progress:
        for probabilities, errors in batches:
            values, classes = (part[:, :k].tolist() for part in probabilities.sort(descending=True, stable=True))
            for error, p, top in zip(errors, values, classes, strict=True):
                name = next(remaining)
                path = spreadsheet_safe(name, f'.{os.sep}')
                cells = [cell for value, c in zip(p, top, strict=True) for cell in (labels[c], f'{value:.6f}')]
                below = threshold is not None and p[0] < threshold
                if error:
                    cells = [''] * len(cells)
                    tally.failed.append((name, error))
                elif below:
                    cells[0] = ''
                    tally.uncertain += 1
                else:
                    tally.classes[top[0]] += 1
                doubt = [labels[top[0]] if below and not error else ''] * len(uncertain)
                writer.writerow(map(shown, [path, *cells, *doubt, error]))
            progress.update(len(errors))
    return tally


def report(args: Options, tally: Tally, names: Sequence[str], seconds: float) -> None:
    """Log the number of images, the largest predicted classes, and the images without a label."""
    predicted = tally.classes.total() + tally.uncertain
    _logger.info(f"Predicted {pluralize(predicted, 'image')} in {seconds:.1f} s, {predicted / seconds:.0f} images/s")
    largest = tally.classes.most_common(LISTED_CLASSES)
    shown = [(printable(names[c]), number) for c, number in largest]
    others = len(tally.classes) - len(largest)
    if others:
        shown.append((pluralize(others, 'other class'), tally.classes.total() - sum(number for _, number in largest)))
    width = max((len(name) for name, _ in shown), default=0)
    for name, number in shown:
        _logger.info(f'  {name:{width}}  {number:>9,}  {100 * number / predicted:5.1f} %')
    if args.threshold is not None:
        _logger.info(f"Below --threshold {args.threshold:g}: {pluralize(tally.uncertain, 'image')} "
                     f'({100 * tally.uncertain / max(predicted, 1):.1f} %), without label, with column uncertain')
    if tally.failed:
        name, error = tally.failed[0]
        _logger.warning(f"Not predicted: {pluralize(len(tally.failed), 'image')}, see column error; the first: "
                        f'{printable(name)}: {error}')
    if args.output != STDOUT:
        _logger.info(f'Written to {printable(args.output)}')


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv, exits=True))
