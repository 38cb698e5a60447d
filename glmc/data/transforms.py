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

from glmc.data.datasets import to_mode

CIFAR_PADDING = 4
# GLMC's published ImageNet-LT augmentation in timm's terms.
IMAGENET_LT = dict(
    scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), color_jitter=0.4, color_jitter_prob=None, grayscale_prob=0.2,
    gaussian_blur_prob=0.5, interpolation='bilinear')
# They change pixels one by one, and may come before or after a resize.
COLOUR = (transforms.ColorJitter, transforms.RandomGrayscale, transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)


# Options of timm's transform in which the views of contrastive methods differ from a run's augmentation.
JITTERED = dict(augmentation='timm', auto_augment=None, color_jitter=0.4, color_jitter_prob=None, grayscale_prob=0.0,
                gaussian_blur_prob=0.0)
SIMCLR = dict(JITTERED, color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.8, grayscale_prob=0.2)
BLURRED = dict(SIMCLR, gaussian_blur_prob=0.5)
SMALL = dict(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), train_crop_mode='rrc', vflip=0.0, interpolation='bilinear')
RANDAUGMENT = 'rand-m10-n2-mstd0.5'
# Name of a view -> options in which it differs from the run's augmentation.
VIEWS = {
    'plain': {}, 'global': {}, 'local': {},
    'strong': dict(JITTERED, policy=RANDAUGMENT), 'sim': SIMCLR, 'sim_blur': BLURRED,
    'stack': dict(BLURRED, policy=RANDAUGMENT)}
CIFAR_VIEWS = {**VIEWS, 'strong': dict(auto_augment=None, policy='cifar10'), 'sim': {**SIMCLR, **SMALL},
               'sim_blur': {**BLURRED, **SMALL}, 'stack': {**BLURRED, **SMALL}}


def view_transform(
        img_size: tuple[int, int], views: Sequence[str] = ('plain',),
        **options) -> Callable[[Image.Image, str], list[Tensor]]:
    """Transform of an opened image and a PIL mode to one (c, H, W) uint8 tensor per view, from one decoding.

    Args:
        img_size: (H, W) in pixels.
        views: Names of VIEWS.
        **options: The run's augmentation, as of `shared_transform`.
    """
    per_view = view_options(views, **options)
    if all(one == per_view[0] for one in per_view):
        return shared_transform(img_size, len(views), **per_view[0])
    return EachView([shared_transform(img_size, 1, **one) for one in per_view])


def view_options(views: Sequence[str], no_aug: bool = False, **options) -> list[dict]:
    """Options of `shared_transform` for each view; without augmentation, no view has any."""
    table = CIFAR_VIEWS if options.get('augmentation') == 'cifar' else VIEWS
    return [{'no_aug': no_aug, **options, **({} if no_aug else table[name])} for name in views]


def shared_transform(
        img_size: tuple[int, int], num_views: int, augmentation: str = 'timm', hflip: float = 0.5, no_aug: bool = False,
        policy: str | None = None, **kwargs) -> Callable[[Image.Image, str], list[Tensor]]:
    """The same random transform for every view of an image.

    Args:
        img_size: (H, W) in pixels.
        num_views: Views of each image.
        augmentation: `timm`, by `kwargs` of `timm.data.create_transform`; `cifar`: random crop with padding 4, flip and
            `auto_augment`, after a resize of images of another size; `imagenet_lt`: the published recipe.
        hflip: Probability of a horizontal flip.
        no_aug: Resize and centre crop only.
        policy: Policy of timm, or `cifar10`, that comes after all others.
    """
    last = [] if no_aug else final_transforms(img_size, policy, **kwargs)
    if augmentation == 'cifar' and not no_aug:
        return Views(transforms.Compose([
            transforms.Resize(img_size), transforms.RandomCrop(img_size, padding=CIFAR_PADDING),
            transforms.RandomHorizontalFlip(hflip), *policy_transforms(img_size, **kwargs), *last, MaybePILToTensor()]),
            num_views)
    if augmentation == 'imagenet_lt':
        kwargs = {**kwargs, **IMAGENET_LT}
    transform = create_transform(img_size, is_training=True, hflip=hflip, no_aug=no_aug, use_prefetcher=True, **kwargs)
    crop, *others, to_tensor = transform.transforms
    if isinstance(crop, RandomResizedCropAndInterpolation) and isinstance(to_tensor, MaybePILToTensor):
        return CroppedViews(crop, [*others, *last], num_views)
    return Views(transforms.Compose([*transform.transforms[:-1], *last, to_tensor]) if last else transform, num_views)


