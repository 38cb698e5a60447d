"""Features of a frozen encoder: extracted once into a memory-mapped file, which later runs read."""
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from glmc.data.datasets import ImageSet
from glmc.data.loaders import EvalDataset, ViewDataset, create_normalize, eval_transform, image_mode
from glmc.data.transforms import view_transform
from glmc.files import atomic_write

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Pooled features of N images. The rows are read as needed, so that a memory-mapped file need not fit into memory.

    Args:
        views: (1 + V, M, D) features of the plain view, then of V augmented views.
        labels: (N,) int64 labels.
        index: (N,) int64 positions of these images among the M of `views`; None for all of them.
    """
    views: Tensor
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


class Extractor:
    """Extract the features of image sets with a frozen encoder.

    Args:
        model: Bare timm model.
        data_config: timm's input_size, mean, std, interpolation and crop_pct.
        augmentation: Options of `transforms.view_transform` for the augmented views.
        accelerator: Device and precision.
        cache: Folder of the feature files; None writes no files.
        batch_size: Images per batch of the loader.
        workers: Processes of the loader.
        seed: Seed of the augmented views.
    """

    def __init__(self, model: nn.Module, *, data_config: dict, augmentation: dict, accelerator: Accelerator,
                 cache: str | Path | None = None, batch_size: int = 64, workers: int = 2, seed: int = 42):
        self.model, self.data_config, self.augmentation = model, data_config, augmentation
        self.accelerator, self.cache, self.seed = accelerator, cache and Path(cache), seed
        self.batch_size, self.workers = batch_size, workers
        self.normalize = create_normalize(data_config, accelerator.device)
        self.identity = weights_digest(model)

    def __call__(self, images: ImageSet, num_views: int = 0) -> Features:
        """Features of the plain view and of `num_views` augmented views, read from the cache if it contains them."""
        shape = (1 + num_views, len(images), self.model.head_hidden_size)
        labels = torch.from_numpy(images.labels)
        if self.cache is None:
            values = np.empty(shape, dtype=np.float32)
            self.extract(images, values)
            return Features(torch.from_numpy(values), labels)
        path = self.cache / f'{self.key(images, num_views)}.npy'
        values = open_features(path, shape)
        if values is None:
            write_features(path, shape, lambda values: self.extract(images, values))
            values = open_features(path, shape)
        else:
            _logger.info(f'Features of {len(images):,} images read from {path}')
        return Features(torch.from_numpy(values), labels)

    def key(self, images: ImageSet, num_views: int) -> str:
        """Hash of everything that determines the features: weights, images in order, preprocessing and augmentation."""
        metadata = dict(
            weights=self.identity, source=images.source, images=list(images.identities()), labels=images.labels.tolist(),
            data_config=self.data_config, precision=self.accelerator.mixed_precision, views=num_views,
            augmentation=num_views and [self.augmentation, self.seed])
        return hashlib.sha256(json.dumps(metadata, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def extract(self, images: ImageSet, values: np.ndarray) -> None:
        """Fill a (1 + V, N, D) array with the features of the plain view and of V augmented views."""
        _logger.info(f'Extracting features: {len(images):,} images x {len(values)} views')
        mode, num_views = image_mode(self.data_config), len(values) - 1
        plain = EvalDataset(images, eval_transform(self.data_config), mode)
        self._fill(values[:1], self._loader(plain, batch_size=self.batch_size))
        if not num_views:
            return
        make_views = view_transform(
            self.data_config['input_size'][-2:], ('plain',) * num_views, mean=self.data_config['mean'], **self.augmentation)
        seeds = np.random.default_rng((self.seed, 2)).integers(2 ** 32, size=len(images)).tolist()
        samples = list(zip(seeds, range(len(images)), strict=True))
        batches = [samples[start:start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        self._fill(values[1:], self._loader(ViewDataset(images, make_views, mode), batch_sampler=batches))

    def _loader(self, dataset, **batching) -> DataLoader:
        return DataLoader(dataset, num_workers=self.workers, generator=torch.Generator(), **batching)

    def _fill(self, values: np.ndarray, loader: Iterable) -> None:
        """Encode batches of (B, c, H, W) images or (B, 1, V, c, H, W) views into consecutive slices of a (V, N, D) array."""
        start = 0
        with frozen(self.model), torch.inference_mode(), self.accelerator.autocast():
            for images, _ in tqdm(loader, leave=False, disable=not sys.stderr.isatty()):
                views = images.unsqueeze(1) if images.ndim == 4 else images.flatten(0, 1)  # (B, V, c, H, W)
                encoded = self._encode(views.flatten(0, 1)).unflatten(0, views.shape[:2])
                values[:, start:start + len(images)] = encoded.transpose(0, 1).cpu().numpy()
                start += len(images)

    def _encode(self, images: Tensor) -> Tensor:
        maps = self.model.forward_features(self.normalize(images.to(self.accelerator.device, non_blocking=True)))
        return self.model.forward_head(maps, pre_logits=True).float()  # (B, D)


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


def open_features(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Memory-map a file copy-on-write; None if it is missing, unreadable or of another shape."""
    try:
        values = np.load(path, mmap_mode='c')
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == shape and values.dtype == np.float32 else None


def write_features(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
    """Write a temporary file and rename it to `path` when it is complete.

    Args:
        path: Path of the file.
        shape: Shape of the float32 array.
        fill: Function that fills the memory-mapped array.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        values = np.lib.format.open_memmap(temporary, 'w+', np.float32, shape)
        fill(values)
        values.flush()
