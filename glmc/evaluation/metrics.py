"""Long-tail metrics as an extension of timm's evaluator: shot groups, per-class accuracy, calibration."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor

from glmc.data.profiles import SHOT_NAMES, shot_groups

NUM_BINS = 15  # bins of the expected calibration error (Guo et al., arXiv 1706.04599)
WORST_PART = 10  # worst_tenth: mean of the worst C / 10 classes, rounded up


class Predictions(NamedTuple):
    """Predictions for N evaluated images, in the order of the set."""
    labels: np.ndarray  # (N,) int64
    predicted: np.ndarray  # (N,) int64
    confidence: np.ndarray  # (N,) float32, probability of the predicted class


class LongTailEvaluator(ClassificationEvaluator):
    """Count hits per class on the device, without synchronisation per batch; processes sum their counters.

    Args:
        train_counts: (C,) training images per class, which define the shot groups.
        thresholds: (few, many) of `shot_groups`.
        device: Device of the logits.
    """

    def __init__(self, train_counts: Sequence[int], thresholds: Sequence[int] = (20, 100), device=None):
        self.train_counts = list(train_counts)
        self.groups = shot_groups(self.train_counts, *thresholds)
        self.thresholds = list(thresholds)
        group = np.zeros(len(self.train_counts), dtype=np.int64)
        for index, name in enumerate(SHOT_NAMES):
            group[self.groups[name]] = index
        self.group_of_class = torch.from_numpy(group).to(device or 'cpu')
        super().__init__(device)

    def reset(self) -> None:
        super().reset()
        size = len(self.train_counts)
        self.per_class = torch.zeros(3, size, dtype=torch.int64, device=self.device)  # images, predictions, hits
        # images, confidence, hits; columns are the bins of the many-, medium- and few-shot classes
        self.bins = torch.zeros(3, len(SHOT_NAMES) * NUM_BINS, dtype=self.loss_sum.dtype, device=self.device)
        self.records = []  # (B, 3) label, prediction, confidence on the device

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch of (B, C) logits and (B,) labels."""
        super().update(output, target)
        confidence, predicted = output.float().softmax(-1).max(-1)
        confidence = confidence.nan_to_num(0.0)  # non-finite logits, e.g. overflown half precision
        hit = predicted == target
        one = torch.ones_like(target)
        self.per_class[0].scatter_add_(0, target, one)
        self.per_class[1].scatter_add_(0, predicted, one)
        self.per_class[2].scatter_add_(0, target, hit.long())
        index = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1 + NUM_BINS * self.group_of_class[target]
        columns = torch.stack([torch.ones_like(confidence), confidence, hit.float()]).to(self.bins.dtype)
        self.bins.scatter_add_(1, index.expand(3, -1), columns)
        self.records.append(torch.stack([target.float(), predicted.float(), confidence], 1))

    def compute(self, distributed: bool = False) -> dict:
        """Compute all metrics, accuracies in percent; None for a group or class without images.

        `shot_classes` counts the classes of each group that have images.

        Args:
            distributed: Sum the counters of all processes.
        """
        metrics = dict(super().compute(distributed))
        per_class, bins = self.per_class.clone(), self.bins.clone()
        if distributed:
            dist.all_reduce(per_class)
            dist.all_reduce(bins)
        images, predictions, hits = per_class.cpu().double()
        accuracy = 100 * hits / images  # (C,), nan for a class without images
        seen = images > 0
        bins = bins.cpu().view(3, len(SHOT_NAMES), NUM_BINS)
        metrics.update({name: _mean(accuracy[classes][seen[classes]]) for name, classes in self.groups.items()})
        metrics.update(
            loss=metrics['loss'] if math.isfinite(metrics['loss']) else None,  # JSON has no nan
            top1=100 * (hits.sum() / images.sum().clamp(min=1)).item(),  # argmax takes the first of equal logits
            class_mean=_mean(accuracy[seen]),
            worst_class=accuracy[seen].min().item() if seen.any() else None,
            worst_tenth=_worst_mean(accuracy[seen], WORST_PART),
            harmonic_mean=_harmonic_mean(accuracy[seen]),
            macro_f1=_mean(100 * (2 * hits / (images + predictions))[seen | (predictions > 0)]),
            ece=_calibration_error(*bins.sum(1)),
            **{f'ece_{name}': _calibration_error(*bins[:, index]) if bins[0, index].any() else None
               for index, name in enumerate(SHOT_NAMES)},
            **dict(zip(('bin_images', 'bin_confidence', 'bin_hits'), bins.sum(1).tolist(), strict=True)),
            num_images=int(images.sum()),
            shot_classes={name: int(seen[classes].sum()) for name, classes in self.groups.items()},
            shot_thresholds=self.thresholds,
            per_class_accuracy=[value if ok else None for value, ok in zip(accuracy.tolist(), seen.tolist(), strict=True)],
            per_class_images=images.long().tolist(),
            per_class_predictions=predictions.long().tolist(),
            train_counts=self.train_counts,
        )
        return metrics

    def predictions(self, distributed: bool = False) -> Predictions:
        """Return the predictions of all processes on every process; image k of rank r of P is image k·P + r of the set."""
        records = torch.cat([torch.zeros(0, 3, device=self.device), *self.records]).cpu().numpy()
        if distributed:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, records)
            positions = [np.arange(len(part)) * len(gathered) + rank for rank, part in enumerate(gathered)]
            records = np.concatenate(gathered)[np.argsort(np.concatenate(positions))]
        return Predictions(records[:, 0].astype(np.int64), records[:, 1].astype(np.int64), records[:, 2])


def confused_pairs(predictions: Predictions, limit: int = 20) -> list[tuple[int, int, int]]:
    """Most frequent errors as (label, prediction, images), in descending order; without a C x C matrix."""
    wrong = predictions.labels != predictions.predicted
    pairs = np.stack([predictions.labels[wrong], predictions.predicted[wrong]])
    (labels, predicted), images = np.unique(pairs, axis=1, return_counts=True)
    order = np.argsort(-images, kind='stable')[:limit]
    return [(int(labels[k]), int(predicted[k]), int(images[k])) for k in order]


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _worst_mean(values: Tensor, part: int) -> float | None:
    """Mean of the lowest ceil(N / part) of N values."""
    return _mean(values.sort().values[:-(-len(values) // part)])


def _harmonic_mean(values: Tensor) -> float | None:
    """Harmonic mean; 0 if any value is 0, None without values."""
    if not len(values):
        return None
    return 0.0 if (values == 0).any() else len(values) / (1 / values).sum().item()


def _calibration_error(count: Tensor, confidence: Tensor, hits: Tensor) -> float:
    """Expected calibration error in percent: Σ_b |hits_b - confidence_b| / N over bins of the confidence."""
    return 100 * ((hits - confidence).abs().sum() / count.sum().clamp(min=1)).item()
