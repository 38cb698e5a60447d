"""Class priors: test sets subsampled to a prior, and logits adjusted from one prior to another."""
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop

from glmc.config import TARGETS
from glmc.data.profiles import long_tail_counts
from glmc.errors import InputError

PRIOR_IMAGES = 10 ** 6  # total images of a prior given as weights: zero weight counts as half an image


def ranked_counts(train_counts: Sequence[int], n_max: int, kind: str, imbalance_factor: float) -> np.ndarray:
    """Test images per class of the test-agnostic benchmark (SADE, Zhang et al., arXiv 2107.09249).

    `forward`: n_max·F^(-r/(C-1)) images for the class of rank r by training images. `backward`: the same counts in
    reverse order. `uniform`: n_max images of each class. Classes with the same number of training images rank by label.

    Args:
        train_counts: (C,) training images per class.
        n_max: Test images of the largest class.
        kind: A name in TARGETS.
        imbalance_factor: F; `uniform` ignores it.

    Returns:
        (C,) int64 counts.

    Raises:
        ValueError: If a class would have no image or `kind` is unknown.
    """
    factor = _factor(kind, imbalance_factor)
    return _by_rank(long_tail_counts(n_max, len(train_counts), factor), train_counts, kind)


def target_prior(train_counts: Sequence[int], kind: str, imbalance_factor: float) -> np.ndarray:
    """Class probabilities (C,) of `ranked_counts` without rounding to images; same arguments."""
    rank = np.arange(len(train_counts)) / max(len(train_counts) - 1, 1)
    weights = _by_rank(_factor(kind, imbalance_factor) ** -rank, train_counts, kind)
    return weights / weights.sum()


def _factor(kind: str, imbalance_factor: float) -> float:
    if kind not in TARGETS:
        raise ValueError(f"kind must be one of {', '.join(TARGETS)}, got {kind!r}")
    return 1.0 if kind == 'uniform' else imbalance_factor


def _by_rank(profile: np.ndarray, train_counts: Sequence[int], kind: str) -> np.ndarray:
    """Assign a (C,) descending profile to the classes by rank, in reverse for `backward`; (C,) in label order."""
    order = np.argsort(-np.asarray(train_counts), kind='stable')
    values = np.empty_like(profile)
    values[order] = profile[::-1] if kind == 'backward' else profile
    return values


def read_prior(path: str, num_classes: int) -> np.ndarray:
    """Read class probabilities (C,) from a file of weights or image counts: a JSON list, or one number a line.

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
    """Normalise image counts to (C,) float64 probabilities; a count of zero is replaced by half an image."""
    counts = np.maximum(np.asarray(counts, dtype=np.float64), 0.5)
    return counts / counts.sum()


def resolve_prior(prior: str | Sequence[float], train_counts: Sequence[int]) -> np.ndarray:
    """Resolve the class prior that an export stores to (C,) float64 probabilities.

    Args:
        prior: `train` for the prior of the training set, `uniform`, or (C,) weights; zero is replaced by 5e-7 of the sum.
        train_counts: (C,) training images per class.
    """
    if prior == 'uniform':
        return normalized(np.ones(len(train_counts)))
    if prior == 'train':
        return normalized(train_counts)
    weights = np.asarray(prior, dtype=np.float64)
    weights = np.where(weights > 0, weights, 0.5 / PRIOR_IMAGES * weights.sum())
    return weights / weights.sum()


def prior_shift(source: Sequence[float], target: Sequence[float]) -> Tensor:
    """Adjustment of logits from one class prior to another: log π_target - log π_source.

    Logit adjustment (Menon et al., arXiv 2007.07314; Saerens et al. 2002).

    Args:
        source: (C,) probabilities that the classifier embodies.
        target: (C,) probabilities of the test images.

    Returns:
        (C,) float32 to add to the logits.
    """
    return torch.from_numpy(np.log(np.asarray(target)) - np.log(np.asarray(source))).float()


def resolve_shift(
        target: str | None, source: str | Sequence[float], train_counts: Sequence[int], imbalance_factor: float,
        test_counts: Sequence[int] | None = None) -> Tensor | None:
    """Resolve `--target-prior` to the (C,) adjustment of the logits; None without it.

    Args:
        target: A name in TARGETS, `test`, or a file of `read_prior`.
        source: Class prior that the classifier has learnt, as for `resolve_prior`.
        train_counts: (C,) training images per class.
        imbalance_factor: F of `target_prior`.
        test_counts: (C,) images per class of `test`; None if they are unknown.

    Raises:
        InputError: If the target is `test` without counts, or a file that cannot be read.
    """
    if not target:
        return None
    if target == 'test' and test_counts is None:
        raise InputError(f"--target-prior test: the classes of the images are unknown, expected {', '.join(TARGETS)}, or a "
                         'file with a weight per class')
    if target == 'test':
        prior = normalized(test_counts)
    elif target in TARGETS:
        prior = target_prior(train_counts, target, imbalance_factor)
    else:
        prior = read_prior(target, len(train_counts))
    return prior_shift(resolve_prior(source, train_counts), prior)


class AdjustedModel(nn.Module):
    """Wrap a model with test-time augmentation and an adjustment to another class prior.

    Args:
        model: Module from (B, c, H, W) images to (B, C) logits.
        shift: (C,) result of `prior_shift`, or None.
        flip: Average the logits of image and mirror image.
        crop: (H, W); average the logits of the corners and the centre of larger images (LIFT; arXiv 2309.10019).
    """

    def __init__(
            self, model: nn.Module, shift: Tensor | None = None, flip: bool = False, crop: tuple[int, int] | None = None):
        super().__init__()
        self.model, self.flip, self.crop = model, flip, crop
        self.register_buffer('shift', shift)

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()

    def forward(self, images: Tensor) -> Tensor:
        views = five_crop(images, self.crop) if self.crop else (images,)
        if self.flip:
            views = [*views, *(view.flip(-1) for view in views)]
        logits = sum(self.model(view).float() for view in views) / len(views)
        return logits if self.shift is None else logits + self.shift
