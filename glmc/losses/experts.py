"""Losses of several experts on one image: one free function per equation."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def diversity_temperatures(counts: Sequence[int], eta: float = 0.05) -> Tensor:
    """Temperatures T_c = u_c / max u, u_c = η·C·π_c + 1 - η, lower for rarer classes (RIDE; arXiv 2010.01809, Eq. 3).

    Args:
        counts: (C,) training images per class.
        eta: η in [0, 1); 0 gives 1 for every class.

    Returns:
        (C,) float32.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    u = eta * len(counts) * counts / counts.sum() + 1 - eta
    return (u / u.max()).float()


def expert_diversity(logits: Tensor, temperature: Tensor) -> Tensor:
    """Σ_k T̄²·KL(softmax(s̄/T) ‖ softmax(s_k/T)), s̄ = mean_k s_k a constant (RIDE; arXiv 2010.01809).

    Args:
        logits: (B, K, C) logits s_k of each expert.
        temperature: (C,) T; T̄ is its mean.

    Returns:
        Scalar, mean over the batch; RIDE maximises it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = (logits / temperature).log_softmax(2)
    log_mean = (logits.detach().mean(1, keepdim=True) / temperature).log_softmax(2).expand_as(log_p)
    return temperature.mean() ** 2 * F.kl_div(log_p, log_mean, reduction='sum', log_target=True) / len(logits)


def balanced_experts(logits: Tensor, targets: Tensor, adjustments: Tensor) -> Tensor:
    """mean_k CE(s_k + τ_k·log π, y), each expert for another class prior (BalPoE; arXiv 2206.05260).

    Args:
        logits: (B, K, C) logits s_k of each expert.
        targets: (B,) labels, or (B, C) soft labels.
        adjustments: (K, C) τ_k·log π.

    Returns:
        Scalar. The mean over the experts is that of the authors' code.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) + adjustments
    return sum(F.cross_entropy(each, targets) for each in logits.unbind(1)) / logits.shape[1]


def expert_taus(number: int, tau: float = 1.0) -> Tensor:
    """(K,) τ_k from 0 to 2τ at equal steps, so that their mean is τ; τ itself for one expert."""
    return torch.linspace(0, 2 * tau, number) if number > 1 else torch.tensor([tau])
