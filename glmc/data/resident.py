"""Loaders for sets that fit on the device: uint8 images there, crop and flip as one gather, no worker processes."""
from collections.abc import Callable, Iterator

import numpy as np
import torch
from timm.data import IterableImageDataset
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Resize

from glmc.data.datasets import BadImages, ImageSet
from glmc.data.loaders import EvalDataset, Normalize, create_normalize, eval_transform, image_mode
from glmc.data.sampling import PairSampler, stream
from glmc.data.transforms import CIFAR_PADDING, view_transform
from glmc.errors import InputError

MAX_BYTES = 2 ** 30  # what `auto` takes of the device's memory


def is_resident(
        choice: str, images: ImageSet | IterableImageDataset, augmentation: dict, input_size: tuple[int, int, int]) -> bool:
    """Whether the images are kept on the device: `on`, `off`, or `auto` for small sets.

    Raises:
        InputError: If `on` is asked of a source or an augmentation that only the worker loader can do.
    """
    cifar = augmentation['augmentation'] == 'cifar' and not augmentation.get('auto_augment')  # a policy needs PIL
    able = isinstance(images, ImageSet) and (augmentation['no_aug'] or cifar)
    if choice == 'on' and not able:
        raise InputError('--resident on: needs an indexable source and --augmentation cifar or --no-aug, and no --aa')
    return able and (choice == 'on' or choice == 'auto' and len(images) * int(np.prod(input_size)) <= MAX_BYTES)


class ResidentTrainLoader:
    """Augmented views of pairs, cut out of images that are on the device.

    The same samplers and the same distribution as the worker loader with `cifar` augmentation: every crop of the padded
    image and both directions alike likely. Offsets and flips are a function of (seed, epoch), drawn for all processes
    at once.

    Args:
        images: The set.
        transform: PIL image -> uint8 (c, H, W), the part that is alike for all views.
        sampler: Of the draws.
        num_views: Views of each image.
        padding: Pixels of 0 around the image that a crop may take in.
        hflip: Probability of a flip.
        normalize: For the step.
        device, workers: Where to, and how many processes decode.
        mode: PIL mode of the images.
    """

    random_erasing = None

    def __init__(
            self, images: ImageSet, transform: Callable, sampler: PairSampler, num_views: int, padding: int,
            hflip: float, normalize: Normalize, device: torch.device, workers: int = 0, mode: str = 'RGB',
            bad: BadImages | None = None):
        pixels = read_all(images, transform, workers, mode, bad)  # (N, H, W, c)
        self.size = pixels.shape[1:3]
        self.pixels = torch.nn.functional.pad(pixels, (0, 0, *(padding,) * 4)).to(device)
        self.labels = torch.from_numpy(images.labels).to(device)
        self.sampler, self.num_views, self.padding, self.hflip = sampler, num_views, padding, hflip
        self.normalize, self.device = normalize, device

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.sampler.set_epoch(epoch, start_step)

    def share(self, step: int) -> float:
        return self.sampler.share(step)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        _, *indices = self.sampler.sample_epoch()
        indices = np.stack(indices, 1)  # (N, images of a draw)
        shape = (*indices.shape, self.num_views)
        rng = stream('crops', self.sampler.seed, self.sampler.epoch)
        offsets = rng.integers(2 * self.padding + 1, size=(2, *shape))
        columns = (indices, *offsets, rng.random(shape) < self.hflip)
        index, y, x, flip = (torch.from_numpy(column).to(self.device) for column in columns)
        for step in range(self.sampler.start_step, len(self)):
            part = self.sampler.positions(step)
            yield self.views(index[part], y[part], x[part], flip[part]), self.labels[index[part]]

    def views(self, index: Tensor, y: Tensor, x: Tensor, flip: Tensor) -> Tensor:
        """Crops with the upper left corner at (y, x) of the padded images, mirrored where `flip`.

        Args:
            index: (B, K) images.
            y, x, flip: (B, K, V).

        Returns:
            (B, K·V, c, H, W) uint8, in channels_last layout.
        """
        height, width = self.size
        _, rows, columns, channels = self.pixels.shape
        down = torch.arange(height, device=self.device)
        right = torch.arange(width, device=self.device)
        row = (index[..., None] * rows + y)[..., None] + down  # (B, K, V, H)
        column = torch.where(flip[..., None], width - 1 - right, right) + x[..., None]  # (B, K, V, W)
        flat = row[..., None] * columns + column[..., None, :]
        pixels = self.pixels.view(-1, channels).index_select(0, flat.view(-1))
        return pixels.view(len(index), -1, height, width, channels).permute(0, 1, 4, 2, 3)


class ResidentEvalLoader:
    """Images on the device, each once over all processes."""

    def __init__(
            self, images: ImageSet, transform: Callable, batch_size: int, normalize: Normalize, device: torch.device,
            workers: int = 0, mode: str = 'RGB', rank: int = 0, world_size: int = 1):
        share = images.subset(np.arange(rank, len(images), world_size))
        self.pixels = read_all(share, transform, workers, mode).to(device)
        self.labels = torch.from_numpy(share.labels).to(device)
        self.batch_size, self.normalize = batch_size, normalize

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.pixels.permute(0, 3, 1, 2)
        yield from zip(images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)


def create_resident_train_loader(
        images: ImageSet, augmentation: dict, *, num_views: int, batch_size: int, resample_power: float | None,
        data_config: dict, device: torch.device, seed: int, workers: int, rank: int = 0, world_size: int = 1,
        bad: BadImages | None = None) -> ResidentTrainLoader:
    """As `loaders.create_train_loader`, for `cifar` augmentation or none."""
    plain = augmentation['no_aug']
    size = data_config['input_size'][-2:]
    transform = view_transform(size, **augmentation).transform if plain else Compose([Resize(size), MaybePILToTensor()])
    return ResidentTrainLoader(
        images, transform, PairSampler(images.labels, batch_size, resample_power, seed, rank, world_size), num_views,
        padding=0 if plain else CIFAR_PADDING, hflip=0.0 if plain else augmentation['hflip'],
        normalize=create_normalize(data_config, device), device=device, workers=workers, mode=image_mode(data_config),
        bad=bad)


def create_resident_eval_loader(
        images: ImageSet, *, batch_size: int, data_config: dict, device: torch.device, workers: int, rank: int = 0,
        world_size: int = 1) -> ResidentEvalLoader:
    """As `loaders.create_eval_loader`."""
    return ResidentEvalLoader(
        images, eval_transform(data_config), batch_size, create_normalize(data_config, device), device, workers,
        image_mode(data_config), rank, world_size)


def read_all(
        images: ImageSet, transform: Callable, workers: int, mode: str, bad: BadImages | None = None) -> Tensor:
    """All images, (N, H, W, c) uint8 on the CPU."""
    generator = torch.Generator()  # the loader's own: none of the training's draws
    dataset = EvalDataset(images, transform, mode, bad)
    loader = DataLoader(dataset, batch_size=256, num_workers=workers, generator=generator)
    return torch.cat([batch.permute(0, 2, 3, 1) for batch, _ in loader]).contiguous()
