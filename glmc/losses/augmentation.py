"""Logits of implicitly augmented features."""
import torch
from torch import Tensor

from glmc.models.classifier import no_autocast


def implicit_augmentation(
        logits: Tensor, weight: Tensor, labels: Tensor, covariance: Tensor, shift: Tensor, variance: float | Tensor,
        amount: float | Tensor) -> Tensor:
    """s'_j = s_j + ½·b·(w_j - w_y)ᵀΣ_y(w_j - w_y) + a·(w_j - w_y)·δ_y (RISDA; arXiv 2112.07928).

    Cross-entropy of s' bounds that of logits of features r + N(a·δ_y, b·Σ_y) from above (ISDA; arXiv 1909.12220). In float32
    or float64 whatever autocast says.

    Args:
        logits: (B, C) logits s = W·r + bias.
        weight: (C, D) W of the classifier.
        labels: (B,) labels y.
        covariance: (C, D, D) Σ of each class, or its (C, D) diagonal.
        shift: (C, D) δ of each class.
        variance: b.
        amount: a.

    Returns:
        (B, C) s', with s'_y = s_y.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with no_autocast(logits):
        weight, own = weight.to(dtype), weight.to(dtype)[labels]  # (C, D), (B, D)
        sigma = covariance.to(dtype)[labels]
        if sigma.ndim == 3:
            rotated = weight @ sigma  # (B, C, D)
            cross = torch.bmm(rotated, own[:, :, None])[..., 0]
            quadratic = (rotated * weight).sum(2) - 2 * cross + cross.gather(1, labels[:, None])
        else:
            quadratic = sigma @ (weight ** 2).T - 2 * (sigma * own) @ weight.T + (sigma * own ** 2).sum(1, keepdim=True)
        moved = shift.to(dtype)[labels] @ weight.T  # (B, C)
        return logits.to(dtype) + variance / 2 * quadratic + amount * (moved - moved.gather(1, labels[:, None]))
