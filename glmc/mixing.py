"""Mixers: views and labels of a batch in, input and target of a task out; MixUp, CutMix, CMO and GLMC's mixtures."""
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from torch import Tensor, nn

RENAMED = {'draw_mixture': 'sample_mixture', 'FlippedMixup': 'BatchMixup', 'FlippedCutmix': 'BatchCutmix',
           'PartnerOnly': 'ResampledOnly', 'UNMIXED': 'IDENTITY_MIXTURE'}  # names of 0.1.0


def __getattr__(name: str):
    """Return an object by its name of 0.1.0, with a warning."""
    if name not in RENAMED:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    warnings.warn(f'glmc.mixing.{name} is now {RENAMED[name]}', DeprecationWarning, stacklevel=2)
    return globals()[RENAMED[name]]


class Mixture(NamedTuple):
    """Random numbers of one step's mixture, drawn outside the step so that the step compiles to one graph."""
    lam: Tensor  # () weight of the first image in the global view
    box: Tensor  # (4,) int64 y0, y1, x0, x1: patch of the second image in the local view
    local_lam: Tensor  # () weight of the first image's label in the local view
    uniform: Tensor | None = None  # in [0, 1): (B,) chooses partners within the batch, (K,) positives among K features

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
        b: Images of the same shape that the box is copied from.
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
        rng: Generator of the step.
        probability: Probability of a mixture; otherwise the images stay as they are.
    """
    if probability < 1 and rng.random() >= probability:
        return IDENTITY_MIXTURE
    lam = float(rng.beta(beta, beta))
    box = random_box(*image_size, lam, rng)
    area = (box[1] - box[0]) * (box[3] - box[2])
    local_lam = 1 - area / (image_size[0] * image_size[1]) if cutmix_lambda == 'area' else lam
    return Mixture(torch.tensor(lam), torch.tensor(box), torch.tensor(local_lam))


def partners_within(labels: Tensor, class_weight: Tensor, uniform: Tensor) -> Tensor:
    """Partner of each image within its batch, P(image) ∝ class_weight of its label, by inversion of the cumulative sum.

    Args:
        labels: (B,) labels.
        class_weight: (C,) n^-q.
        uniform: (B,) random numbers in [0, 1).

    Returns:
        (B,) indices into the batch.
    """
    cumulative = class_weight[labels].cumsum(0)
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(labels) - 1)


class ViewMixer(nn.Module):
    """Views of each image and its label as they are; base of the mixers.

    The protocol of all mixers: `sample_params` draws what is random on the CPU, outside the compiled step; calling the mixer
    with views, labels and these params gives the input and the target of the task. Tensors of a mixer are buffers.

    Args:
        counts: (C,) training images per class.
    """

    def __init__(self, counts: Sequence[int]):
        super().__init__()
        self.num_classes = len(counts)

    def sample_params(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture | None:
        """Random numbers of one step.

        Args:
            batch_size: B.
            image_size: (H, W) in pixels.
            rng: Generator of the step.
        """
        return None

    def forward(self, views: Tensor, labels: Tensor, params: Mixture | None) -> tuple:
        """Input and target of the task.

        Args:
            views: (B, images, views, c, H, W) pixel values or normalised images.
            labels: (B, images).
            params: From `sample_params`, on the device of the views.

        Returns:
            One (B, c, H, W) tensor for one view, else a tuple of them; and the (B,) labels.
        """
        images = views[:, 0].unbind(1)
        return images[0] if len(images) == 1 else images, labels[:, 0]


class PickingMixer(ViewMixer):
    """Views as they are; with the labels come random numbers by which the task picks positives from its queue.

    Args:
        counts: (C,) training images per class.
        queue_size: K.
    """

    def __init__(self, counts: Sequence[int], queue_size: int = 4096):
        super().__init__(counts)
        self.queue_size = queue_size

    def sample_params(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture:
        return IDENTITY_MIXTURE._replace(uniform=torch.from_numpy(rng.random(self.queue_size, dtype=np.float32)))

    def forward(self, views: Tensor, labels: Tensor, params: Mixture) -> tuple:
        """Views, each (B, c, H, W), and (B,) labels with (K,) random numbers in [0, 1)."""
        images, labels = super().forward(views, labels, params)
        return images, (labels, params.uniform)


class BatchMixup(ViewMixer):
    """MixUp of each image with the one at its position from the end of the batch, one λ per batch (arXiv 1710.09412).

    timm's `Mixup` pairs alike, but draws from the global generator, needs an even batch and changes its input.

    Args:
        counts: (C,) training images per class.
        mix_beta: β of Beta(β, β).
        mixup_prob: Probability that a batch is mixed.
    """
    cutmix_lambda = 'nominal'

    def __init__(self, counts: Sequence[int], mix_beta: float = 1.0, mixup_prob: float = 1.0):
        super().__init__(counts)
        self.mix_beta, self.mixup_prob = mix_beta, mixup_prob

    def sample_params(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture:
        return sample_mixture(image_size, self.mix_beta, self.cutmix_lambda, rng, self.mixup_prob)

    def forward(self, views: Tensor, labels: Tensor, params: Mixture) -> tuple[Tensor, Tensor]:
        """(B, c, H, W) images and (B, C) soft labels of (B, 1, 1, c, H, W) views and (B, 1) labels."""
        images = views[:, 0, 0]
        return mixup(images, images.flip(0), params.lam), mixup_target(labels, self.num_classes, params.lam)


class BatchCutmix(BatchMixup):
    """CutMix of each image with the one at its position from the end of the batch, one box per batch (arXiv 1905.04899).

    Args:
        counts, mix_beta, mixup_prob: As those of `BatchMixup`.
        cutmix_lambda: `nominal` or `area`, see `sample_mixture`.
    """

    def __init__(self, counts: Sequence[int], mix_beta: float = 1.0, mixup_prob: float = 1.0, cutmix_lambda: str = 'area'):
        super().__init__(counts, mix_beta, mixup_prob)
        self.cutmix_lambda = cutmix_lambda

    def forward(self, views: Tensor, labels: Tensor, params: Mixture) -> tuple[Tensor, Tensor]:
        images = views[:, 0, 0]
        targets = mixup_target(labels, self.num_classes, params.local_lam)
        return cutmix(images, images.flip(0), params.box), targets


class PairMixer(ViewMixer):
    """Both images of a pair as they are: the input of two branches; base of the mixers of pairs.

    Args:
        counts: (C,) training images per class.
        partner: `sampler`: batches hold both images of a pair; `batch`: they hold single images, and each gets a partner
            among them.
        resample_power: q of the partners within a batch.
    """

    def __init__(self, counts: Sequence[int], partner: str = 'sampler', resample_power: float = 0.0):
        super().__init__(counts)
        self.within_batch = partner == 'batch'
        weight = torch.as_tensor(counts, dtype=torch.float64).clamp(min=1) ** -resample_power  # (C,)
        self.register_buffer('partner_weight', weight, persistent=False)

    def sample_params(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture | None:
        params = self.sample_mixture(image_size, rng)
        if not self.within_batch:
            return params
        return (params or IDENTITY_MIXTURE)._replace(uniform=torch.from_numpy(rng.random(batch_size)))

    def sample_mixture(self, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture | None:
        """λ and box of one step; None without a mixture."""
        return None

    def pairs(self, views: Tensor, labels: Tensor, params: Mixture | None) -> tuple[Tensor, Tensor]:
        """(B, 2, views, c, H, W) views and (B, 2) labels of i and j; j from the batch if it holds single images."""
        if not self.within_batch:
            return views, labels
        partners = partners_within(labels[:, 0], self.partner_weight, params.uniform)
        return torch.cat([views, views[partners]], 1), torch.cat([labels, labels[partners]], 1)

    def forward(self, views: Tensor, labels: Tensor, params: Mixture | None) -> tuple[tuple[Tensor, ...], ...]:
        """(images of i, images of j), each (B, c, H, W), and their (B,) labels."""
        views, labels = self.pairs(views, labels, params)
        return views[:, :, 0].unbind(1), labels.unbind(1)


class ResampledOnly(PairMixer):
    """The partner alone: resampling by `resample_power`, with replacement."""

    def forward(self, views: Tensor, labels: Tensor, params: Mixture | None) -> tuple[Tensor, Tensor]:
        images, labels = super().forward(views, labels, params)
        return images[1], labels[1]


class CMOMixer(PairMixer):
    """CutMix of a resampled foreground j onto a background i of the training distribution (CMO; arXiv 2112.00412).

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

    def forward(self, views: Tensor, labels: Tensor, params: Mixture) -> tuple[Tensor, Tensor]:
        """(B, c, H, W) images and their (B, C) soft labels."""
        (background, foreground), labels = super().forward(views, labels, params)
        i_label, j_label = (F.one_hot(label, self.num_classes).to(params.lam.dtype) for label in labels)
        return cutmix(background, foreground, params.box), mixup(i_label, j_label, params.local_lam)