def final_transforms(img_size: tuple[int, int], policy: str | None, **kwargs) -> list[Callable]:
    """`cifar10`: the policy of CIFAR-10 and a black box of half the side, as in PaCo and BCL; else timm's policy."""
    if policy == 'cifar10':
        return [transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10), Cutout(min(img_size) // 2)]
    return policy_transforms(img_size, **{**kwargs, 'auto_augment': policy})


class Cutout:
    """Paint a black box, clipped at the border, on a PIL image (arXiv 1708.04552).

    Args:
        side: Side of the box in pixels.
    """

    def __init__(self, side: int):
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        x, y = (random.randrange(size) - self.side // 2 for size in image.size)
        image = image.copy()
        image.paste(0 if image.mode == 'L' else (0, 0, 0), (max(x, 0), max(y, 0), x + self.side, y + self.side))
        return image


def policy_transforms(img_size: tuple[int, int], auto_augment: str | None = None, **kwargs) -> list[Callable]:
    """timm's AutoAugment, RandAugment or AugMix, PIL image -> PIL image; an empty list without a policy."""
    if not auto_augment:
        return []
    known = {name: kwargs[name] for name in ('mean', 'interpolation') if name in kwargs}
    _, policy, _ = create_transform(
        img_size, is_training=True, separate=True, color_jitter=None, auto_augment=auto_augment, **known)
    return policy.transforms


class EachView:
    """A different transform for each view, on the decoded image.

    Args:
        makers: Transforms of `shared_transform`, one per view.
    """

    def __init__(self, makers: Sequence[Callable]):
        self.makers = makers

    def __call__(self, image: Image.Image, mode: str) -> list[Tensor]:
        image = to_mode(image, mode)  # at full size: the next view may need more pixels than this one
        return [view for make_views in self.makers for view in make_views(image, mode)]


class Views:
    """The same transform on the decoded image for every view."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], num_views: int):
        self.transform, self.num_views = transform, num_views

    def __call__(self, image: Image.Image, mode: str) -> list[Tensor]:
        image = to_mode(image, mode)
        return [self.transform(image) for _ in range(self.num_views)]


class CroppedViews:
    """timm's random resized crop, drawn before the image is decoded, then its other transforms.

    A JPEG is decoded at 1/2, 1/4 or 1/8 if every view's crop still has enough pixels. Flips and colour changes come before
    the resize if the crop has fewer pixels than the view, else after it.

    Args:
        crop: timm's random resized crop: its size, scale, ratio and interpolation.
        others: Transforms between the crop and the tensor.
        num_views: Views of each image.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, others: Sequence[Callable], num_views: int):
        self.crop, self.num_views = crop, num_views
        self.size = tuple(crop.size)  # (H, W)
        modes = crop.interpolation if isinstance(crop.interpolation, (tuple, list)) else [crop.interpolation]
        self.interpolations = [str_to_pil_interp(interp_mode_to_str(mode)) for mode in modes]
        self.others = transforms.Compose(others)
        self.commutes = all(isinstance(_inner(other), COLOUR) for other in others)
        self.to_tensor = MaybePILToTensor()

    def __call__(self, image: Image.Image, mode: str) -> list[Tensor]:
        width, height = image.size
        boxes = [self.crop.get_params(image, self.crop.scale, self.crop.ratio) for _ in range(self.num_views)]
        boxes = [(y, x, max(h, 1), max(w, 1)) for y, x, h, w in boxes]  # timm's crop of an image one pixel wide is empty
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
    """The transform inside a RandomApply."""
    if isinstance(transform, transforms.RandomApply) and len(transform.transforms) == 1:
        return transform.transforms[0]
    return transform
