"""Training augmentation: several views of an image from one decoding, by timm's transforms."""
import random
from collections.abc import Callable, Sequence

from PIL import Image
from timm.data import create_transform
from timm.data.transforms import (
    MaybePILToTensor,
    RandomResizedCropAndInterpolation,
    interp_mode_to_str,
    str_to_pil_interp,
)
from torch import Tensor
from torchvision import transforms

from glmc.config import VIEWS
from glmc.data.datasets import to_mode

CIFAR_PADDING = 4
# GLMC's published ImageNet-LT augmentation in timm's terms.
IMAGENET_LT = dict(
    scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), color_jitter=0.4, color_jitter_prob=None, grayscale_prob=0.2,
    gaussian_blur_prob=0.5, interpolation='bilinear')
# Pixel by pixel, so that they may come before or after a resize.
COLOUR = (transforms.ColorJitter, transforms.RandomGrayscale, transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)


def view_transform(
        img_size: tuple[int, int], augmentation: str = 'timm', hflip: float = 0.5, no_aug: bool = False,
        aug_views: str = 'both', **kwargs) -> Callable[[Image.Image, int, str], list[Tensor]]:
    """Opened image, number of views, PIL mode -> that many uint8 tensors (c, H, W).

    Args:
        img_size: (H, W) in pixels.
        augmentation: `timm` by `kwargs` of `timm.data.create_transform`; `cifar`: random crop with padding 4, flip and
            `auto_augment`, after a resize where the image has another size; `imagenet_lt`.
        hflip: Probability of a horizontal flip.
        no_aug: Resize and centre crop only.
        aug_views: Which of two views `auto_augment` is for: `both`, or one of VIEWS.
    """
    if aug_views != 'both' and kwargs.get('auto_augment') and not no_aug:
        policies = [kwargs['auto_augment'] if view == aug_views else None for view in VIEWS]
        return EachView([view_transform(img_size, augmentation, hflip, **{**kwargs, 'auto_augment': policy})
                         for policy in policies])
    if augmentation == 'cifar' and not no_aug:
        return Views(transforms.Compose([
            transforms.Resize(img_size), transforms.RandomCrop(img_size, padding=CIFAR_PADDING),
            transforms.RandomHorizontalFlip(hflip), *policy_transforms(img_size, **kwargs), MaybePILToTensor()]))
    if augmentation == 'imagenet_lt':
        kwargs = {**kwargs, **IMAGENET_LT}
    transform = create_transform(img_size, is_training=True, hflip=hflip, no_aug=no_aug, use_prefetcher=True, **kwargs)
    crop, *others, last = transform.transforms
    if isinstance(crop, RandomResizedCropAndInterpolation) and isinstance(last, MaybePILToTensor):
        return CroppedViews(crop, others)
    return Views(transform)


def policy_transforms(img_size: tuple[int, int], auto_augment: str | None = None, **kwargs) -> list[Callable]:
    """timm's AutoAugment, RandAugment or AugMix, PIL image -> PIL image, as `create_transform` sets it up; or nothing."""
    if not auto_augment:
        return []
    known = {name: kwargs[name] for name in ('mean', 'interpolation') if name in kwargs}
    _, policy, _ = create_transform(
        img_size, is_training=True, separate=True, color_jitter=None, auto_augment=auto_augment, **known)
    return policy.transforms


class EachView:
    """A transform of its own for each view, on the decoded image.

    Args:
        makers: As of `view_transform`, in the order of VIEWS.
    """

    def __init__(self, makers: Sequence[Callable]):
        self.makers = makers

    def __call__(self, image: Image.Image, num_views: int, mode: str) -> list[Tensor]:
        if num_views != len(self.makers):
            raise ValueError(f'aug_views needs {len(self.makers)} views of an image, got {num_views}')
        image = to_mode(image, mode)  # whole: what one view can do with fewer pixels, the next may not
        return [view for make_views in self.makers for view in make_views(image, 1, mode)]


class Views:
    """The same transform on the decoded image for every view."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image, num_views: int, mode: str) -> list[Tensor]:
        image = to_mode(image, mode)
        return [self.transform(image) for _ in range(num_views)]


class CroppedViews:
    """timm's random resized crop, drawn before the image is decoded, then its other transforms.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where every view's crop still has the pixels it needs; flips and colours are
    changed before the resize where the crop has fewer pixels than the view, and after it otherwise.

    Args:
        crop: timm's, for its size, scale, ratio and interpolation.
        others: The transforms between it and the tensor.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, others: Sequence[Callable]):
        self.crop = crop
        self.size = tuple(crop.size)  # (H, W)
        modes = crop.interpolation if isinstance(crop.interpolation, (tuple, list)) else [crop.interpolation]
        self.interpolations = [str_to_pil_interp(interp_mode_to_str(mode)) for mode in modes]
        self.others = transforms.Compose(others)
        self.commutes = all(isinstance(_inner(other), COLOUR) for other in others)
        self.to_tensor = MaybePILToTensor()

    def __call__(self, image: Image.Image, num_views: int, mode: str) -> list[Tensor]:
        width, height = image.size
        boxes = [self.crop.get_params(image, self.crop.scale, self.crop.ratio) for _ in range(num_views)]
        boxes = [(y, x, max(h, 1), max(w, 1)) for y, x, h, w in boxes]  # of an image one pixel wide timm crops none
        need = max(max(self.size[0] / h, self.size[1] / w) for _, _, h, w in boxes)
        if need <= 0.5 and image.format == 'JPEG':
            image.draft(mode, (int(width * need) + 1, int(height * need) + 1))
        image = to_mode(image, mode)
        scale_x, scale_y = image.width / width, image.height / height
        return [self._view(image, (x * scale_x, y * scale_y, (x + w) * scale_x, (y + h) * scale_y))
                for y, x, h, w in boxes]

    def _view(self, image: Image.Image, box: tuple[float, ...]) -> Tensor:
        """One view from the box (left, upper, right, lower) of the decoded image."""
        resample = random.choice(self.interpolations) if len(self.interpolations) > 1 else self.interpolations[0]
        height, width = self.size
        crop = image.crop(tuple(map(round, box)))
        if self.commutes and crop.width * crop.height < width * height:
            return self.to_tensor(self.others(crop).resize((width, height), resample))
        return self.to_tensor(self.others(crop.resize((width, height), resample)))


def _inner(transform: Callable) -> Callable:
    """What a RandomApply applies."""
    if isinstance(transform, transforms.RandomApply) and len(transform.transforms) == 1:
        return transform.transforms[0]
    return transform
