"""The losses of GLMC: one free function per equation."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.loss.class_weights import compute_class_weights
from torch import Tensor


def class_weights(counts: Sequence[int], power: float) -> Tensor:
    """Class weights w_c = C·n_c^-k / Σ n^-k, mean 1 (GLMC Eq. 7).

    Args:
        counts: (C,) training images per class, each at least 1.
        power: k; 0 weighs all classes alike, 1 by inverse frequency.

    Returns:
        (C,) float32.

    Raises:
        ValueError: If a class has no image.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.ndim != 1 or not counts.numel() or counts.min() < 1:
        raise ValueError('class_weights needs one count >= 1 per class')
    return compute_class_weights(counts, int(counts.sum()), method='inv_freq', power=power)[1]


def soft_cross_entropy(logits: Tensor, targets: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Cross-entropy with soft labels, -Σ_k w_k·p_k·log softmax_k (GLMC Eq. 6; with weights Eq. 8, one-hot form).

    Mixing is linear, so weighting the mixed label equals mixing the weighted one-hot labels.

    Args:
        logits: (B, C).
        targets: (B, C) label distributions p.
        class_weight: (C,) w, or None for 1.

    Returns:
        Scalar, mean over the batch.

    Raises:
        ValueError: If the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(f'logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape')
    if class_weight is not None:
        targets = targets * class_weight
    return -(targets * F.log_softmax(logits.to(targets.dtype), dim=-1)).sum(-1).mean()


def negative_cosine(prediction: Tensor, projection: Tensor) -> Tensor:
    """Negative cosine similarity with stop-gradient on the projection (GLMC Eq. 4; SimSiam, arXiv 2011.10566).

    Args:
        prediction: (B, d) output u of the predictor, any float dtype.
        projection: (B, d) output h of the projection of the other view; treated as a constant.

    Returns:
        Scalar in [-1, 1], mean over the batch.

    Raises:
        ValueError: If the shapes differ.
    """
    if prediction.shape != projection.shape:
        raise ValueError(
            f'prediction {tuple(prediction.shape)} and projection {tuple(projection.shape)} differ in shape')
    return -F.cosine_similarity(prediction, projection.detach(), dim=-1).mean()


def cumulative_alpha(progress: float, power: float = 2.0) -> float:
    """Weight of the conventional classifier, α = 1 - (T/T_max)² (GLMC Eq. 10).

    Args:
        progress: T/T_max in [0, 1]: 0 in the first epoch, so that α starts at 1; T is 0-based, so that α never is 0.
        power: The exponent; the larger, the longer α stays near 1.
    """
    return 1 - progress ** power
