"""Diagnosis of a result: which classes fail, the likely cause of each, and the next steps."""
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glmc.data.profiles import SHOT_NAMES, classes_without_images, pluralize
from glmc.evaluation.metrics import Predictions, confused_pairs
from glmc.report.pictures import display_name

FEW_TESTS = 5  # fewer evaluated images than this make an accuracy uncertain
GAP = 10  # points of accuracy between two shot groups, and percent of calibration error, that call for action
SURE = 0.8  # a lower confidence of a mistake does not suggest a wrong label
LARGER = 5  # times as many training images as a class make another class frequent


@dataclass(frozen=True)
class ClassResult:
    """Result of one class.

    Args:
        index: Class.
        name: Name on one line.
        group: Shot group.
        train_images, images: Training images and evaluated images.
        accuracy: In percent; None without evaluated images.
        mistaken_for: Class that most mistakes predict; None without mistakes or predictions.
        mistakes: Number of these mistakes.
        suspects: Mistakes that suggest a wrong label, see `suspected_labels`.
    """
    index: int
    name: str
    group: str
    train_images: int
    images: int
    accuracy: float | None
    mistaken_for: int | None = None
    mistakes: int = 0
    suspects: int = 0

    @property
    def wrong(self) -> int:
        """Number of misclassified images."""
        return 0 if self.accuracy is None else round(self.images * (1 - self.accuracy / 100))


def class_results(
        metrics: dict, names: Sequence[str], predictions: Predictions | None = None) -> list[ClassResult]:
    """Results of all C classes, worst first, then those without evaluated images.

    Args:
        metrics: Content of metrics.json.
        names: C names.
        predictions: Predictions of every evaluated image.
    """
    counts, (few, many) = metrics['train_counts'], metrics['shot_thresholds']
    images = metrics.get('per_class_images') or [0] * len(counts)
    top, suspects = {}, np.zeros(len(counts), dtype=int)
    if predictions is not None:
        for label, predicted, number in confused_pairs(predictions, len(predictions.labels)):
            top.setdefault(label, (predicted, number))
        suspects = np.bincount(predictions.labels[suspected_labels(predictions)], minlength=len(counts))
    results = [
        ClassResult(c, display_name(names[c]), SHOT_NAMES[0 if count > many else 1 if count > few else 2], count,
                    images[c], accuracy, *top.get(c, (None, 0)), int(suspects[c]))
        for c, (count, accuracy) in enumerate(zip(counts, metrics['per_class_accuracy'], strict=True))]
    return sorted(results, key=lambda result: (result.accuracy is None, result.accuracy))


def suspected_labels(predictions: Predictions) -> np.ndarray:
    """(N,) bool, True for a mistake that is as confident as correct images of the predicted class on average, and SURE.

    The average is the threshold of confident learning (Northcutt et al., arXiv 1911.00068) on the predicted class.
    """
    labels, predicted, confidence = predictions
    right = labels == predicted
    if not len(labels):
        return right
    size = int(max(labels.max(), predicted.max())) + 1
    number = np.bincount(labels[right], minlength=size)
    mean = np.bincount(labels[right], confidence[right], size) / np.maximum(number, 1)
    return ~right & (number[predicted] > 0) & (confidence >= np.maximum(mean[predicted], SURE))


def failing(results: Sequence[ClassResult], class_mean: float | None, limit: int = 12) -> list[ClassResult]:
    """The worst classes: below 100 % and not above the class mean, at most `limit`."""
    return [result for result in results if result.accuracy is not None and result.accuracy < 100
            and (class_mean is None or result.accuracy <= class_mean)][:limit]


def diagnosis(result: ClassResult, metrics: dict, names: Sequence[str]) -> str:
    """One or two sentences on the likely cause of a failing class: few images, confusion, both, or wrong labels."""
    counts, wrong = metrics['train_counts'], result.wrong
    few = result.group == 'few' and result.train_images < max(counts) / 2
    confused = result.mistakes >= 2 and 2 * result.mistakes >= wrong
    images = pluralize(result.train_images, 'training image')
    text = f'Few images ({images}). ' if few else ''
    if confused:
        other = counts[result.mistaken_for]
        text = f'Few images ({images}) and confused' if few else 'Confused'
        text += f' with {display_name(names[result.mistaken_for])}: {result.mistakes} of {pluralize(wrong, "mistake")}'
        times = other / max(result.train_images, 1)
        text += f', a class of {times:.0f} times as many training images. ' if times >= LARGER else '. '
    if result.suspects >= 2 and not few:
        text += (f'Wrong labels suspected: {result.suspects} of {pluralize(wrong, "mistake")} are as confident as correct '
                 'images of the predicted class. ')
    if not text and result.mistaken_for is not None:
        text = 'No single cause: its mistakes fall on several classes. ' if wrong > 1 else 'A single mistake. '
    if result.images < FEW_TESTS:
        text += f"Only {pluralize(result.images, 'test image')}. "
    return text.strip()


def next_steps(
        metrics: dict, names: Sequence[str], results: Sequence[ClassResult], predictions: Predictions | None = None,
        run: Path | None = None) -> list[str]:
    """Sentences on what improves this result.

    Args:
        metrics: Content of metrics.json.
        names: C names.
        results: Result of `class_results`.
        predictions: Predictions of every evaluated image.
        run: Folder of the run; None where no folder of this machine may be shown.
    """
    steps = []
    tail = next((name for name in ('few', 'medium') if metrics.get(name) is not None), None)
    many = metrics.get('many')
    if tail and many is not None and many - metrics[tail] >= GAP:
        worst = ', '.join(result.name for result in results if result.group == tail and result.accuracy is not None
                          and result.accuracy < many)
        rebalance = '' if 'balanced_softmax' in metrics['method'] else 'Try --stage2 balanced_softmax, which takes seconds. '
        steps.append(f'{tail.capitalize()}-shot classes are {many - metrics[tail]:.0f} points below many-shot ones. '
                     f'{rebalance}Collect images of: {_shortened(worst)}.')
    if predictions is not None:
        pairs = [pair for pair in confused_pairs(predictions, 1) if pair[2] > 1]
        steps += [f'Compare the images of {display_name(names[a])} and {display_name(names[b])} '
                  f'({n} mistakes): classes that look alike may be merged, or labels be wrong.' for a, b, n in pairs]
        suspects = int(suspected_labels(predictions).sum())
        if suspects:
            steps.append(f"Check the labels of {pluralize(suspects, 'mistake')} with a confidence as high as that of "
                         'correct images; predictions.csv has file and probability of each.')
    if (metrics.get('ece') or 0) >= GAP:
        steps.append(f"Do not use probabilities as they are: on average they are {metrics['ece']:.0f} points off.")
    missing = classes_without_images(metrics.get('per_class_images') or [], names)
    if missing:
        steps.append(f'Add test images: {_shortened(missing)}.')
    small = sum(result.accuracy is not None and result.images < FEW_TESTS for result in results)
    if small:
        steps.append(f"Do not rely on the accuracy of single classes: {pluralize(small, 'class')} of {len(results):,} "
                     f"{'has' if small == 1 else 'have'} fewer than {FEW_TESTS} test images.")
    if run is not None:
        steps.append(f'Predict your images: python -m glmc.predict {shlex.quote(str(run))} my_photos')
    return steps


def _shortened(text: str, max_length: int = 200) -> str:
    """The text, cut at a comma."""
    return text if len(text) <= max_length else f"{text[:max_length].rpartition(', ')[0]} …"
