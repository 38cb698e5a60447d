"""Views of images as batches on the device, decoded once and uint8 until they are mixed there."""
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

import numpy as np
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import Compose

from glmc.data.datasets import BadImages, ImageSet, to_mode
from glmc.data.sampling import PairSampler, ShardSampler
from glmc.data.transforms import view_transform


class ViewDataset(Dataset):
    """Augmented views of the images of a draw.

    Args:
        images: The set.
        make_views: Of `transforms.view_transform`.
        num_views: Views of each image, all from one decoding.
        mode: RGB or L.
        bad: Stands in for images that cannot be decoded; None to raise.
    """

    def __init__(self, images: ImageSet, make_views: Callable, num_views: int, mode: str = 'RGB',
                 bad: BadImages | None = None):
        self.images, self.make_views, self.num_views, self.mode, self.bad = images, make_views, num_views, mode, bad

    def __getitem__(self, sample: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(images · views, c, H, W) uint8, image by image, and the (images,) labels."""
        seed, *indices = sample
        with seeded(seed):
            views = [view for index in indices for view in self._views_or_others(index)]
        return torch.stack(views), torch.from_numpy(self.images.labels[indices])

    def _views_or_others(self, index: int) -> list[Tensor]:
        return self.bad.first_readable(index, self._views) if self.bad else self._views(index)

    def _views(self, index: int) -> list[Tensor]:
        with self.images.opened(index) as image:
            return self.make_views(image, self.num_views, self.mode)


class EvalDataset(Dataset):
    """Each image once, by timm's evaluation transform; `bad` as of ViewDataset."""

    def __init__(self, images: ImageSet, transform: Callable, mode: str = 'RGB', bad: BadImages | None = None):
        self.images, self.transform, self.mode, self.bad = images, transform, mode, bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.bad.first_readable(index, self._image) if self.bad else self._image(index)
        return self.transform(image), torch.as_tensor(self.images.labels[index])

    def _image(self, index: int) -> Image.Image:
        return self.images.image(index, self.mode)


class IterableViews(IterableDataset):
    """Views of the images of a source that can only be read in its own order (wds/, tfds/, hfids/)."""

    def __init__(self, source: IterableImageDataset, make_views: Callable, num_views: int, mode: str = 'RGB'):
        self.source, self.make_views, self.num_views, self.mode = source, make_views, num_views, mode

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in self.source:
            yield torch.stack(self.make_views(image, self.num_views, self.mode)), torch.tensor([label])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All global generators that timm's transforms draw from, seeded for one draw and put back afterwards."""
    in_worker = get_worker_info() is not None  # nothing else draws there
    state = None if in_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        if state:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])


class Normalize(nn.Module):
    """Images in 0…255, uint8 or mixed from such, to zero mean and unit deviation.

    Args:
        mean, std: Per channel, for images in 0…1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer('mean', 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class DeviceLoader:
    """A DataLoader of (uint8 images, labels) whose batches arrive on the device.

    Args:
        loader: Yields (B, …, c, H, W) uint8 images and their labels.
        normalize: For whoever uses the images.
        device: Where to.
    """

    def __init__(self, loader: DataLoader, normalize: Normalize, device: torch.device):
        self.loader, self.normalize, self.device = loader, normalize, device
        self.drop = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The epoch that comes next, from this step on; a source without an index reads and drops what comes before."""
        self.drop = start_step
        if isinstance(self.loader.batch_sampler, PairSampler):
            self.loader.batch_sampler.set_epoch(epoch, start_step)
            self.drop = 0
        source = getattr(self.loader.dataset, 'source', None)
        if hasattr(source, 'set_epoch'):
            source.set_epoch(epoch)

    def share(self, step: int) -> float:
        """Of `PairSampler.share`."""
        sampler = self.loader.batch_sampler
        return sampler.share(step) if isinstance(sampler, PairSampler) else 1.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in islice(self.loader, self.drop, None):
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class ErasingLoader:
    """A loader whose views are normalised and pass timm's random erasing, before anything is mixed.

    Args:
        loader: Yields (B, V, c, H, W) uint8 views and labels.
        erasing: timm's.
        views: Which of the V it is for.
    """

    def __init__(self, loader, erasing: RandomErasing, views: slice = slice(None)):
        self.loader, self.erasing, self.views, self.normalize = loader, erasing, views, nn.Identity()

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.loader.set_epoch(epoch, start_step)

    def share(self, step: int) -> float:
        return self.loader.share(step)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            images = self.loader.normalize(images)
            chosen = images[:, self.views]
            images[:, self.views] = self.erasing(chosen.flatten(0, 1)).view_as(chosen)
            yield images, labels


