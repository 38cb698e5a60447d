"""Classifiers for the features of a frozen encoder: each a linear layer, by its own rule. None needs a search."""
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmc.losses.classification import LogitAdjustedLoss, effective_number_weights, prior_adjustment
from glmc.models.classifier import cap_norms, norm_radius
from glmc.models.cosine import fold_cosine
from glmc.stage2.features import Features

_logger = logging.getLogger(__name__)


class Linear(NamedTuple):
    """A linear classifier."""
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)

    def __call__(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def scaled(self, scale: Tensor) -> 'Linear':
        """Logit of each class times its (C,) scale."""
        return Linear(scale[:, None] * self.weight, scale * self.bias)


@dataclass(frozen=True)
class Stage1:
    """The classifier of the first stage.

    Args:
        linear: Itself.
        counts: (C,) images per class that it was trained on.
        rebalanced: Whether it is fitted to a uniform class prior instead of theirs.
        conventional: GLMC's other classifier, which learns their prior; None where it is not at hand.
    """
    linear: Linear
    counts: list[int]
    rebalanced: bool = False
    conventional: Linear | None = None


def train_linear(
        logits: Callable[[Tensor], Tensor], parameters: list[Tensor], features: Features,
        loss: Callable[[Tensor, Tensor], Tensor], *, lr: float, epochs: int, weight_decay: float,
        generator: torch.Generator, batch_size: int = 64, class_balanced: bool = False,
        after_step: Callable[[], None] = lambda: None, after_epoch: Callable[[int], None] = lambda epoch: None) -> None:
    """SGD with momentum 0.9 and a cosine to 0, epoch by epoch; each image in one of its views, drawn at random.

    Args:
        logits: (B, D) features -> (B, C).
        parameters: What is trained, in place.
        features: Of the training images.
        loss: Of logits and labels.
        lr, epochs, weight_decay, batch_size: As their names say.
        generator: Owner of the order and the views.
        class_balanced: Draw images with replacement, every class alike, instead of each once.
        after_step, after_epoch: Called then.
    """
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    num_views, size = features.views.shape[:2]
    for epoch in range(epochs):
        order = _balanced_order(features.labels, generator) if class_balanced else torch.randperm(size, generator=generator)
        views = torch.randint(num_views, (size,), generator=generator)
        for chosen, view in zip(order.split(batch_size), views.split(batch_size), strict=True):
            optimizer.zero_grad()
            batch, labels = features.views[view, chosen], features.labels[chosen]
            loss(logits(batch.to(parameters[0].device)), labels.to(parameters[0].device)).backward()
            optimizer.step()
            after_step()
        schedule.step()
        after_epoch(epoch)


def _balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    weights = 1 / torch.bincount(labels)[labels].double()
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def _trainable(linear: Linear) -> Linear:
    """A copy that can learn."""
    return Linear(*(tensor.detach().clone().requires_grad_() for tensor in linear))


def _result(linear: Linear) -> Linear:
    return Linear(*(tensor.detach() for tensor in linear))


def softmax_bce(logits: Tensor, labels: Tensor, class_weight: Tensor) -> Tensor:
    """-w_y·(log p_y + Σ_{c≠y} log(1 - p_c)), p = softmax: binary cross-entropy of every class probability.

    The class-balanced loss of the Weight Balancing code (arXiv 2203.14197). Its mean over classes, too, makes the gradient
    about C times smaller than that of weighted cross-entropy.

    Args:
        logits: (B, C) logits.
        labels: (B,) labels.
        class_weight: (C,) weights w.

    Returns:
        Scalar, mean over all B·C probabilities.
    """
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy(logits.softmax(1), one_hot, weight=class_weight[labels][:, None])


class Classifier:
    """A rule for a linear layer, a dataclass of its hyper-parameters."""

    grid: ClassVar[dict] = {}  # field -> values to search
    two_heads: ClassVar[bool] = False  # whether it needs `Stage1.conventional`

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        """The linear layer that these features call for; the same for the same generator."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaxNorm(Classifier):
    """Class-balanced loss under strong weight decay, rows capped at δ = min + radius·(max - min) of their first norms.

    Weight Balancing (arXiv 2203.14197); as GLMC has it (arXiv 2305.08661, Eq. 13), projected after every step as its paper
    says, or with `project='epoch'` as the code behind its numbers does.
    """
    lr: float = 0.01
    epochs: int = 10
    weight_decay: float = 0.1
    beta: float = 0.9999
    radius: float = 0.1
    project: str = field(default='step', metadata=dict(choices=('step', 'epoch')))
    loss: str = field(default='ce', metadata=dict(choices=('ce', 'bce')))
    grid: ClassVar[dict] = dict(radius=(0.05, 0.1, 0.3, 1.0), weight_decay=(0.01, 0.1))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        linear = _trainable(stage1.linear)
        radius = norm_radius(linear.weight, self.radius)
        weight = effective_number_weights(features.counts(len(linear.bias)), self.beta).to(linear.bias.device)
        losses = {'ce': partial(F.cross_entropy, weight=weight), 'bce': partial(softmax_bce, class_weight=weight)}
        clipped, per_epoch = [], []

        @torch.no_grad()
        def project() -> None:
            clipped.append((linear.weight.norm(dim=1) > radius).sum())
            linear.weight.copy_(cap_norms(linear.weight, radius))

        def after_epoch(epoch: int) -> None:
            if self.project == 'epoch':
                project()
            per_epoch.append(f'{torch.stack(clipped).float().mean().item():.0f}')
            clipped.clear()

        train_linear(linear, list(linear), features, losses[self.loss], lr=self.lr, epochs=self.epochs,
                     weight_decay=self.weight_decay, generator=generator, after_epoch=after_epoch,
                     after_step=project if self.project == 'step' else lambda: None)
        _logger.info(f"maxnorm: radius {radius.item():.3f}, rows clipped at a projection, by epoch: {' '.join(per_epoch)}")
        return _result(linear)


@dataclass(frozen=True)
class BalancedSoftmax(Classifier):
    """Softmax weighted by the class counts, which the exported classifier goes without (arXiv 2007.10740).

    The learning rate is ours, chosen on held-out images of short runs (results/README.md).
    """
    lr: float = 0.1
    epochs: int = 10
    weight_decay: float = 5e-4
    grid: ClassVar[dict] = dict(lr=(0.001, 0.01, 0.1))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        linear = _trainable(stage1.linear)
        loss = LogitAdjustedLoss(features.counts(len(linear.bias))).to(linear.bias.device)
        train_linear(linear, list(linear), features, loss, lr=self.lr, epochs=self.epochs, weight_decay=self.weight_decay,
                     generator=generator)
        return _result(linear)


@dataclass(frozen=True)
class LogitAdjust(Classifier):
    """Bias less τ·log prior, after training (arXiv 2007.07314).

    τ is 1 where stage 1 has learnt the prior of its training set, 0 where it is fitted to a uniform one already.
    """
    tau: float | None = None
    grid: ClassVar[dict] = dict(tau=tuple(k / 10 for k in range(-5, 21)))

    def resolved(self, stage1: Stage1) -> 'LogitAdjust':
        """With the τ that stage 1 calls for."""
        return replace(self, tau=float(not stage1.rebalanced)) if self.tau is None else self

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        weight, bias = stage1.linear
        return Linear(weight, bias - prior_adjustment(stage1.counts, self.resolved(stage1).tau).to(bias.device))


@dataclass(frozen=True)
class CRT(Classifier):
    """A new classifier, trained on class-balanced sampling (cRT; arXiv 1910.09217; its lr 0.2 is for a batch of 512)."""
    lr: float = 0.025
    epochs: int = 10
    weight_decay: float = 5e-4
    grid: ClassVar[dict] = dict(lr=(0.0025, 0.025, 0.1))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        bound = stage1.linear.weight.shape[1] ** -0.5
        linear = _trainable(Linear(*(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator).to(tensor.device)
                                     for tensor in stage1.linear)))
        train_linear(linear, list(linear), features, F.cross_entropy, lr=self.lr, epochs=self.epochs,
                     weight_decay=self.weight_decay, generator=generator, class_balanced=True)
        return _result(linear)


@dataclass(frozen=True)
class LWS(Classifier):
    """A scale for each class's logit, trained on class-balanced sampling (arXiv 1910.09217; its lr 0.2 is for 512)."""
    lr: float = 0.025
    epochs: int = 5
    weight_decay: float = 5e-4
    grid: ClassVar[dict] = dict(lr=(0.0025, 0.025, 0.1))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        linear = _result(stage1.linear)
        scale = torch.ones_like(linear.bias, requires_grad=True)
        train_linear(lambda batch: scale * linear(batch), [scale], features, F.cross_entropy, lr=self.lr,
                     epochs=self.epochs, weight_decay=self.weight_decay, generator=generator, class_balanced=True)
        return linear.scaled(scale.detach())


@dataclass(frozen=True)
class TauNorm(Classifier):
    """Logits divided by ‖w_c‖^τ (arXiv 1910.09217; there without bias), times the geometric mean of it to stay as sure."""
    tau: float = 0.7
    grid: ClassVar[dict] = dict(tau=tuple(k / 10 for k in range(21)))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        log_norm = stage1.linear.weight.norm(dim=1).clamp(min=1e-12).log()
        return stage1.linear.scaled((self.tau * (log_norm.mean() - log_norm)).exp())


@dataclass(frozen=True)
class LabelOverSmoothing(Classifier):
    """Cross-entropy with nearly uniform labels (LOS, ICLR 2025; arXiv 2403.00250)."""
    lr: float = 5e-4
    epochs: int = 20
    weight_decay: float = 0.0
    smoothing: float = 0.98
    grid: ClassVar[dict] = dict(lr=(5e-4, 5e-3, 5e-2), smoothing=(0.9, 0.98))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        linear = _trainable(stage1.linear)
        loss = nn.CrossEntropyLoss(label_smoothing=self.smoothing)
        train_linear(linear, list(linear), features, loss, lr=self.lr, epochs=self.epochs, weight_decay=self.weight_decay,
                     generator=generator)
        return _result(linear)


@dataclass(frozen=True)
class NearestClassMean(Classifier):
    """Cosine to the mean of the class's normalised features, of plain views (NCM; arXiv 1910.09217)."""
    scale: float = 30.0

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        device = stage1.linear.bias.device
        plain, labels = features.plain.to(device), features.labels.to(device)
        sums = torch.zeros_like(stage1.linear.weight).index_add_(0, labels, F.normalize(plain))
        return Linear(*fold_cosine(sums, self.scale, plain.norm(dim=1).mean()))


@dataclass(frozen=True)
class HeadAverage(Classifier):
    """w·cb + (1-w)·(c - τ·log π): both classifiers of GLMC, averaged as logits, which is one linear layer exactly."""
    weight: float = 0.5
    tau: float = 0.0
    grid: ClassVar[dict] = dict(weight=tuple(k / 10 for k in range(11)), tau=(0.0, 0.5, 1.0))
    two_heads: ClassVar[bool] = True

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        weight, bias = stage1.conventional
        adjusted = Linear(weight, bias - prior_adjustment(stage1.counts, self.tau).to(bias.device))
        return Linear(*(torch.lerp(c, cb, self.weight) for c, cb in zip(adjusted, stage1.linear, strict=True)))


CLASSIFIERS = {
    'maxnorm': MaxNorm, 'balanced_softmax': BalancedSoftmax, 'logit_adjust': LogitAdjust, 'crt': CRT, 'lws': LWS,
    'tau_norm': TauNorm, 'los': LabelOverSmoothing, 'ncm': NearestClassMean, 'average': HeadAverage}
