"""Running statistics of the features of each class, for RISDA (arXiv 2112.07928) and ProCo (arXiv 2403.06726)."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

LARGEST = 2 ** 26  # numbers of all covariances together; beyond it, their diagonals


class ClassStatistics(nn.Module):
    """Mean and covariance of each class, confusion of the classes, and the shift and covariances of implicit augmentation.

    Args:
        counts: (C,) training images per class.
        width: D of the features.
        head: Classes with more images than this keep their own covariance.
    """

    def __init__(self, counts: Sequence[int], width: int, head: int = 100):
        super().__init__()
        classes = len(counts)
        full = (classes, width, width) if classes * width ** 2 <= LARGEST else (classes, width)
        for name, shape in dict(numbers=(classes,), means=(classes, width), own=full, confusion=(classes, classes),
                                relation=(classes, classes), shift=(classes, width), covariance=full).items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer('epoch_at', torch.tensor(-1.0, dtype=torch.float64))
        self.register_buffer('related', torch.tensor(False))
        self.register_buffer('is_head', torch.as_tensor(counts) > head, persistent=False)

    @torch.no_grad()
    def follow(self, features: Tensor, labels: Tensor, predictions: Tensor, accept: Tensor) -> None:
        """Merge a batch by the numbers of images, in place; nothing waits for the device.

        Args:
            features: (n, D) features.
            labels: (n,) labels; rows of label -1 do not count.
            predictions: (n,) predicted classes.
            accept: Scalar bool; false leaves the statistics as they are.
        """
        classes = torch.arange(len(self.numbers), device=labels.device)[:, None]
        members = ((labels == classes) & accept).to(self.means.dtype)  # (C, n)
        features = torch.where(accept & (labels >= 0)[:, None], features, 0.0)
        number = members.sum(1)
        means = members @ features / number.clamp(min=1)[:, None]
        centred = features - means[labels.clamp(min=0)]
        outer = centred[:, :, None] * centred[:, None] if self.own.ndim == 3 else centred ** 2
        spread = (members @ outer.flatten(1)).view_as(self.own) / _like(number.clamp(min=1), self.own)
        share = number / (number + self.numbers).clamp(min=1)  # (C,)
        apart = self.means - means
        apart = apart[:, :, None] * apart[:, None] if self.own.ndim == 3 else apart ** 2
        weight = _like(share, self.own)
        self.own.copy_((1 - weight) * self.own + weight * spread + weight * (1 - weight) * apart)
        self.means.lerp_(means, share[:, None])
        self.numbers += number
        self.confusion += members @ (predictions[:, None] == classes[:, 0]).to(members.dtype)

    def begin_epoch(self, progress: float, augment: bool) -> None:
        """Reset the statistics, or with `augment` derive shift and covariances from them; once for each value of progress.

        A run that resumes within an epoch changes nothing. It waits for the device.
        """
        if self.epoch_at.item() == progress:
            return
        self.epoch_at.fill_(progress)
        if augment:
            self.borrow()
        else:
            for buffer in (self.numbers, self.means, self.own, self.confusion):
                buffer.zero_()

    @torch.no_grad()
    def borrow(self) -> None:
        """Set δ = R·μ - μ at the first call, and Σ = R·Σ of the rare classes; R is the confusion in shares of each class."""
        if not self.related:
            seen = self.confusion.sum(1, keepdim=True)
            identity = torch.eye(len(seen), device=seen.device)
            self.relation.copy_(torch.where(seen > 0, self.confusion / seen.clamp(min=1), identity))
            self.shift.copy_(self.relation @ self.means - self.means)
            self.related.fill_(True)
        borrowed = (self.relation @ self.own.flatten(1)).view_as(self.own)
        self.covariance.copy_(torch.where(_like(self.is_head, self.own), self.own, borrowed))


def _like(values: Tensor, target: Tensor) -> Tensor:
    """(C,) values that broadcast to a tensor (C, …)."""
    return values.view(-1, *[1] * (target.ndim - 1))


class ClassDirections(nn.Module):
    """Mean unit feature of each class over this epoch and the last one (ProCo; arXiv 2403.06726).

    Args:
        num_classes: C.
        width: d.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        start = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer('start', 0.9 * nn.functional.normalize(start, dim=1), persistent=False)  # of an unseen class
        for name in ('', 'next_'):
            self.register_buffer(f'{name}means', self.start.clone())
            self.register_buffer(f'{name}numbers', torch.zeros(num_classes))
        self.register_buffer('epoch_at', torch.tensor(-1.0, dtype=torch.float64))

    def begin_epoch(self, progress: float) -> None:
        """Forget what is older than the last epoch; once for each value of progress. It waits for the device."""
        if self.epoch_at.item() != progress:
            self.epoch_at.fill_(progress)
            self.means.copy_(self.next_means)
            self.numbers.copy_(self.next_numbers)
            self.next_means.copy_(self.start)
            self.next_numbers.zero_()

    def follow(self, features: Tensor, labels: Tensor, accept: Tensor) -> None:
        """Merge (n, d) features with (n,) labels, -1 for none, in place; a false scalar `accept` leaves all as it is."""
        for means, numbers in ((self.means, self.numbers), (self.next_means, self.next_numbers)):
            merged = merge_means(means, numbers, features, torch.where(accept, labels, -1))
            means.copy_(merged[0])
            numbers.copy_(merged[1])


@torch.no_grad()
def merge_means(means: Tensor, numbers: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(C, d) means and (C,) numbers of features with those of a batch; the first feature of a class replaces its mean.

    Args:
        means, numbers: Those so far.
        features: (n, d) features of the batch.
        labels: (n,) labels; rows of label -1 do not count.
    """
    members = (labels == torch.arange(len(numbers), device=labels.device)[:, None]).to(means.dtype)  # (C, n)
    number = members.sum(1)
    batch = members @ torch.where((labels >= 0)[:, None], features, 0.0).to(means.dtype) / number.clamp(min=1)[:, None]
    return means.lerp(batch, (number / (number + numbers).clamp(min=1))[:, None]), numbers + number
