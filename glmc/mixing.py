"""Global and local mixture of two batches: MixUp, CutMix and the two GLMC views (pure tensors)."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Mixture(NamedTuple):
    """The random numbers of one step's mixture, drawn outside the step so that it compiles to one graph."""
    lam: Tensor  # () weight of the first image in the global view
    box: Tensor  # (4,) int64 y0, y1, x0, x1 of the patch of the second image in the local view
    local_lam: Tensor  # () weight of the first image's label in the local view
    uniform: Tensor | None = None  # (B,) numbers in [0, 1) that choose partners within the batch

    def to(self, device: torch.device) -> 'Mixture':
        return Mixture(*(value if value is None else value.to(device, non_blocking=True) for value in self))


def mixup(a: Tensor, b: Tensor, lam: float | Tensor) -> Tensor:
    """λ·a + (1-λ)·b (GLMC Eq. 1; Zhang et al., arXiv 1710.09412), for images and for labels of any shape."""
    if a.shape != b.shape:
        raise ValueError(f'mixup needs two batches of one shape, got {tuple(a.shape)} and {tuple(b.shape)}')
    return lam * a + (1 - lam) * b


def cutmix(a: Tensor, b: Tensor, box: tuple[int, int, int, int] | Tensor) -> Tensor:
    """Images a with the box of b pasted in (GLMC Eq. 2; Yun et al., arXiv 1905.04899).

    Args:
        a: (B, ..., H, W) images.
        b: Images to take the box from, of the same shape.
        box: (y0, y1, x0, x1) in pixels, ends excluded; ints or a (4,) tensor.

    Returns:
        A new tensor like a.
    """
    if a.shape != b.shape:
        raise ValueError(f'cutmix needs two batches of one shape, got {tuple(a.shape)} and {tuple(b.shape)}')
    y0, y1, x0, x1 = box
    y = torch.arange(a.shape[-2], device=a.device)[:, None]
    x = torch.arange(a.shape[-1], device=a.device)
    return torch.where((y >= y0) & (y < y1) & (x >= x0) & (x < x1), b, a)


def random_box(height: int, width: int, lam: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Box with sides √(1-λ)·(H, W) around a uniform centre, clipped at the border (GLMC Eq. 3).

    Returns:
        (y0, y1, x0, x1) in pixels, ends excluded.
    """
    ratio = (1 - lam) ** 0.5
    box = []
    for size in (height, width):
        side = int(size * ratio)
        start = int(rng.integers(size)) - side // 2
        box += [max(start, 0), min(start + side, size)]
    return tuple(box)


def draw_mixture(
        image_size: tuple[int, int], beta: float, cutmix_lambda: str, rng: np.random.Generator) -> Mixture:
    """One λ ~ Beta(β, β) and one box for a step, shared by both views.

    Args:
        image_size: (H, W) in pixels.
        beta: β > 0.
        cutmix_lambda: Label weight of the local view: `nominal` is λ itself, `area` is corrected for clipping.
        rng: Owner of the random numbers.
    """
    lam = float(rng.beta(beta, beta))
    box = random_box(*image_size, lam, rng)
    area = (box[1] - box[0]) * (box[3] - box[2])
    local_lam = 1 - area / (image_size[0] * image_size[1]) if cutmix_lambda == 'area' else lam
    return Mixture(torch.tensor(lam), torch.tensor(box), torch.tensor(local_lam))


def partners_within(labels: Tensor, class_weight: Tensor, uniform: Tensor) -> Tensor:
    """A partner for each image from its own batch, P(image) ∝ class_weight of its label, by inverse distribution.

    Args:
        labels: (B,) labels.
        class_weight: (C,) n^-q.
        uniform: (B,) random numbers in [0, 1).

    Returns:
        (B,) indices into the batch.
    """
    cumulative = class_weight[labels].cumsum(0)
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(labels) - 1)


class GLMCMixer:
    """Turns the views of a batch of pairs into the global and the local mixture with their soft labels.

    Args:
        counts: (C,) training images per class.
        mix_beta: β of Beta(β, β).
        cutmix_lambda: `nominal` or `area`, see `draw_mixture`.
        partner: `sampler`: batches hold both images of a pair; `batch`: they hold single images, and each finds its
            partner among them.
        resample_power: q of the partners within a batch.
    """

    def __init__(
            self, counts: Sequence[int], mix_beta: float = 1.0, cutmix_lambda: str = 'nominal',
            partner: str = 'sampler', resample_power: float = 0.0):
        self.num_classes, self.mix_beta, self.cutmix_lambda = len(counts), mix_beta, cutmix_lambda
        self.within_batch = partner == 'batch'
        self.partner_weight = torch.as_tensor(counts, dtype=torch.float64).clamp(min=1) ** -resample_power

    def draw(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture:
        """The random numbers of one step."""
        mixture = draw_mixture(image_size, self.mix_beta, self.cutmix_lambda, rng)
        return mixture._replace(uniform=torch.from_numpy(rng.random(batch_size))) if self.within_batch else mixture

    def __call__(self, views: Tensor, labels: Tensor, mixture: Mixture) -> tuple[tuple[Tensor, Tensor], ...]:
        """Mix image i with its partner j.

        Args:
            views: (B, 4, c, H, W) images, uint8 or float: i for the global and the local view, then j for the same; without
                j, (B, 2, c, H, W), partners are drawn from the batch.
            labels: (B, 2) labels of i and j, or (B, 1).
            mixture: From `draw`, on the device of the views.

        Returns:
            (global view, local view), each (B, c, H, W), and their (B, C) soft labels.
        """
        if self.within_batch:
            self.partner_weight = self.partner_weight.to(labels.device)
            partners = partners_within(labels[:, 0], self.partner_weight, mixture.uniform)
            views, labels = torch.cat([views, views[partners]], 1), torch.cat([labels, labels[partners]], 1)
        i_global, i_local, j_global, j_local = views.unbind(1)
        i_label, j_label = F.one_hot(labels, self.num_classes).to(mixture.lam.dtype).unbind(1)
        images = mixup(i_global, j_global, mixture.lam), cutmix(i_local, j_local, mixture.box)
        targets = mixup(i_label, j_label, mixture.lam), mixup(i_label, j_label, mixture.local_lam)
        return images, targets
