"""Classification losses: one free function per equation, and modules that hold class weights, margins and priors."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.loss.class_weights import compute_class_weights
from torch import Tensor, nn


def effective_number_weights(counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Class weights w_c ∝ (1 - β) / (1 - β^n_c), mean 1 (Cui et al., arXiv 1901.05555, Eq. 4); (C,) float32."""
    return compute_class_weights(counts, int(sum(counts)), method='effective_num', beta=beta)[1]


def prior_adjustment(counts: Sequence[int], tau: float = 1.0) -> Tensor:
    """Term that logit adjustment adds to the logits, τ·log π_c, π_c = n_c / Σ n (Menon et al., arXiv 2007.07314, Eq. 10).

    Returns:
        (C,) float32; zero for τ = 0, and equal for all classes if all have equally many images.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    return (tau * (counts / counts.sum()).log()).float()


def ldam_margins(counts: Sequence[int], largest: float = 0.5) -> Tensor:
    """Margins Δ_c ∝ n_c^(-1/4), that of the smallest class `largest`; (C,) float32 (arXiv 1906.07413, Eq. 13)."""
    margins = torch.as_tensor(counts, dtype=torch.float64) ** -0.25
    return (largest * margins / margins.max()).float()


def ldam_loss(logits: Tensor, targets: Tensor, margins: Tensor, class_weight: Tensor) -> Tensor:
    """Σ_i Σ_c p_ic·w_c·CE(z_i - m_c·onehot_c, c) / Σ_i Σ_c p_ic·w_c, LDAM on soft labels p (arXiv 1906.07413, Eq. 12).

    Args:
        logits: (B, C) scaled logits z.
        targets: (B, C) soft labels p of at most two classes each.
        margins: (C,) scaled margins m.
        class_weight: (C,) w.

    Returns:
        Scalar; for hard labels that of `LDAMLoss`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    share, classes = targets.topk(min(2, targets.shape[1]), dim=1)  # (B, 2)
    weight = share * class_weight[classes]
    one_hot = F.one_hot(classes, logits.shape[1])  # (B, 2, C)
    losses = -(logits[:, None] - one_hot * margins).log_softmax(2).gather(2, classes[..., None])[..., 0]
    return (weight * losses).sum() / weight.sum()


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0, class_weight: Tensor | None = None) -> Tensor:
    """-w_y·(1 - p_y)^γ·log p_y, p = softmax (Lin et al., arXiv 1708.02002; with weights Cui et al., arXiv 1901.05555).

    Args:
        logits: (B, C).
        labels: (B,).
        gamma: γ; 0 is cross-entropy.
        class_weight: (C,) w, or None for 1.

    Returns:
        Scalar, mean over the batch.
    """
    loss = F.cross_entropy(logits.float(), labels, reduction='none')  # (B,)
    missed = (1 - (-loss).exp()).clamp(min=1e-8)  # the gradient of 0^γ is infinite for γ < 1
    weight = 1 if class_weight is None else class_weight[labels]
    return (weight * missed ** gamma * loss).mean()


class FocalLoss(nn.Module):
    """`focal_loss` with one weight for all classes; arXiv 1708.02002.

    Args:
        counts: (C,) training images per class.
        focal_gamma: γ.
    """

    def __init__(self, counts: Sequence[int], focal_gamma: float = 2.0):
        super().__init__()
        self.gamma = focal_gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal_loss(logits, labels, self.gamma)


class ClassBalancedFocalLoss(FocalLoss):
    """`focal_loss` weighted by the effective number of images; arXiv 1901.05555, there with sigmoids, here with softmax."""

    def __init__(self, counts: Sequence[int], focal_gamma: float = 2.0, effective_beta: float = 0.9999):
        super().__init__(counts, focal_gamma)
        self.register_buffer('class_weight', effective_number_weights(counts, effective_beta), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal_loss(logits, labels, self.gamma, self.class_weight)


class LogitAdjustedLoss(nn.Module):
    """Cross-entropy of logits + τ·log π (arXiv 2007.07314); with τ = 1 it is Balanced Softmax (arXiv 2007.10740).

    Args:
        counts: (C,) training images per class.
        adjustment_tau: τ.
        smoothing: Label smoothing.
    """

    def __init__(self, counts: Sequence[int], adjustment_tau: float = 1.0, smoothing: float = 0.0):
        super().__init__()
        self.register_buffer('adjustment', prior_adjustment(counts, adjustment_tau), persistent=False)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float() + self.adjustment, labels, label_smoothing=self.smoothing)


class DeferredReweighting(nn.Module):
    """Cross-entropy with class weights by effective number from a certain epoch on (DRW; arXiv 1906.07413).

    The mean is torch's weighted mean, over the sum of the weights of the batch.

    Args:
        counts: (C,) training images per class.
        effective_beta: β of the effective number.
        drw_start: Fraction of the epochs with equal weights; 160 of 200 epochs in the paper.
    """

    def __init__(self, counts: Sequence[int], effective_beta: float = 0.9999, drw_start: float = 0.8):
        super().__init__()
        self.drw_start = drw_start
        self.register_buffer('deferred_weight', effective_number_weights(counts, effective_beta), persistent=False)
        self.register_buffer('class_weight', torch.ones(len(counts)), persistent=False)  # filled: nothing is compiled anew

    def set_progress(self, progress: float) -> None:
        """Set the weights for T/T_max = progress in [0, 1)."""
        started = progress >= self.drw_start
        self.class_weight.copy_(self.deferred_weight if started else torch.ones_like(self.deferred_weight))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, weight=self.class_weight)


class LDAMLoss(DeferredReweighting):
    """Label-distribution-aware margin on scaled cosines: cross-entropy of s·(cos - Δ_y·onehot_y) (arXiv 1906.07413, Eq. 12).

    Args:
        counts, effective_beta, drw_start: As those of `DeferredReweighting`.
        ldam_margin: Margin of the smallest class.
        cosine_scale: s of the cosine classifier that gives the logits s·cos.
    """

    def __init__(self, counts: Sequence[int], effective_beta: float = 0.9999, drw_start: float = 0.8,
                 ldam_margin: float = 0.5, cosine_scale: float = 30.0):
        super().__init__(counts, effective_beta, drw_start)
        self.register_buffer('margins', cosine_scale * ldam_margins(counts, ldam_margin), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        margins = F.one_hot(labels, logits.shape[1]) * self.margins  # (B, C)
        return super().forward(logits.float() - margins, labels)
