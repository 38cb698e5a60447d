"""Batches of images on the device: decoded once, uint8 until the training step mixes and normalises them."""
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

import numpy as np
import torch
from timm.data import IterableImageDataset, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import Compose

from glmc.data.datasets import BadImages, ImageSet, to_mode
from glmc.data.sampling import PairSampler, ShardSampler
from glmc.data.transforms import view_transform


class ViewDataset(Dataset):
    """Augmented views of sampled images.

    Args:
        images: The set.
        make_views: PIL image and mode -> (c, H, W) uint8 views, as `transforms.view_transform` returns.
        mode: PIL mode of the decoded images, RGB or L.
        bad: Replaces images that cannot be decoded; None to raise.
    """

    def __init__(self, images: ImageSet, make_views: Callable, mode: str = 'RGB', bad: BadImages | None = None):
        self.images, self.make_views, self.mode, self.bad = images, make_views, mode, bad

    def __getitem__(self, sample: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(images, views, c, H, W) uint8 views and (images,) labels of a sample (seed, i) or (seed, i, j)."""
        seed, *indices = sample
        load = partial(self.bad.first_readable, use=self._views) if self.bad else self._views
        with seeded(seed):
            views = torch.stack([load(index) for index in indices])
        return views, torch.from_numpy(self.images.labels[indices])

    def _views(self, index: int) -> Tensor:
        with self.images.opened(index) as image:
            return torch.stack(self.make_views(image, self.mode))


class EvalDataset(Dataset):
    """Each image once, by timm's evaluation transform; arguments as those of `ViewDataset`."""

    def __init__(self, images: ImageSet, transform: Callable, mode: str = 'RGB', bad: BadImages | None = None):
        self.images, self.transform, self.mode, self.bad = images, transform, mode, bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(c, H, W) uint8 image and its label."""
        load = partial(self.images.image, mode=self.mode)
        image = self.bad.first_readable(index, load) if self.bad else load(index)
        return self.transform(image), torch.as_tensor(self.images.labels[index])


class IterableViews(IterableDataset):
    """Views of the images of a source that can only be read in its own order (wds/, tfds/, hfids/)."""

    def __init__(self, source: IterableImageDataset, make_views: Callable, mode: str = 'RGB'):
        self.source, self.make_views, self.mode = source, make_views, mode

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in self.source:
            yield torch.stack(self.make_views(image, self.mode))[None], torch.tensor([label])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators that timm's transforms use, and restore them afterwards.

    `torch.manual_seed` would seed the generators of CUDA as well, which nothing restores.
    """
    in_worker = get_worker_info() is not None  # nothing else draws there
    state = None if in_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if state:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])


class Normalize(nn.Module):
    """Pixel values 0…255, uint8 or mixed from such, to zero mean and unit deviation.

    Args:
        mean, std: Per channel, for images in 0…1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer('mean', 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(…, c, H, W) pixel values -> the same shape, float."""
        return (images - self.mean) / self.std

    def inverse(self, images: Tensor) -> Tensor:
        """Normalised images -> pixel values."""
        return images * self.std + self.mean


class TrainLoader:
    """Training batches on the device; a subclass reads them.

    Args:
        normalize: Pixel values -> input of the model; the training step applies it after mixing.
        device: Device of the batches.
        sampler: Sampler of the batches; None for a source that has its own order.
        erasing: timm's random erasing, which fills boxes with values of normalised images; None for none.
    """

    def __init__(self, normalize: Normalize, device: torch.device, sampler: PairSampler | None,
                 erasing: RandomErasing | None = None):
        self.normalize, self.device, self.sampler, self.erasing = normalize, device, sampler, erasing

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Batches of an epoch from a step on.

        Yields:
            (B, images, views, c, H, W) pixel values, uint8 or with random erasing float; (B, images) labels; and the batch
            fraction: images of this process over the mean of all processes, 1 but for an uneven last step.
        """
        batches = prefetched(self.batches(epoch, start_step), self.device)
        for step, (views, labels) in enumerate(batches, start_step):
            yield self._erased(views), labels, self.sampler.batch_fraction(step) if self.sampler else 1.0

    def batches(self, epoch: int, start_step: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Views and labels, on any device."""
        raise NotImplementedError

    def _erased(self, views: Tensor) -> Tensor:
        if self.erasing is None:
            return views
        return self.normalize.inverse(self.erasing(self.normalize(views).flatten(0, 2)).view_as(views))


class WorkerTrainLoader(TrainLoader):
    """Training batches of a DataLoader with worker processes.

    Args:
        loader: DataLoader of (B, images, views, c, H, W) uint8 views and (B, images) labels.
        normalize, device, erasing: As those of `TrainLoader`.
    """

    def __init__(self, loader: DataLoader, normalize: Normalize, device: torch.device, erasing: RandomErasing | None = None):
        sampler = loader.batch_sampler if isinstance(loader.batch_sampler, PairSampler) else None
        super().__init__(normalize, device, sampler, erasing)
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start_step: int) -> Iterable[tuple[Tensor, Tensor]]:
        if self.sampler:
            self.sampler.set_epoch(epoch, start_step)
            return self.loader
        if hasattr(self.loader.dataset.source, 'set_epoch'):
            self.loader.dataset.source.set_epoch(epoch)
        return islice(self.loader, start_step, None)  # read and dropped


