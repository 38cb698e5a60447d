"""Pictures of a report: what the net was most surely wrong about, and what it sees while it trains."""
import base64
import io
import unicodedata
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
LONGEST = 60  # characters of a name that are shown; the tables beside the report have it in full
SMALL = 64  # pictures up to this side are shown pixel by pixel


@dataclass(frozen=True)
class Picture:
    """Images that belong together, and what they are.

    Args:
        images: One above the other.
        caption: First line.
        detail: Second line.
    """
    images: Sequence[Image.Image]
    caption: str
    detail: str = ''


def worst_mistakes(
        images: ImageSet, predictions: Predictions, class_names: Sequence[str], limit: int = 16) -> list[Picture]:
    """The images that the model was surest about and wrong, with their file names."""
    wrong = np.flatnonzero(predictions.labels != predictions.predicted)
    chosen = wrong[np.argsort(-predictions.confidence[wrong], kind='stable')][:limit]
    return [_mistake(images, index, predictions, class_names) for index in chosen.tolist()]


def _mistake(images: ImageSet, index: int, predictions: Predictions, class_names: Sequence[str]) -> Picture:
    image = images.image(index)
    image.thumbnail((SIDE, SIDE))
    label, predicted = (shown(class_names[c]) for c in (predictions.labels[index], predictions.predicted[index]))
    confidence = 100 * predictions.confidence[index]
    caption = f'{label}, taken for {predicted} ({confidence:.0f} %)'
    return Picture([image], caption, shown(images.names[index], keep_end=True))


def shown(name, longest: int = LONGEST, keep_end: bool = False) -> str:
    """A name as a reader can take it: one line, not endless, nothing that turns the text around it."""
    line = ' '.join(str(name).split())
    text = ''.join('\ufffd' if unicodedata.category(c) in HIDDEN and c not in JOINERS else c for c in line)
    if len(text) > longest:
        text = f'…{text[1 - longest:]}' if keep_end else f'{text[:longest - 1]}…'
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
        images = [to_image(image[k].float()) for image in inputs]
        names = ' | '.join(dict.fromkeys(describe_target(target[k], class_names) for target in targets))
        pictures.append(Picture(images, names))
    return pictures


def _as_tuple(value) -> tuple:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def to_image(pixels: Tensor) -> Image.Image:
    """PIL image of (c, H, W) values in 0…255."""
    array = pixels.clamp(0, 255).round().to('cpu', torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    image.thumbnail((SIDE, SIDE))
    return image


def describe_target(target: Tensor, class_names: Sequence[str]) -> str:
    """A label, or the two largest parts of a soft one."""
    if target.ndim == 0:
        return shown(class_names[int(target)])
    weights, classes = target.float().topk(min(2, len(target)))
    parts = [f'{weight:.2f} {shown(class_names[c])}' for weight, c in zip(weights.tolist(), classes.tolist(), strict=True)
             if weight > 0.005]
    return ' + '.join(parts)


def data_uri(image: Image.Image) -> str:
    """The image inside a page: lossless where it is small."""
    file, small = io.BytesIO(), max(image.size) <= SMALL
    image.save(file, 'PNG') if small else image.convert('RGB').save(file, 'JPEG', quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
