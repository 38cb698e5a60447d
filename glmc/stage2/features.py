"""Features of a frozen encoder: extracted once into a file, which later runs read."""
import hashlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from glmc.cli import Progress
from glmc.config import PRECISIONS
from glmc.data.datasets import ImageSet
from glmc.data.loaders import EvalDataset, ViewDataset, create_normalize, data_loader, eval_transform, image_mode
from glmc.data.transforms import view_transform
from glmc.stage2.feature_file import BLOCK, FeatureFile, StoredViews

_logger = logging.getLogger(__name__)
SHORT = 10  # seconds of extraction in float32 that need no faster precision


@dataclass(frozen=True)
class Features:
    """Pooled features of N images. The rows are read as needed, so that a file need not fit into memory.

    Args:
        views: (1 + V, M, D) features of the plain view, then of V augmented views.
        labels: (N,) int64 labels.
        index: (N,) int64 positions of these images among the M of `views`; None for all of them.
    """
    views: Tensor | StoredViews
    labels: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_views(self) -> int:
        """1 + V."""
        return self.views.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.views.shape[-1]

    def rows(self, indices: Tensor, views: Tensor | int = 0) -> Tensor:
        """Read (n, D) float32 features of the images at (n,) int64 indices.

        Args:
            indices: Positions among the N images.
            views: (n,) view of each image, or one for all; 0 is the plain view, which evaluation uses.
        """
        return self.views[views, indices if self.index is None else self.index[indices]].float()

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the plain view of all images in order, as (B, D) float32 features and (B,) labels."""
        for indices in torch.arange(len(self)).split(batch_size):
            yield self.rows(indices), self.labels[indices]

    def subset(self, indices: Tensor) -> 'Features':
        """Features of the images at (n,) int64 indices."""
        return Features(self.views, self.labels[indices], indices if self.index is None else self.index[indices])

    def counts(self, num_classes: int) -> list[int]:
        """Count the images per class."""
        return torch.bincount(self.labels, minlength=num_classes).tolist()


class ImageViews(Dataset):
    """Views of each image by its index.

    Args:
        images: Image set.
        num_views: Augmented views V.
        data_config: timm's.
        augmentation: Options of `transforms.view_transform`.
        seed: Seed of the augmented views.
    """

    def __init__(self, images: ImageSet, num_views: int, data_config: dict, augmentation: dict, seed: int):
        mode = image_mode(data_config)
        self.plain, self.augmented = EvalDataset(images, eval_transform(data_config), mode), None
        if num_views:
            self.augmented = ViewDataset(images, view_transform(
                data_config['input_size'][-2:], ('plain',) * num_views, mean=data_config['mean'], **augmentation), mode)
            self.seeds = np.random.default_rng((seed, 2)).integers(2 ** 32, size=len(images))

    def __getitem__(self, index: int) -> Tensor:
        """(1 + V, c, H, W) uint8 plain view, then augmented views."""
        plain = torch.as_tensor(self.plain[index][0])[None]
        if self.augmented is None:
            return plain
        (augmented,), _ = self.augmented[(int(self.seeds[index]), index)]
        return torch.cat([plain, augmented])


class Extractor:
    """Extract the features of image sets with a frozen encoder.

    Args:
        model: Bare timm model.
        data_config: timm's input_size, mean, std, interpolation and crop_pct.
        augmentation: Options of `transforms.view_transform` for the augmented views.
        accelerator: Device and precision.
        cache: Folder of the feature files; None writes no files and holds the features in memory.
        batch_size: Images per pass through the encoder.
        workers: Processes of the loader; None for one per core, at most 16.
        seed: Seed of the augmented views.
        precision: float32, bfloat16, float16, or auto: that of `accelerator`; if it has none, bfloat16 on CPUs that are
            faster with it, unless all takes seconds.
    """

    def __init__(self, model: nn.Module, *, data_config: dict, augmentation: dict, accelerator: Accelerator,
                 cache: str | Path | None = None, batch_size: int = 64, workers: int | None = None, seed: int = 42,
                 precision: str = 'auto'):
        self.model, self.data_config, self.augmentation = model, data_config, augmentation
        self.device, self.cache, self.seed = accelerator.device, cache and Path(cache), seed
        self.batch_size, self.workers = batch_size, default_workers() if workers is None else workers
        self.normalize = create_normalize(data_config, accelerator.device)
        if precision == 'auto' and accelerator.mixed_precision != 'no':
            precision = PRECISIONS.get(accelerator.mixed_precision, 'float32')
        self.precision, self.chosen = precision, None if precision == 'auto' else precision
        self.identity = weights_digest(model)

    def __call__(self, images: ImageSet, num_views: int = 0) -> Features:
        """Features of the plain view and of `num_views` augmented views, read from the cache if it contains them.

        Several processes that call it share the work by the files of the cache, and return when all is done; a single
        one does all of it. After a kill the same call continues.

        Raises:
            ImageError: If an image cannot be decoded.
            RunError: If a file cannot be read or written, or the disk has too little space.
        """
        shape = (1 + num_views, len(images), self.model.head_hidden_size)
        labels = torch.from_numpy(images.labels)
        if self.cache is None:
            self.chosen, views = self._choose_precision(images, shape), torch.empty(shape)
            progress = ExtractionProgress(shape)
            _logger.info(f'Extracting features: {_size(shape)} in {self.chosen}')

            def keep(block: int, values: Tensor) -> None:
                views[:, block * BLOCK:block * BLOCK + values.shape[1]] = values
            self._extract(images, num_views, iter(range(math.ceil(len(images) / BLOCK))), keep, progress)
            progress.close()
            return Features(views, labels)
        path = self.cache / self.key(images, num_views)
        with FeatureFile(path, shape, lambda: self._choose_precision(images, shape)) as file:
            self.chosen = file.precision
            if file.path.exists():
                _logger.info(f'Features of {len(images):,} images read from {file.path}')
            else:
                self._fill(images, num_views, file)
            return Features(file.views(), labels)

    def key(self, images: ImageSet, num_views: int) -> str:
        """Hash of everything that determines the features: weights, images in order, preprocessing and augmentation."""
        metadata = dict(
            weights=self.identity, source=images.source, data_config=self.data_config, precision=self.precision,
            views=num_views, augmentation=num_views and [self.augmentation, self.seed])
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, default=str).encode())
        digest.update(images.labels.tobytes())
        for identity in images.identities():
            digest.update(json.dumps(identity).encode())
        return digest.hexdigest()[:32]

    def _fill(self, images: ImageSet, num_views: int, file: FeatureFile) -> None:
        """Extract blocks until this process and others have finished the file."""
        stored = 'bfloat16' if file.dtype == torch.bfloat16 else 'float32'
        _logger.info(f'Extracting features: {_size(file.shape)} in {file.precision}, stored as {stored}, '
                     f'{file.size / 2 ** 20:,.1f} MiB in {file.path.parent}')
        if file.finished:
            _logger.info(f'Continuing at {file.num_finished() / len(images):.0%}')
        progress = ExtractionProgress(file.shape, file.num_finished())

        def save(block: int, values: Tensor) -> None:
            file.write(block, values)
            progress.advance(file.num_finished())
        while not file.finish():
            block = file.claim()
            if block is None:
                time.sleep(0.2)  # others hold the last blocks, or die and release them
            else:
                self._extract(images, num_views, chain([block], iter(file.claim, None)), save, progress)
        progress.close()

    def _extract(self, images: ImageSet, num_views: int, blocks: Iterator[int], save: Callable[[int, Tensor], None],
                 progress: 'ExtractionProgress') -> None:
        """Call `save` with the index and the (1 + V, n, D) float32 features of each block."""
        pending = deque()

        def batches() -> Iterator[list[int]]:
            for block in blocks:
                indices = list(range(block * BLOCK, min((block + 1) * BLOCK, len(images))))
                pending.append((block, len(indices)))
                yield from (indices[start:start + self.batch_size] for start in range(0, len(indices), self.batch_size))
        dataset = ImageViews(images, num_views, self.data_config, self.augmentation, self.seed)
        loader = data_loader(dataset, self.workers, self.device, persistent=False, batch_sampler=batches())
        encoded, count = [], 0
        with self._inference(self.chosen):
            for batch in loader:  # (B, 1 + V, c, H, W)
                encoded.append(torch.stack([self._encode(view).cpu() for view in batch.unbind(1)]))
                count += len(batch)
                progress.advance(more=len(batch))
                if count == pending[0][1]:
                    save(pending.popleft()[0], torch.cat(encoded, 1))
                    encoded, count = [], 0

    @contextmanager
    def _inference(self, precision: str) -> Iterator[None]:
        dtype = torch.bfloat16 if precision == 'float32' else getattr(torch, precision)
        with frozen(self.model), torch.inference_mode(), torch.autocast(
                self.device.type, dtype, enabled=precision != 'float32'):
            yield

    def _encode(self, images: Tensor) -> Tensor:
        """(B, c, H, W) uint8 images -> (B, D) float32 features."""
        images = self.normalize(images.to(self.device, non_blocking=True))
        if self.device.type == 'cpu':
            images = images.contiguous(memory_format=torch.channels_last)  # the faster layout of most convolutions
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True).float()

    def _choose_precision(self, images: ImageSet, shape: tuple[int, int, int]) -> str:
        """Choose bfloat16 or float32 by a timing of a few images, once for all sets; float32 if all takes seconds."""
        if self.chosen:
            return self.chosen
        if self.device.type != 'cpu' or not torch.ops.mkldnn._is_mkldnn_bf16_supported() or not len(images):
            return 'float32'
        dataset = ImageViews(images, 0, self.data_config, self.augmentation, self.seed)
        _, seconds = self._time('float32', dataset[0], budget=0)
        if shape[0] * shape[1] * seconds < SHORT:
            return 'float32'
        number = max(min(8, self.batch_size, len(images), int(0.3 / seconds)), 1)
        batch = torch.cat([dataset[index] for index in range(number)])
        expected, seconds = self._time('float32', batch)
        if shape[0] * shape[1] * seconds / number < SHORT:
            return 'float32'
        found, faster = self._time('bfloat16', batch)
        cosine = torch.cosine_similarity(expected, found).min().item()
        precision = 'bfloat16' if 1.1 * faster < seconds and cosine > 0.99 else 'float32'
        _logger.info(f'Precision of the encoder: {precision}; bfloat16 {number / faster:.0f} images/s, float32 '
                     f'{number / seconds:.0f}, cosine of their features at least {cosine:.4f}')
        return precision

    def _time(self, precision: str, batch: Tensor, budget: float = 0.3) -> tuple[Tensor, float]:
        """(B, D) features of a batch, and the least seconds of as many runs as begin within the budget, at least one."""
        times = []
        with self._inference(precision):
            while not times or sum(times) < budget:
                start = time.perf_counter()
                features = self._encode(batch)
                times.append(time.perf_counter() - start)
        return features, min(times)


def default_workers() -> int:
    """Cores for each process of this machine, from 1 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)), 1), 16)


