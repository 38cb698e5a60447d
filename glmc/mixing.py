"""Mixtures of two batches: MixUp, CutMix, the two GLMC views, and pairs as they are (pure tensors)."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from torch import Tensor


class Mixture(NamedTuple):
    """The random numbers of one step's mixture, drawn outside the step so that it compiles to one graph."""
    lam: Tensor  # () weight of the first image in the global view
    box: Tensor  # (4,) int64 y0, y1, x0, x1 of the patch of the second image in the local view
    local_lam: Tensor  # () weight of the first image's label in the local view
    uniform: Tensor | None = None  # (B,) numbers in [0, 1) that choose partners within the batch

    def to(self, device: torch.device) -> 'Mixture':
        return Mixture(*(value if value is None else value.to(device, non_blocking=True) for value in self))


IDENTITY_MIXTURE = Mixture(torch.tensor(1.0), torch.tensor([0, 0, 0, 0]), torch.tensor(1.0))


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


def sample_mixture(
        image_size: tuple[int, int], beta: float, cutmix_lambda: str, rng: np.random.Generator,
        probability: float = 1.0) -> Mixture:
    """One λ ~ Beta(β, β) and one box for a step, shared by both views.

    Args:
        image_size: (H, W) in pixels.
        beta: β > 0.
        cutmix_lambda: Label weight of the local view: `nominal` is λ itself, `area` is corrected for clipping.
        rng: Owner of the random numbers.
        probability: Of a mixture at all.
    """
    if probability < 1 and rng.random() >= probability:
        return IDENTITY_MIXTURE
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


