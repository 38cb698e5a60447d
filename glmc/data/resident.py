"""Loaders for sets that fit on the device: uint8 images there, crop and flip as one gather, no worker processes."""
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from timm.data import IterableImageDataset
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torchvision.transforms import Compose, Resize

from glmc.data.datasets import BadImages, ImageSet
from glmc.data.loaders import EvalDataset, Normalize, TrainLoader, create_normalize, data_loader, eval_transform, image_mode
from glmc.data.sampling import PairSampler, stream
from glmc.data.transforms import CIFAR_PADDING, view_options, view_transform
from glmc.errors import InputError

MAX_BYTES = 2 ** 30  # of the device's memory for `auto`


def is_resident(
        choice: str, images: ImageSet | IterableImageDataset, augmentation: dict, input_size: tuple[int, int, int],
        views: Sequence[str] = ('plain',)) -> bool:
    """Whether the images are kept on the device: `on`, `off`, or `auto` for small sets.

    Args:
        choice: `on`, `off` or `auto`.
        images: The training set.
        augmentation: Options of `transforms.view_transform`.
        input_size: (c, H, W).
        views: Names of the views; each must have the run's own augmentation.

    Raises:
        InputError: If `on` is asked of a source or an augmentation that needs worker processes.
    """
    cifar = augmentation['augmentation'] == 'cifar' and not augmentation.get('auto_augment')  # a policy needs PIL
    own = view_options(views, **augmentation) == view_options(('plain',) * len(views), **augmentation)
    able = isinstance(images, ImageSet) and (augmentation['no_aug'] or cifar) and own
    if choice == 'on' and not able:
        raise InputError('--resident on: needs an indexable source and --augmentation cifar or --no-aug, and no --aa'
                         + ('' if own else '; for the views of this method, --view-augmentation plain'))
    return able and (choice == 'on' or choice == 'auto' and len(images) * int(np.prod(input_size)) <= MAX_BYTES)


class ResidentTrainLoader(TrainLoader):
    """Augmented views of samples, cut out of images that are on the device.

    Samplers and distribution are those of the worker loader with `cifar` augmentation: every crop of the padded image and
    both directions are equally likely. Offsets and flips are a function of (seed, epoch), drawn for all processes at once.

    Args:
        pixels: (N, H, W, c) uint8 images.
        labels: (N,) labels.
        sampler: Sampler of the batches.
        num_views: Views of each image.
        padding: Black pixels around the image that a crop may include.
        hflip: Probability of a horizontal flip.
        normalize, device, erasing: As those of `TrainLoader`.
    """

    def __init__(
            self, pixels: Tensor, labels: np.ndarray, sampler: PairSampler, num_views: int, padding: int, hflip: float,
            normalize: Normalize, device: torch.device, erasing: RandomErasing | None = None):
        super().__init__(normalize, device, sampler, erasing)
        self.size = pixels.shape[1:3]
        self.pixels = torch.nn.functional.pad(pixels, (0, 0, *(padding,) * 4)).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.num_views, self.padding, self.hflip = num_views, padding, hflip

    def __len__(self) -> int:
        return len(self.sampler)

    def batches(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(epoch, start_step)
        _, *indices = self.sampler.sample_epoch(epoch)
        indices = np.stack(indices, 1)  # (N, images)
        shape = (*indices.shape, self.num_views)
        rng = stream('crops', self.sampler.seed, epoch)
        offsets = rng.integers(2 * self.padding + 1, size=(2, *shape))
        columns = (indices, *offsets, rng.random(shape) < self.hflip)
        index, y, x, flip = (torch.from_numpy(column).to(self.device) for column in columns)
        for step in range(start_step, len(self)):
            rows = self.sampler.positions(step)
            yield self.views(index[rows], y[rows], x[rows], flip[rows]), self.labels[index[rows]]

    def views(self, index: Tensor, y: Tensor, x: Tensor, flip: Tensor) -> Tensor:
        """Crops with the upper left corner at (y, x) of the padded images, mirrored where `flip` is true.

        Args:
            index: (B, images) indices.
            y, x, flip: (B, images, views).

        Returns:
            (B, images, views, c, H, W) uint8, each image in channels_last layout.
        """
        height, width = self.size
        _, rows, columns, channels = self.pixels.shape
        down = torch.arange(height, device=self.device)
        right = torch.arange(width, device=self.device)
        row = (index[..., None] * rows + y)[..., None] + down  # (B, images, views, H)
        column = torch.where(flip[..., None], width - 1 - right, right) + x[..., None]  # (B, images, views, W)
        flat = row[..., None] * columns + column[..., None, :]
        pixels = self.pixels.view(-1, channels).index_select(0, flat.view(-1))
        return pixels.view(*index.shape, -1, height, width, channels).movedim(-1, -3)


class ResidentEvalLoader:
    """Evaluation batches of images on the device.

    Args:
        pixels: (N, H, W, c) uint8 images of this process.
        labels: (N,) labels.
        batch_size: Images per batch.
        normalize: Pixel values -> input of the model.
        device: Device of the images.
    """

    def __init__(self, pixels: Tensor, labels: np.ndarray, batch_size: int, normalize: Normalize, device: torch.device):
        self.pixels, self.labels = pixels.to(device), torch.from_numpy(labels).to(device)
        self.batch_size, self.normalize = batch_size, normalize

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.pixels.permute(0, 3, 1, 2)
        yield from zip(images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)


def create_resident_train_loader(
        images: ImageSet, augmentation: dict, *, views: Sequence[str], batch_size: int, resample_power: float | None,
        data_config: dict, device: torch.device, seed: int, workers: int, rank: int = 0, world_size: int = 1,
        bad: BadImages | None = None, erasing: RandomErasing | None = None) -> ResidentTrainLoader:
    """Training loader as `loaders.create_train_loader`, for `cifar` augmentation or none; `workers` decode once."""
    plain = augmentation['no_aug']
    size = data_config['input_size'][-2:]
    transform = view_transform(size, **augmentation).transform if plain else Compose([Resize(size), MaybePILToTensor()])
    return ResidentTrainLoader(
        read_all(images, transform, workers, image_mode(data_config), bad), images.labels,
        PairSampler(images.labels, batch_size, resample_power, seed, rank, world_size), len(views),
        padding=0 if plain else CIFAR_PADDING, hflip=0.0 if plain else augmentation['hflip'],
        normalize=create_normalize(data_config, device), device=device, erasing=erasing)


def create_resident_eval_loader(
        images: ImageSet, *, batch_size: int, data_config: dict, device: torch.device, workers: int, rank: int = 0,
        world_size: int = 1) -> ResidentEvalLoader:
    """Evaluation loader as `loaders.create_eval_loader`."""
    shard = images.subset(np.arange(rank, len(images), world_size))
    pixels = read_all(shard, eval_transform(data_config), workers, image_mode(data_config))
    return ResidentEvalLoader(pixels, shard.labels, batch_size, create_normalize(data_config, device), device)


def read_all(
        images: ImageSet, transform: Callable, workers: int, mode: str, bad: BadImages | None = None) -> Tensor:
    """All images, (N, H, W, c) uint8 on the CPU."""
    loader = data_loader(EvalDataset(images, transform, mode, bad), workers, persistent=False, batch_size=256)
    return torch.cat([batch.permute(0, 2, 3, 1) for batch, _ in loader]).contiguous()