class ExtractionProgress(Progress):
    """Progress of an extraction by several processes.

    Args:
        shape: (1 + V, N, D).
        done: Images that were finished before.
    """

    def __init__(self, shape: tuple[int, int, int], done: int = 0):
        super().__init__(shape[1], done=done)
        self.shape, self.done, self.pending = shape, done, 0

    def advance(self, finished: int | None = None, more: int = 0) -> None:
        """Show `finished` images of all processes, or `more` of this one, which its next block will finish."""
        if finished is not None:
            self.done, self.pending = finished, 0
        self.pending += more
        self.show(self.done + self.pending)

    def close(self) -> None:
        """Remove the bar and log time and rate."""
        self.bar.close()
        seconds, number = time.perf_counter() - self.start, self.shape[1] - self.first
        _logger.info(f'{_size((self.shape[0], number))} in {seconds:.1f} s ({number / seconds:.0f} images/s)')


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]:,} images x {shape[0]} view{'s' if shape[0] > 1 else ''}"


@contextmanager
def frozen(model: nn.Module):
    """Set the model to eval mode, so that no running statistic changes, and restore its mode on exit."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def weights_digest(model: nn.Module) -> str:
    """sha256 of the architecture's name and of all weights and statistics except the classifier's."""
    classifier = {id(tensor) for tensor in model.get_classifier().state_dict(keep_vars=True).values()}
    digest = hashlib.sha256(str(model.pretrained_cfg.get('architecture', type(model).__name__)).encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in classifier:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