class EvalLoader:
    """Evaluation batches on the device.

    Args:
        loader: DataLoader of (B, c, H, W) uint8 images and (B,) labels.
        normalize: Pixel values -> input of the model.
        device: Device of the batches.
    """

    def __init__(self, loader: DataLoader, normalize: Normalize, device: torch.device):
        self.loader, self.normalize, self.device = loader, normalize, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return prefetched(self.loader, self.device)


def prefetched(batches: Iterable[Sequence[Tensor]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Batches on the device. On CUDA each is copied on a stream of its own while the one before it is used."""
    if device.type != 'cuda':
        yield from (tuple(tensor.to(device) for tensor in batch) for batch in batches)
        return
    side, ready = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(side)
        for tensor in copied:
            tensor.record_stream(torch.cuda.current_stream(device))
        ready = copied
    if ready is not None:
        yield ready


def create_train_loader(
        images: ImageSet | IterableImageDataset, augmentation: dict, *, views: Sequence[str], batch_size: int,
        resample_power: float | None, data_config: dict, device: torch.device, seed: int, workers: int,
        rank: int = 0, world_size: int = 1, bad: BadImages | None = None,
        erasing: RandomErasing | None = None) -> WorkerTrainLoader:
    """Training loader with worker processes.

    Args:
        images: The training set.
        augmentation: Options of `transforms.view_transform`.
        views: Names of the views of each image.
        batch_size: Samples per process.
        resample_power: q of the second image of each sample; None for samples of one image.
        data_config: timm's: input_size, mean, std.
        device: Device of the batches.
        seed: Seed of order and augmentation.
        workers: Worker processes.
        rank, world_size: This process, and the number of processes.
        bad, erasing: As those of `ViewDataset` and `TrainLoader`.

    Raises:
        ValueError: If the global batch is larger than the set.
    """
    make_views = view_transform(data_config['input_size'][-2:], views, mean=data_config['mean'], **augmentation)
    mode = image_mode(data_config)
    if isinstance(images, IterableImageDataset):
        images.set_loader_cfg(num_workers=workers)  # which its length depends on
        dataset, batching = IterableViews(images, make_views, mode), dict(batch_size=batch_size, drop_last=True)
    else:
        dataset = ViewDataset(images, make_views, mode, bad)
        batching = dict(batch_sampler=PairSampler(images.labels, batch_size, resample_power, seed, rank, world_size))
    loader = data_loader(dataset, workers, device, seed, **batching)
    return WorkerTrainLoader(loader, create_normalize(data_config, device), device, erasing)


def create_eval_loader(
        images: ImageSet | IterableImageDataset, *, batch_size: int, data_config: dict, device: torch.device,
        workers: int, rank: int = 0, world_size: int = 1) -> EvalLoader:
    """Evaluation loader of this process's images; over all processes no image comes twice."""
    transform = eval_transform(data_config)
    if isinstance(images, IterableImageDataset):
        images.transform = Compose([partial(to_mode, mode=image_mode(data_config)), transform])
        dataset, sampler = images, None
    else:
        dataset = EvalDataset(images, transform, image_mode(data_config))
        sampler = ShardSampler(len(images), rank, world_size)
    loader = data_loader(dataset, workers, device, 0, batch_size=batch_size, sampler=sampler)
    return EvalLoader(loader, create_normalize(data_config, device), device)


def eval_transform(data_config: dict) -> Callable:
    """timm's evaluation transform, PIL image -> (c, H, W) uint8."""
    return create_transform(**data_config, is_training=False, use_prefetcher=True)


def larger_input(data_config: dict) -> dict:
    """Data config of larger images, of which five crops have the input size: their sides are 8/7 of it or 1/crop_pct."""
    channels, *size = data_config['input_size']
    factor = max(8 / 7, 1 / data_config['crop_pct'])
    return {**data_config, 'input_size': (channels, *(int(side * factor) for side in size)), 'crop_pct': 1.0}


def create_normalize(data_config: dict, device: torch.device) -> Normalize:
    """`Normalize` with timm's mean and standard deviation, on the device."""
    return Normalize(data_config['mean'], data_config['std']).to(device)


def image_mode(data_config: dict) -> str:
    """PIL mode of the decoded images: L for one channel, else RGB."""
    return 'L' if data_config['input_size'][0] == 1 else 'RGB'


def data_loader(
        dataset, workers: int, device: torch.device | None = None, seed: int = 0, persistent: bool = True,
        **kwargs) -> DataLoader:
    """DataLoader whose workers end with their main process and not before, and whose random numbers are its own."""
    return DataLoader(
        dataset, num_workers=workers, pin_memory=device is not None and device.type == 'cuda',
        persistent_workers=persistent and workers > 0, worker_init_fn=_follow_main_process if workers else None,
        generator=torch.Generator().manual_seed(seed), **kwargs)  # its own generator: none of the training's numbers


def _follow_main_process(worker: int) -> None:
    """Ignore signals that go to all processes of a job, so that the main process can finish its step; end at a SIGTERM of
    the main process, and within a second after it."""
    signals = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1') if hasattr(signal, name)]
    if hasattr(signal, 'sigtimedwait'):
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    else:  # macOS, Windows
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_wait_for_end, args=(signals, os.getppid()), daemon=True).start()


def _wait_for_end(signals: list[int], parent: int) -> None:
    while os.getppid() == parent:
        if not hasattr(signal, 'sigtimedwait'):
            time.sleep(1)
            continue
        caught = signal.sigtimedwait(signals, 1)
        if caught and caught.si_signo == signal.SIGTERM and caught.si_pid == multiprocessing.parent_process().pid:
            break
    os._exit(0)
