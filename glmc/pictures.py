"""Pictures of a report: what the net was most surely wrong about, and what it sees while it trains."""
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glmc.data.datasets import ImageSet
from glmc.engine import step_generator
from glmc.evaluation import Predictions

SIDE = 160  # longest side of a picture, in pixels
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
        images: ImageSet, predictions: Predictions, class_names: Sequence[str], limit: int = 12) -> list[Picture]:
    """The images that the model was surest about and wrong, with their file names."""
    wrong = np.flatnonzero(predictions.labels != predictions.predicted)
    chosen = wrong[np.argsort(-predictions.confidence[wrong], kind='stable')][:limit]
    return [_mistake(images, index, predictions, class_names) for index in chosen.tolist()]


def _mistake(images: ImageSet, index: int, predictions: Predictions, class_names: Sequence[str]) -> Picture:
    image = images.image(index)
    image.thumbnail((SIDE, SIDE))
    label, predicted = class_names[predictions.labels[index]], class_names[predictions.predicted[index]]
    confidence = 100 * predictions.confidence[index]
    return Picture([image], f'{label}, taken for {predicted} ({confidence:.0f} %)', str(images.names[index]))


@torch.no_grad()
def mixed_views(loader, mixer, class_names: Sequence[str], seed: int, epoch: int, limit: int = 8) -> list[Picture]:
    """Inputs of the net as training makes them: by its loader and its mixer, the global view above the local one.

    Args:
        loader: Of the training.
        mixer: Of the method.
        class_names: C names.
        seed, epoch: Whose random numbers are used.
        limit: Pictures, each from a mixture of its own.
    """
    loader.set_epoch(epoch)
    views, labels = next(iter(loader))
    views, labels = views[:limit], labels[:limit]
    pictures = []
    for k in range(len(views)):
        mixture = mixer.draw(len(views), views.shape[-2:], step_generator(seed, epoch, k))
        inputs, targets = mixer(views, labels, mixture if mixture is None else mixture.to(views.device))
        inputs, targets = _as_tuple(inputs), _as_tuple(targets)
        images = [to_image(_pixels(image[k], loader)) for image in inputs]
        names = ' | '.join(dict.fromkeys(describe_target(target[k], class_names) for target in targets))
        pictures.append(Picture(images, names))
    return pictures


def _as_tuple(value) -> tuple:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _pixels(image: Tensor, loader) -> Tensor:
    """(c, H, W) in 0…255; random erasing hands out normalised images."""
    normalize = getattr(getattr(loader, 'loader', None), 'normalize', None)
    return image.float() if normalize is None else image * normalize.std + normalize.mean


def to_image(pixels: Tensor) -> Image.Image:
    """PIL image of (c, H, W) values in 0…255."""
    array = pixels.clamp(0, 255).round().to('cpu', torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    image.thumbnail((SIDE, SIDE))
    return image


def describe_target(target: Tensor, class_names: Sequence[str]) -> str:
    """A label, or the two largest parts of a soft one."""
    if target.ndim == 0:
        return class_names[int(target)]
    weights, classes = target.float().topk(min(2, len(target)))
    parts = [f'{weight:.2f} {class_names[c]}' for weight, c in zip(weights.tolist(), classes.tolist(), strict=True)
             if weight > 0.005]
    return ' + '.join(parts)


def data_uri(image: Image.Image) -> str:
    """The image inside a page: lossless where it is small."""
    file, small = io.BytesIO(), max(image.size) <= SMALL
    image.save(file, 'PNG') if small else image.convert('RGB').save(file, 'JPEG', quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
