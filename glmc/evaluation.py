"""Long-tail metrics on top of timm's evaluator: shot groups, per-class accuracy, calibration."""
from collections.abc import Sequence

import torch
import torch.distributed as dist
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor

from glmc.data.profiles import SHOT_NAMES, shot_groups

NUM_BINS = 15  # of the expected calibration error (Guo et al., arXiv 1706.04599)


class LongTailEvaluator(ClassificationEvaluator):
    """Counters on the device, no synchronisation per batch; exact under several processes, which only sum them.

    Args:
        train_counts: (C,) training images per class, which decide many, medium and few.
        thresholds: (few, many) of `shot_groups`.
        device: Of the logits.
    """

    def __init__(self, train_counts: Sequence[int], thresholds: Sequence[int] = (20, 100), device=None):
        self.train_counts = list(train_counts)
        self.groups = shot_groups(self.train_counts, *thresholds)
        self.thresholds = list(thresholds)
        super().__init__(device)

    def reset(self) -> None:
        super().reset()
        size = len(self.train_counts)
        self.per_class = torch.zeros(3, size, dtype=torch.int64, device=self.device)  # images, predictions, hits
        self.bins = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=self.device)  # images, confidence, hits

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch of (B, C) logits and (B,) labels."""
        super().update(output, target)
        confidence, predicted = output.float().softmax(-1).max(-1)
        hit = predicted == target
        one = torch.ones_like(target)
        self.per_class[0].scatter_add_(0, target, one)
        self.per_class[1].scatter_add_(0, predicted, one)
        self.per_class[2].scatter_add_(0, target, hit.long())
        index = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
        columns = torch.stack([torch.ones_like(confidence), confidence, hit.float()]).double()
        self.bins.scatter_add_(1, index.expand(3, -1), columns)

    def compute(self, distributed: bool = False) -> dict:
        """Metrics in percent (loss, counts and lists aside); None for a group or class without evaluated images."""
        metrics = dict(super().compute(distributed))
        per_class, bins = self.per_class.clone(), self.bins.clone()
        if distributed:
            dist.all_reduce(per_class)
            dist.all_reduce(bins)
        images, predictions, hits = per_class.cpu().double()
        accuracy = 100 * hits / images  # nan where a class has no image
        seen = images > 0
        metrics.update({name: _mean(accuracy[classes][seen[classes]]) for name, classes in self.groups.items()})
        metrics.update(
            class_mean=_mean(accuracy[seen]),
            worst_class=accuracy[seen].min().item() if seen.any() else None,
            harmonic_mean=_harmonic_mean(accuracy[seen]),
            macro_f1=_mean(100 * (2 * hits / (images + predictions))[seen | (predictions > 0)]),
            ece=_calibration_error(*bins.cpu()),
            num_images=int(images.sum()),
            shot_classes={name: len(self.groups[name]) for name in SHOT_NAMES},
            shot_thresholds=self.thresholds,
            per_class_accuracy=[value if ok else None for value, ok in zip(accuracy.tolist(), seen.tolist(), strict=True)],
            per_class_images=images.long().tolist(),
            train_counts=self.train_counts,
        )
        return metrics


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _harmonic_mean(values: Tensor) -> float | None:
    """0 where a class has no hit at all."""
    if not len(values):
        return None
    return 0.0 if (values == 0).any() else len(values) / (1 / values).sum().item()


def _calibration_error(count: Tensor, confidence: Tensor, hits: Tensor) -> float:
    """Expected calibration error in percent: Σ_b |hits_b - confidence_b| / N over bins of the confidence."""
    return 100 * ((hits - confidence).abs().sum() / count.sum().clamp(min=1)).item()


def shot_table(metrics: dict) -> str:
    """Two lines: accuracy of all, many-, medium- and few-shot classes with their number, and the class mean."""
    head, row = ['top-1', 'top-5'], [metrics['top1'], metrics['top5']]
    for name in SHOT_NAMES:
        head.append(f"{name} ({metrics['shot_classes'][name]})")
        row.append(metrics[name])
    head.append('class mean')
    row.append(metrics['class_mean'])
    cells = ['–' if value is None else f'{value:.2f}' for value in row]
    widths = [max(len(h), len(c)) for h, c in zip(head, cells, strict=True)]
    lines = ('  '.join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in (head, cells))
    return '\n'.join(lines)


def shot_line(metrics: dict) -> str:
    """One line for the log: top-1 with many / medium / few, and the class mean."""
    shots = ' / '.join('–' if metrics[name] is None else f'{metrics[name]:.1f}' for name in SHOT_NAMES)
    return f"top-1 {metrics['top1']:.2f} ({shots}), class mean {metrics['class_mean']:.2f}"