class GLMCMixer(PairMixer):
    """The global and the local mixture of each pair, with their soft labels (GLMC Eq. 1-3).

    Args:
        counts, partner, resample_power: As those of `PairMixer`.
        mix_beta: β of Beta(β, β).
        cutmix_lambda: `nominal` or `area`, see `sample_mixture`.
    """

    def __init__(
            self, counts: Sequence[int], mix_beta: float = 1.0, cutmix_lambda: str = 'nominal', partner: str = 'sampler',
            resample_power: float = 0.0):
        super().__init__(counts, partner, resample_power)
        self.mix_beta, self.cutmix_lambda = mix_beta, cutmix_lambda

    def sample_mixture(self, image_size: tuple[int, int], rng: np.random.Generator) -> Mixture:
        return sample_mixture(image_size, self.mix_beta, self.cutmix_lambda, rng)

    def forward(self, views: Tensor, labels: Tensor, params: Mixture) -> tuple[tuple[Tensor, Tensor], ...]:
        """Mix image i with its partner j.

        Args:
            views: (B, 2, 2, c, H, W): image i, then j, each for the global and the local view; with `partner='batch'`,
                (B, 1, 2, c, H, W).
            labels: (B, 2) labels of i and j, or (B, 1).
            params: From `sample_params`, on the device of the views.

        Returns:
            (global view, local view), each (B, c, H, W), and their (B, C) soft labels.
        """
        views, labels = self.pairs(views, labels, params)
        (i_global, i_local), (j_global, j_local) = (image.unbind(1) for image in views.unbind(1))
        i_label, j_label = F.one_hot(labels, self.num_classes).to(params.lam.dtype).unbind(1)
        images = mixup(i_global, j_global, params.lam), cutmix(i_local, j_local, params.box)
        targets = mixup(i_label, j_label, params.lam), mixup(i_label, j_label, params.local_lam)
        return images, targets


class HalvesMixer(GLMCMixer):
    """GLMC's mixtures on one view of each image: the first half of the batch global, the second local.

    Args:
        counts, partner, resample_power, mix_beta, cutmix_lambda: As those of `GLMCMixer`.
    """

    def forward(self, views: Tensor, labels: Tensor, params: Mixture) -> tuple[Tensor, Tensor]:
        """(B, c, H, W) images and their (B, C) soft labels, of (B, 2, 1, c, H, W) views, or (B, 1, ...) within the batch."""
        views, labels = self.pairs(views, labels, params)
        half = len(views) // 2
        (first, first_partner), (second, second_partner) = (part.unbind(1) for part in views[:, :, 0].tensor_split([half]))
        images = mixup(first, first_partner, params.lam), cutmix(second, second_partner, params.box)
        label, partner_label = F.one_hot(labels, self.num_classes).to(params.lam.dtype).unbind(1)
        weight = torch.where(torch.arange(len(labels), device=labels.device) < half, params.lam, params.local_lam)
        return torch.cat(images), mixup(label, partner_label, weight[:, None])
