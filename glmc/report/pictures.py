"""Pictures of a report: the most confident mistakes and the training inputs."""
import base64
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glmc.data.datasets import ImageSet
from glmc.evaluation.metrics import Predictions
from glmc.training.engine import step_generator

HIDDEN = ('Cc', 'Cf', 'Cs', 'Co', 'Cn')  # Unicode's control, direction, unpaired and unassigned characters
JOINERS = '\u200c\u200d'  # of several scripts and of emoji
SIDE = 160  # longest side of a picture, in pixels
MAX_LENGTH = 60  # characters of a name in the report; per_class.csv and confused_pairs.csv contain it in full
PER_PAIR = 2  # pictures of mistakes with the same classes
SMALL = 64  # longest side, in pixels, of pictures that are enlarged without smoothing


@dataclass(frozen=True)
class Picture:
    """One or several images with a caption.

    Args:
        images: Images, shown one above the other.
        caption: First line of text.
        detail: Second line of text.
    """
    images: Sequence[Image.Image]
    caption: str
    detail: str = ''


def worst_mistakes(
        images: ImageSet, predictions: Predictions, class_names: Sequence[str], limit: int = 16) -> list[Picture]:
    """Return the misclassified images of the highest confidence, at most two of each pair of classes.

    The caption has the classes and the file name.

    Args:
        images: Evaluated images.
        predictions: Predictions of every image, in the order of `images`.
        class_names: C names.
        limit: Maximal number of pictures.
    """
    wrong = np.flatnonzero(predictions.labels != predictions.predicted)
    pictures, pairs = [], Counter()
    for index in wrong[np.argsort(-predictions.confidence[wrong], kind='stable')].tolist():
        if len(pictures) == limit:
            break
        pair = predictions.labels[index], predictions.predicted[index]
        pairs[pair] += 1
        if pairs[pair] > PER_PAIR:
            continue
        image = images.image(index)
        image.thumbnail((SIDE, SIDE))
        label, predicted = (class_names[c] for c in pair)
        caption = (f'{display_name(label)} predicted as {display_name(predicted)} '
                   f'({100 * predictions.confidence[index]:.0f} %)')
        pictures.append(Picture([image], caption, display_name(images.names[index], keep_end=True)))
    return pictures


def display_name(name, max_length: int = MAX_LENGTH, keep_end: bool = False) -> str:
    """Return a name on one line, shortened, with control characters and changes of direction replaced.

    Args:
        name: Any text or value.
        max_length: Maximal number of characters.
        keep_end: Shorten at the start, as for paths.
    """
    line = ' '.join(str(name).split())
    text = ''.join('\ufffd' if unicodedata.category(c) in HIDDEN and c not in JOINERS else c for c in line)
    if len(text) > max_length:
        text = f'…{text[1 - max_length:]}' if keep_end else f'{text[:max_length - 1]}…'
    return text or '(no name)'


@torch.no_grad()
def mixed_views(loader, mixer, class_names: Sequence[str], seed: int, epoch: int, limit: int = 8) -> list[Picture]:
    """Inputs of the net as training makes them, the global view above the local one.

    Args:
        loader: The training loader.
        mixer: The mixer of the method, on the loader's device.
        class_names: C names.
        seed, epoch: Seed and epoch of the random numbers.
        limit: Number of pictures, each with its own mixture.
    """
    views, labels, _ = next(loader.epoch(epoch))
    views, labels = views[:limit], labels[:limit]
    pictures = []
    for k in range(len(views)):
        params = mixer.sample_params(len(views), views.shape[-2:], step_generator(seed, epoch, k))
        inputs, targets = mixer(views, labels, params if params is None else params.to(views.device))
        inputs, targets = _as_tuple(inputs), _as_tuple(targets)
        targets = [target for target in targets if target.ndim > 1 or not target.is_floating_point()]  # no random numbers
        images = [to_image(image[k].float()) for image in inputs]
        names = ' | '.join(dict.fromkeys(describe_target(target[k], class_names) for target in targets))
        pictures.append(Picture(images, names))
    return pictures


def _as_tuple(value) -> tuple:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def to_image(pixels: Tensor) -> Image.Image:
    """Create a PIL image from (c, H, W) values in 0…255."""
    array = pixels.clamp(0, 255).round().to('cpu', torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    image.thumbnail((SIDE, SIDE))
    return image


def describe_target(target: Tensor, class_names: Sequence[str]) -> str:
    """Return the class of a label, or the two largest weights of a soft label with their classes.

    Args:
        target: Scalar class or (C,) class probabilities.
        class_names: C names.
    """
    if target.ndim == 0:
        return display_name(class_names[int(target)])
    weights, classes = target.float().topk(min(2, len(target)))
    return ' + '.join(
        f'{weight:.2f} × {display_name(class_names[c])}'
        for weight, c in zip(weights.tolist(), classes.tolist(), strict=True) if weight > 0.005)


def data_uri(image: Image.Image) -> str:
    """Encode an image for an HTML page: PNG up to SMALL pixels a side, JPEG above."""
    file, small = io.BytesIO(), max(image.size) <= SMALL
    image.save(file, 'PNG') if small else image.convert('RGB').save(file, 'JPEG', quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