def create_train_loader(
        images: ImageSet | IterableImageDataset, augmentation: dict, *, num_views: int, batch_size: int,
        resample_power: float | None, data_config: dict, device: torch.device, seed: int, workers: int,
        rank: int = 0, world_size: int = 1, bad: BadImages | None = None) -> DeviceLoader:
    """Batches of (B, images · views, c, H, W) uint8 views and (B, images) labels.

    Args:
        images: The training set.
        augmentation: Options of `transforms.view_transform`.
        num_views: Views of each image.
        batch_size: Per process.
        resample_power: q of the partner images; None for none.
        data_config: timm's: input_size, mean, std.
        device, seed, workers, rank, world_size: As their names say.
        bad: Of ViewDataset.

    Raises:
        ValueError: If the batch is larger than the set.
    """
    make_views = view_transform(data_config['input_size'][-2:], mean=data_config['mean'], **augmentation)
    views = make_views, num_views, image_mode(data_config)
    if isinstance(images, IterableImageDataset):
        images.set_loader_cfg(num_workers=workers)  # which its length depends on
        dataset, batching = IterableViews(images, *views), dict(batch_size=batch_size, drop_last=True)
    else:
        dataset = ViewDataset(images, *views, bad)
        batching = dict(batch_sampler=PairSampler(images.labels, batch_size, resample_power, seed, rank, world_size))
    loader = _data_loader(dataset, workers, device, seed, **batching)
    return DeviceLoader(loader, create_normalize(data_config, device), device)


def create_eval_loader(
        images: ImageSet | IterableImageDataset, *, batch_size: int, data_config: dict, device: torch.device,
        workers: int, rank: int = 0, world_size: int = 1) -> DeviceLoader:
    """Batches of (B, c, H, W) uint8 images and (B,) labels: this process's share, no image twice."""
    transform = eval_transform(data_config)
    if isinstance(images, IterableImageDataset):
        images.transform = Compose([partial(to_mode, mode=image_mode(data_config)), transform])
        dataset, sampler = images, None
    else:
        dataset = EvalDataset(images, transform, image_mode(data_config))
        sampler = ShardSampler(len(images), rank, world_size)
    loader = _data_loader(dataset, workers, device, 0, batch_size=batch_size, sampler=sampler)
    return DeviceLoader(loader, create_normalize(data_config, device), device)


def eval_transform(data_config: dict) -> Callable:
    """timm's evaluation transform, PIL image -> uint8 tensor (c, H, W)."""
    return create_transform(**data_config, is_training=False, use_prefetcher=True)


def create_normalize(data_config: dict, device: torch.device) -> Normalize:
    """With timm's mean and standard deviation."""
    return Normalize(data_config['mean'], data_config['std']).to(device)


def image_mode(data_config: dict) -> str:
    """PIL mode of the decoded images: L for one channel, else RGB."""
    return 'L' if data_config['input_size'][0] == 1 else 'RGB'


def _data_loader(dataset, workers: int, device: torch.device, seed: int, **kwargs) -> DataLoader:
    return DataLoader(
        dataset, num_workers=workers, pin_memory=device.type == 'cuda', persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed), **kwargs,  # its own generator: none of the training's draws
        worker_init_fn=_ignore_signals if workers else None)


def _ignore_signals(worker: int) -> None:
    """A signal to all processes of a job must not take the images from under the step that is to be finished."""
    for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
