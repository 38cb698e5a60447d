"""Probabilistic contrast with a von Mises-Fisher distribution of each class (ProCo; arXiv 2403.06726)."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glmc.models.classifier import no_autocast

LARGEST_CONCENTRATION = 1e5
ORDER = 32  # from which on five terms of the expansion are exact to 1e-9
DEBYE = (  # coefficients of p^k, p^(k+2), … of the k-th term
    (1, (1,)),
    (24, (3, -5)),
    (1152, (81, -462, 385)),
    (414720, (30375, -369603, 765765, -425425)),
    (39813120, (4465125, -94121676, 349922430, -446185740, 185910725)))


def log_bessel(order: float, x: Tensor) -> Tensor:
    """log I_ν(x) - ν·log x for x >= 0 of the modified Bessel function I_ν, finite at 0; its gradient is I_{ν+1}(x) / I_ν(x).

    Debye's uniform expansion (NIST DLMF 10.41.3), for small orders at a larger one and then by the backward recurrence of
    the ratios, which is stable. Nothing depends on values, so that it compiles.

    Args:
        order: ν >= -1/2.
        x: float64 tensor of any shape.
    """
    steps = max(0, math.ceil(ORDER - order))
    log_i = _debye(order + steps, x)
    ratio = (_debye(order + steps + 1, x) - log_i).exp() if steps else None  # I_{n+1}(x) / (x·I_n(x))
    for n in (order + steps - step for step in range(steps)):
        ratio = 1 / (2 * n + x ** 2 * ratio)
        log_i = log_i - ratio.log()
    return log_i


def _debye(order: float, x: Tensor) -> Tensor:
    root = (order ** 2 + x ** 2).sqrt()
    p = order / root
    series = sum(sum(c * p ** (k + 2 * i) for i, c in enumerate(terms)) / (scale * order ** k)
                 for k, (scale, terms) in enumerate(DEBYE))
    return root - order * (order + root).log() - (2 * math.pi * root).log() / 2 + series.log()


def concentrations(means: Tensor) -> Tensor:
    """(C,) κ = d·R/(1 - R²), at most 1e5, of (C, d) mean unit features of length R (arXiv 2403.06726)."""
    length = means.norm(dim=1)
    free = 1 - length ** 2
    kappa = means.shape[1] * length / free
    return torch.where(free > 0, kappa, LARGEST_CONCENTRATION).clamp(max=LARGEST_CONCENTRATION)


def proco_logits(features: Tensor, means: Tensor, temperature: float) -> Tensor:
    """log E exp(z·z' / T) over features z' of each class, log C_d(κ_c) / C_d(κ̃) with κ̃ = ‖κ_c·μ_c + z/T‖ (ProCo).

    In float64 whatever autocast says.

    Args:
        features: (B, d) unit features z.
        means: (C, d) mean features of the classes, constants.
        temperature: T.

    Returns:
        (B, C) logits in the precision of the features, at least float32.
    """
    with no_autocast(features):
        z, means = features.double(), means.detach().double()
        kappa = concentrations(means)
        cosines = z @ F.normalize(means, dim=1).T  # (B, C)
        squared = kappa ** 2 + 2 * kappa * cosines / temperature + (z ** 2).sum(1, keepdim=True) / temperature ** 2
        order = means.shape[1] / 2 - 1
        logits = log_bessel(order, squared.clamp(min=1e-12).sqrt()) - log_bessel(order, kappa)
        return logits.to(torch.promote_types(features.dtype, torch.float32))
