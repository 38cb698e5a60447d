"""Linear probes: multinomial logistic regression on the features of a frozen encoder."""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glmc.stage2.features import Features

BATCH, READ = 256, 4096  # images per step, and per read of a pass in order
NORM = 8.0  # root mean square norm of the scaled features, which makes one learning rate fit every width


class Linear(NamedTuple):
    """Weights of a linear classifier."""
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)

    def __call__(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, C) logits."""
        return F.linear(features, self.weight, self.bias)

    @property
    def device(self) -> torch.device:
        return self.bias.device

    def scaled(self, scale: Tensor) -> 'Linear':
        """Multiply the logit of each class by its (C,) scale."""
        return Linear(scale[:, None] * self.weight, scale * self.bias)

    def detached(self) -> 'Linear':
        """The same tensors without gradients."""
        return Linear(self.weight.detach(), self.bias.detach())

    def trainable(self) -> 'Linear':
        """Copy that requires gradients."""
        return Linear(*(tensor.detach().clone().requires_grad_() for tensor in self))


class Standardizer(NamedTuple):
    """Shift and scale of features: zero mean, equal deviations, root mean square norm `NORM`."""
    mean: Tensor  # (D,)
    scale: Tensor  # (D,)

    @classmethod
    def of(cls, features: Features) -> 'Standardizer':
        """Statistics of the plain view, summed in float64 over one pass."""
        total, squares = (torch.zeros(features.width, dtype=torch.float64) for _ in range(2))
        for batch, _ in features.batches(READ):
            total += batch.sum(0, dtype=torch.float64)
            squares += batch.double().square().sum(0)
        mean = total / len(features)
        deviation = (squares / len(features) - mean.square()).clamp(min=0).sqrt()
        deviation[deviation <= 1e-6 * (1 + mean.abs())] = math.inf  # a constant feature has no weight
        return cls(mean.float(), (NORM / math.sqrt(features.width) / deviation).float())

    def to(self, device: torch.device | str) -> 'Standardizer':
        return Standardizer(self.mean.to(device), self.scale.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale

    def fold(self, linear: Linear) -> Linear:
        """The classifier of plain features that equals one of standardised features."""
        weight = linear.weight * self.scale
        return Linear(weight, linear.bias - weight @ self.mean)

    def unfold(self, linear: Linear) -> Linear:
        """The classifier of standardised features that equals one of plain features, but for constant features."""
        weight = torch.where(self.scale > 0, linear.weight / self.scale, 0)
        return Linear(weight, linear.bias + linear.weight @ self.mean)


def class_means(features: Features, num_classes: int) -> tuple[Tensor, Tensor]:
    """Compute the (C, D) means of the normalised plain features of each class, and the mean norm before, a scalar."""
    sums, norms = torch.zeros(num_classes, features.width), torch.zeros(())
    for batch, labels in features.batches(READ):
        sums.index_add_(0, labels, F.normalize(batch))
        norms += batch.norm(dim=1).sum()
    counts = torch.bincount(features.labels, minlength=num_classes).clamp(min=1)
    return sums / counts[:, None], norms / len(features)


def linear_probe(
        features: Features, num_classes: int, adjustment: Tensor | None = None, *, weight_decay: float = 5e-4,
        lr: float = 1.0, epochs: int | None = None, generator: torch.Generator, device: torch.device | str = 'cpu',
        start: Linear | None = None) -> Linear:
    """Fit a linear classifier by SGD with momentum 0.9 and a cosine to zero, on standardised features.

    Args:
        features: Features of N training images.
        num_classes: C.
        adjustment: (C,) addend of the logits in the loss. None: cross-entropy; log prior: Balanced Softmax
            (arXiv 2007.10740); log prior - log p: the classifier embodies the class prior p.
        weight_decay: L2 penalty of the weight, in units of the standardised features.
        lr: Learning rate of the first epoch.
        epochs: Passes over the images; None for 30, fewer above 34,000 images, at least 5.
        generator: Source of the order and the views.
        device: Device of the computation.
        start: Classifier to start from; None for zeros.

    Returns:
        (C, D) weight and (C,) bias for the features as they are.
    """
    epochs = epochs or min(max(round(4000 * BATCH / len(features)), 5), 30)
    standardize = Standardizer.of(features).to(device)
    zeros = Linear(torch.zeros(num_classes, features.width, device=device), torch.zeros(num_classes, device=device))
    linear = (zeros if start is None else standardize.unfold(start)).trainable()
    optimizer = torch.optim.SGD([dict(params=[linear.weight], weight_decay=weight_decay), dict(params=[linear.bias])],
                                lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    adjustment = 0 if adjustment is None else adjustment.to(device)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        views = torch.randint(features.num_views, (len(features),), generator=generator)
        for indices, view in zip(order.split(BATCH), views.split(BATCH), strict=True):
            batch = standardize(features.rows(indices, view).to(device))
            optimizer.zero_grad()
            F.cross_entropy(linear(batch) + adjustment, features.labels[indices].to(device)).backward()
            optimizer.step()
        schedule.step()
    return standardize.fold(linear.detached())