class BatchMixup:
    """MixUp of each image with its place from the end of the batch, one λ a batch, as timm's `Mixup` does.

    timm's own draws from the global generator, wants an even batch and changes its input; arXiv 1710.09412.

    Args:
        counts: (C,) training images per class.
        mix_beta: β of Beta(β, β).
        mixup_prob: Probability that a batch is mixed.
    """
    cutmix_lambda = 'nominal'

    def __init__(self, counts: Sequence[int], mix_beta: float = 1.0, mixup_prob: float = 1.0):
        self.num_classes, self.mix_beta, self.mixup_prob = len(counts), mix_beta, mixup_prob

    def sample_params(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture:
        """The random numbers of one step."""
        return sample_mixture(image_size, self.mix_beta, self.cutmix_lambda, rng, self.mixup_prob)

    def __call__(self, views: Tensor, labels: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """(B, 1, c, H, W) views and (B, 1) labels -> (B, c, H, W) images and (B, C) soft labels."""
        images = views[:, 0]
        return mixup(images, images.flip(0), mixture.lam), mixup_target(labels, self.num_classes, mixture.lam)


class BatchCutmix(BatchMixup):
    """CutMix of each image with its place from the end of the batch, one box a batch, as timm's; arXiv 1905.04899.

    Args:
        counts, mix_beta, mixup_prob: As those of `BatchMixup`.
        cutmix_lambda: `nominal` or `area`, see `sample_mixture`.
    """

    def __init__(self, counts: Sequence[int], mix_beta: float = 1.0, mixup_prob: float = 1.0, cutmix_lambda: str = 'area'):
        super().__init__(counts, mix_beta, mixup_prob)
        self.cutmix_lambda = cutmix_lambda

    def __call__(self, views: Tensor, labels: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
        images = views[:, 0]
        targets = mixup_target(labels, self.num_classes, mixture.local_lam)
        return cutmix(images, images.flip(0), mixture.box), targets


class PairMixer:
    """Both images of a pair as they are: the input of two branches; base of what mixes them.

    Args:
        counts: (C,) training images per class.
        partner: `sampler`: batches hold both images of a pair; `batch`: they hold single images, and each finds its
            partner among them.
        resample_power: q of the partners within a batch.
    """

    def __init__(self, counts: Sequence[int], partner: str = 'sampler', resample_power: float = 0.0):
        self.num_classes = len(counts)
        self.within_batch = partner == 'batch'
        self.partner_weight = torch.as_tensor(counts, dtype=torch.float64).clamp(min=1) ** -resample_power

    def sample_params(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture | None:
        """The random numbers of one step."""
        mixture = self.sample_mixture(image_size, rng)
        if not self.within_batch:
            return mixture
        return (mixture or IDENTITY_MIXTURE)._replace(uniform=torch.from_numpy(rng.random(batch_size)))

    def sample_mixture(self, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture | None:
        return None

    def pairs(self, views: Tensor, labels: Tensor, mixture: Mixture | None) -> tuple[Tensor, Tensor]:
        """(B, 2·V, c, H, W) views of i, then of j, and (B, 2) labels; j from the batch where it holds single images."""
        if not self.within_batch:
            return views, labels
        self.partner_weight = self.partner_weight.to(labels.device)
        partners = partners_within(labels[:, 0], self.partner_weight, mixture.uniform)
        return torch.cat([views, views[partners]], 1), torch.cat([labels, labels[partners]], 1)

    def __call__(self, views: Tensor, labels: Tensor, mixture: Mixture | None) -> tuple[tuple[Tensor, ...], ...]:
        """(images of i, images of j), each (B, c, H, W), and their (B,) labels."""
        views, labels = self.pairs(views, labels, mixture)
        return views.unbind(1), labels.unbind(1)


class ResampledOnly(PairMixer):
    """The partner takes the place of the image: resampling by `resample_power`, with replacement."""

    def __call__(self, views: Tensor, labels: Tensor, mixture: Mixture | None) -> tuple[Tensor, Tensor]:
        images, labels = super().__call__(views, labels, mixture)
        return images[1], labels[1]


class CMOMixer(PairMixer):
    """CutMix of a resampled foreground j onto a background i drawn like the training set (CMO; arXiv 2112.00412).

    Args:
        counts, partner, resample_power: As those of `PairMixer`.
        mix_beta: β of Beta(β, β).
        mixup_prob: Probability that a batch is mixed.
        cutmix_lambda: `nominal` or `area`, see `sample_mixture`.
    """

    def __init__(self, counts: Sequence[int], mix_beta: float = 1.0, mixup_prob: float = 0.5, cutmix_lambda: str = 'area',
                 partner: str = 'sampler', resample_power: float = 1.0):
        super().__init__(counts, partner, resample_power)
        self.mix_beta, self.mixup_prob, self.cutmix_lambda = mix_beta, mixup_prob, cutmix_lambda

    def sample_mixture(self, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture:
        return sample_mixture(image_size, self.mix_beta, self.cutmix_lambda, rng, self.mixup_prob)

    def __call__(self, views: Tensor, labels: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
        (background, foreground), labels = super().__call__(views, labels, mixture)
        i_label, j_label = (F.one_hot(label, self.num_classes).to(mixture.lam.dtype) for label in labels)
        return cutmix(background, foreground, mixture.box), mixup(i_label, j_label, mixture.local_lam)


class GLMCMixer(PairMixer):
    """Turns the views of a batch of pairs into the global and the local mixture with their soft labels.

    Args:
        counts, partner, resample_power: As those of `PairMixer`.
        mix_beta: β of Beta(β, β).
        cutmix_lambda: `nominal` or `area`, see `sample_mixture`.
        mix_lambda: `shared`: one λ for both views; `per_view`: a second λ for the box and the label of the local view.
    """

    def __init__(
            self, counts: Sequence[int], mix_beta: float = 1.0, cutmix_lambda: str = 'nominal',
            partner: str = 'sampler', resample_power: float = 0.0, mix_lambda: str = 'shared'):
        super().__init__(counts, partner, resample_power)
        self.mix_beta, self.cutmix_lambda, self.mix_lambda = mix_beta, cutmix_lambda, mix_lambda

    def sample_mixture(self, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture:
        if self.mix_lambda == 'shared':
            return sample_mixture(image_size, self.mix_beta, self.cutmix_lambda, rng)
        lam = float(rng.beta(self.mix_beta, self.mix_beta))
        return sample_mixture(image_size, self.mix_beta, self.cutmix_lambda, rng)._replace(lam=torch.tensor(lam))

    def __call__(self, views: Tensor, labels: Tensor, mixture: Mixture) -> tuple[tuple[Tensor, Tensor], ...]:
        """Mix image i with its partner j.

        Args:
            views: (B, 4, c, H, W) images, uint8 or float: i for the global and the local view, then j for the same; without
                j, (B, 2, c, H, W), partners are drawn from the batch.
            labels: (B, 2) labels of i and j, or (B, 1).
            mixture: From `sample_params`, on the device of the views.

        Returns:
            (global view, local view), each (B, c, H, W), and their (B, C) soft labels.
        """
        views, labels = self.pairs(views, labels, mixture)
        i_global, i_local, j_global, j_local = views.unbind(1)
        i_label, j_label = F.one_hot(labels, self.num_classes).to(mixture.lam.dtype).unbind(1)
        images = mixup(i_global, j_global, mixture.lam), cutmix(i_local, j_local, mixture.box)
        targets = mixup(i_label, j_label, mixture.lam), mixup(i_label, j_label, mixture.local_lam)
        return images, targets
