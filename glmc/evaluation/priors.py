"""Test distributions and what they change: which images are kept, and how logits move from one prior to another."""
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from glmc.data.profiles import long_tail_counts
from glmc.errors import InputError

PRIOR_IMAGES = 10 ** 6  # that stand for a prior given as shares: a share of zero is taken for half an image
TARGETS = ('uniform', 'forward', 'backward')


def ranked_counts(train_counts: Sequence[int], n_max: int, kind: str, imbalance_factor: float) -> np.ndarray:
    """Test images per class of the test-agnostic benchmark (SADE, Zhang et al., arXiv 2107.09249).

    `forward`: n_max·F^(-r/(C-1)) for the class of rank r by training images, as long-tailed as training is; `backward`:
    the same the other way round; `uniform`: n_max of each. Classes with equally many training images rank by label.

    Args:
        train_counts: (C,) training images per class.
        n_max: Test images of the largest class.
        kind: One of TARGETS.
        imbalance_factor: F, which `uniform` has no use for.

    Returns:
        (C,) int64 counts.

    Raises:
        ValueError: If a class would be left without an image or `kind` is unknown.
    """
    factor = _factor(kind, imbalance_factor)
    return _by_rank(long_tail_counts(n_max, len(train_counts), factor), train_counts, kind)


def target_prior(train_counts: Sequence[int], kind: str, imbalance_factor: float) -> np.ndarray:
    """(C,) class probabilities of `ranked_counts`, before rounding to images."""
    rank = np.arange(len(train_counts)) / max(len(train_counts) - 1, 1)
    shares = _by_rank(_factor(kind, imbalance_factor) ** -rank, train_counts, kind)
    return shares / shares.sum()


def _factor(kind: str, imbalance_factor: float) -> float:
    if kind not in TARGETS:
        raise ValueError(f"kind must be one of {', '.join(TARGETS)}, got {kind!r}")
    return 1.0 if kind == 'uniform' else imbalance_factor


def _by_rank(profile: np.ndarray, train_counts: Sequence[int], kind: str) -> np.ndarray:
    """A profile that falls with the rank, or with `backward` rises, in the order of the classes."""
    order = np.argsort(-np.asarray(train_counts), kind='stable')
    values = np.empty_like(profile)
    values[order] = profile[::-1] if kind == 'backward' else profile
    return values


def read_prior(path: str, num_classes: int) -> np.ndarray:
    """(C,) class probabilities from a file of weights, images or shares: a JSON list, or one number a line.

    Raises:
        InputError: If the file is neither, or has another number of classes.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
        weights = np.array(json.loads(text) if text.lstrip()[:1] == '[' else text.split(), dtype=np.float64)
        if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise ValueError('expected numbers >= 0, not all of them 0')
    except (OSError, ValueError, TypeError, RecursionError) as error:
        detail = getattr(error, 'strerror', None) or error
        raise InputError(f"--target-prior {path}: expected {', '.join(TARGETS)}, test, or a file with a weight per class: "
                         f'{detail}') from error
    if len(weights) != num_classes:
        raise InputError(f'--target-prior {path}: found {len(weights)} classes, the model has {num_classes}')
    return normalized(weights / weights.sum() * PRIOR_IMAGES)


def normalized(counts: Sequence[float]) -> np.ndarray:
    """(C,) float64 probabilities; classes that were counted zero times get those of half an image."""
    counts = np.maximum(np.asarray(counts, dtype=np.float64), 0.5)
    return counts / counts.sum()


def resolve_prior(prior: str | Sequence[float], train_counts: Sequence[int]) -> np.ndarray:
    """(C,) probabilities of the class prior that a classifier embodies, as an export names it.

    Args:
        prior: `train` for the prior of the training set, `uniform`, or C probabilities.
        train_counts: (C,) training images per class.
    """
    if prior == 'uniform':
        return normalized(np.ones(len(train_counts)))
    if prior == 'train':
        return normalized(train_counts)
    shares = np.asarray(prior, dtype=np.float64)
    return shares / shares.sum()


def prior_shift(source: Sequence[float], target: Sequence[float]) -> Tensor:
    """What to add to logits learnt under one class prior to use them under another: log π_target - log π_source.

    Logit adjustment (Menon et al., arXiv 2007.07314; Saerens et al. 2002).

    Args:
        source: (C,) probabilities the classifier embodies.
        target: (C,) probabilities it will meet.

    Returns:
        (C,) float32, zero where nothing changes.
    """
    return torch.from_numpy(np.log(np.asarray(target)) - np.log(np.asarray(source))).float()


class AdjustedModel(nn.Module):
    """A model whose logits are averaged over the mirrored image and moved to another class prior.

    Args:
        model: Images -> (B, C) logits.
        shift: (C,) of `prior_shift`, or None.
        flip: Average the logits of image and mirror image.
    """

    def __init__(self, model: nn.Module, shift: Tensor | None = None, flip: bool = False):
        super().__init__()
        self.model, self.flip = model, flip
        self.register_buffer('shift', shift)

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images).float()
        if self.flip:
            logits = (logits + self.model(images.flip(-1)).float()) / 2
        return logits if self.shift is None else logits + self.shift
