"""The likely cause of each failing class, and the next steps, from counts and predictions."""
from pathlib import Path

import numpy as np
import pytest

from glmc.evaluation.metrics import Predictions
from glmc.report.diagnosis import class_results, diagnosis, failing, next_steps, suspected_labels

NAMES = ['ant', 'bee', 'cat', 'dog']
COUNTS = [1000, 900, 50, 5]


def result_of(rows: list[tuple[int, int, float]], counts=tuple(COUNTS)):
    """Metrics and predictions of (label, prediction, confidence) rows."""
    labels, predicted, confidence = map(np.array, zip(*rows, strict=True))
    images = np.bincount(labels, minlength=len(counts))
    hits = np.bincount(labels[labels == predicted], minlength=len(counts))
    accuracy = [100 * hit / number if number else None for hit, number in zip(hits, images, strict=True)]
    seen = [value for value in accuracy if value is not None]
    metrics = dict(train_counts=list(counts), per_class_images=images.tolist(), per_class_accuracy=accuracy,
                   shot_thresholds=[20, 100], class_mean=float(np.mean(seen)), many=90.0, medium=80.0, few=40.0, ece=3.0)
    return metrics, Predictions(labels, predicted, confidence)


def cause(label: int, rows, counts=tuple(COUNTS)) -> str:
    metrics, predictions = result_of(rows, counts)
    (result,) = [r for r in class_results(metrics, NAMES, predictions) if r.index == label]
    return diagnosis(result, metrics, NAMES)


def right(label: int, number: int, confidence: float = 0.9) -> list[tuple[int, int, float]]:
    return [(label, label, confidence)] * number


@pytest.mark.parametrize('label, rows, expected', [
    (3, [(3, 0, 0.5), (3, 1, 0.5), (3, 2, 0.5), *right(3, 5)], 'Few images (5 training images).'),
    (2, [(2, 1, 0.5)] * 3 + [(2, 0, 0.5)] + right(2, 4) + right(1, 5),
     'Confused with bee: 3 of 4 mistakes, a class of 18 times as many training images.'),
    (0, [(0, 1, 0.5)] * 3 + right(0, 4) + right(1, 5), 'Confused with bee: 3 of 3 mistakes.'),
    (3, [(3, 2, 0.5)] * 4 + right(3, 4) + right(2, 5),
     'Few images (5 training images) and confused with cat: 4 of 4 mistakes, a class of 10 times as many training images.'),
    (0, [(0, 1, 0.95)] * 2 + [(0, 2, 0.5), (0, 3, 0.5), (0, 2, 0.5)] + right(0, 4) + right(1, 5),
     'Wrong labels suspected: 2 of 5 mistakes are as confident as correct images of the predicted class.'),
    (0, [(0, 1, 0.5), (0, 2, 0.5), (0, 3, 0.5)] + right(0, 4), 'No single cause: its mistakes fall on several classes.'),
    (0, [(0, 1, 0.5), *right(0, 5)], 'A single mistake.'),
    (0, [(0, 1, 0.5), *right(0, 1)], 'A single mistake. Only 2 test images.')])
def test_cause_of_a_failing_class(label, rows, expected):
    assert cause(label, rows) == expected


def test_few_images_are_no_cause_where_all_classes_have_few():
    assert 'Few' not in cause(3, [(3, 0, 0.5), (3, 1, 0.5), *right(3, 5)], counts=(7, 6, 6, 5))


def test_suspects_are_the_loop_of_confident_learning():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(4, size=(2, 300))
    predicted = np.where(rng.random(300) < 0.6, labels, predicted)
    confidence = rng.random(300)
    found = suspected_labels(Predictions(labels, predicted, confidence))
    for k in range(300):
        own = [confidence[i] for i in range(300) if labels[i] == predicted[i] == predicted[k]]
        assert found[k] == (labels[k] != predicted[k] and confidence[k] >= max(np.mean(own), 0.8))
    assert 0 < found.sum() < (labels != predicted).sum()
    assert suspected_labels(Predictions(*np.zeros((3, 0), dtype=int))).shape == (0,)


def test_classes_come_worst_first_and_unmeasured_last():
    metrics, predictions = result_of([(0, 1, 0.5), *right(0, 1), *right(2, 2), (3, 2, 0.5)])
    results = class_results(metrics, NAMES, predictions)
    assert [result.name for result in results] == ['dog', 'ant', 'cat', 'bee']
    assert [result.name for result in failing(results, metrics['class_mean'])] == ['dog', 'ant']
    assert failing(class_results(*[result_of(right(0, 3))[0], NAMES]), 100.0) == []


def test_next_steps_follow_from_the_result():
    metrics, predictions = result_of([(3, 0, 0.95)] * 3 + right(0, 6) + right(2, 2))
    metrics.update(ece=14.0, method='ce')
    steps = next_steps(metrics, NAMES, class_results(metrics, NAMES, predictions), predictions, Path('out/a run'))
    assert [step.split(':')[0] for step in steps] == [
        'Few-shot classes are 50 points below many-shot ones. Try --stage2 balanced_softmax, which takes seconds. '
        'Collect images of', 'Compare the images of dog and ant (3 mistakes)',
        'Check the labels of 3 mistakes with a confidence as high as that of correct images; predictions.csv has file and '
        'probability of each.', 'Do not use probabilities as they are', 'Add test images',
        'Do not rely on the accuracy of single classes', 'Predict your images']
    assert steps[0].endswith(': dog.') and steps[4].endswith('bee.') and "'out/a run' my_photos" in steps[-1]
    assert next_steps({**metrics, 'few': 85.0, 'ece': 1.0, 'per_class_images': [5] * 4}, NAMES, []) == []
    again = next_steps({**metrics, 'method': 'ce + balanced_softmax'}, NAMES, class_results(metrics, NAMES, predictions))
    assert again[0].startswith('Few-shot classes are 50 points below many-shot ones. Collect images of: dog')
