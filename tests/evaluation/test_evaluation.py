"""The evaluator's metrics against numpy loops and scikit-learn."""
import json
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)

from glmc.evaluation.metrics import LongTailEvaluator, Predictions, confused_pairs
from glmc.evaluation.priors import resolve_prior
from glmc.evaluation.text import detail_table, shot_legend, shot_line, shot_table

TRAIN_COUNTS = [300, 101, 100, 60, 21, 20, 3]  # two many-, three medium-, two few-shot classes
GROUPS = {'many': [0, 1], 'medium': [2, 3, 4], 'few': [5, 6]}


def predictions(seed: int = 0, size: int = 400, num_classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Logits that lean towards the label, and uneven labels."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, num_classes + 1)
    labels = rng.choice(num_classes, size, p=weights / weights.sum())
    return rng.normal(size=(size, num_classes)) + 1.5 * np.eye(num_classes)[labels], labels


def measure(logits, labels, train_counts=tuple(TRAIN_COUNTS), batch: int = 64, **kwargs) -> dict:
    evaluator = LongTailEvaluator(train_counts, **kwargs)
    for start in range(0, len(labels), batch):
        evaluator.update(torch.tensor(logits[start:start + batch]).float(), torch.tensor(labels[start:start + batch]))
    return evaluator.compute()


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def class_accuracies(logits, labels, num_classes: int = 7) -> list[float | None]:
    hits = logits.argmax(1) == labels
    return [100 * hits[labels == c].mean() if (labels == c).any() else None for c in range(num_classes)]


def loop_calibration_error(logits, labels, num_bins: int = 15) -> float:
    """Guo et al.: bins (b/B, (b+1)/B], each |accuracy - confidence| weighted by its share of the images."""
    confidence, hits = softmax(logits).max(1), logits.argmax(1) == labels
    error = 0.0
    for b in range(num_bins):
        inside = [k for k in range(len(labels)) if b / num_bins < confidence[k] <= (b + 1) / num_bins]
        if inside:
            accuracy, mean_confidence = np.mean(hits[inside]), np.mean(confidence[inside])
            error += len(inside) / len(labels) * abs(accuracy - mean_confidence)
    return 100 * error


def test_accuracies_are_scikit_learns():
    logits, labels = predictions()
    metrics = measure(logits, labels)
    assert metrics['top1'] == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)))
    assert metrics['top5'] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=range(7)))
    assert metrics['class_mean'] == pytest.approx(100 * balanced_accuracy_score(labels, logits.argmax(1)))
    assert metrics['macro_f1'] == pytest.approx(100 * f1_score(labels, logits.argmax(1), average='macro'))
    assert metrics['loss'] == pytest.approx(log_loss(labels, softmax(logits)), rel=1e-5)
    assert metrics['top1'] < metrics['top5'] < 100
    assert metrics['top1'] != pytest.approx(metrics['class_mean'], abs=0.1)


def test_top1_is_the_class_mean_of_as_many_images_of_each_class():
    """With equal logits too, where the first class counts as predicted: few logits are all different in low precision."""
    labels = np.repeat(np.arange(7), 50)
    logits = np.random.default_rng(0).integers(3, size=(350, 7))
    metrics = measure(logits, labels)
    assert metrics['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
    assert metrics['top1'] == pytest.approx(metrics['class_mean'])


def test_shot_groups_are_means_over_their_classes():
    logits, labels = predictions()
    accuracies, metrics = class_accuracies(logits, labels), measure(logits, labels)
    assert metrics['per_class_accuracy'] == pytest.approx(accuracies)
    for name, classes in GROUPS.items():
        assert metrics[name] == pytest.approx(np.mean([accuracies[c] for c in classes]))
    assert metrics['worst_class'] == pytest.approx(min(accuracies))
    assert metrics['harmonic_mean'] == pytest.approx(7 / sum(1 / a for a in accuracies))
    assert metrics['shot_classes'] == {'many': 2, 'medium': 3, 'few': 2}


def test_counts_and_thresholds_are_reported():
    logits, labels = predictions()
    metrics = measure(logits, labels, thresholds=(3, 60))
    assert metrics['num_images'] == 400
    assert metrics['per_class_images'] == [(labels == c).sum() for c in range(7)]
    assert metrics['train_counts'] == TRAIN_COUNTS
    assert metrics['shot_thresholds'] == [3, 60]
    assert metrics['shot_classes'] == {'many': 3, 'medium': 3, 'few': 1}


@pytest.mark.parametrize('scale', [0.2, 1, 5])
def test_calibration_error_is_the_loop(scale):
    logits, labels = predictions()
    logits = (logits * scale).astype(np.float32)
    assert measure(logits, labels)['ece'] == pytest.approx(loop_calibration_error(logits, labels), abs=1e-3)


def test_calibration_error_of_certainty():
    logits = 200 * np.eye(7)[[0, 1, 2, 3]]
    assert measure(logits, np.array([0, 1, 2, 3]))['ece'] == pytest.approx(0, abs=1e-9)
    assert measure(logits, np.array([0, 1, 2, 4]))['ece'] == pytest.approx(25)


def test_counting_does_not_depend_on_the_batches():
    logits, labels = predictions()
    one, many = measure(logits, labels, batch=400), measure(logits, labels, batch=7)
    assert one.keys() == many.keys()
    for name in one.keys() - {'shot_classes'}:
        assert one[name] == pytest.approx(many[name]), name


def test_absent_classes_count_nowhere_and_read_none():
    logits, labels = predictions()
    kept = ~np.isin(labels, [3, 5, 6])  # one medium-shot class, and all few-shot ones
    logits, labels = logits[kept], labels[kept]
    accuracies, metrics = class_accuracies(logits, labels), measure(logits, labels)
    seen = [0, 1, 2, 4]
    assert metrics['few'] is None
    assert metrics['shot_classes'] == {'many': 2, 'medium': 2, 'few': 0}
    assert metrics['medium'] == pytest.approx(np.mean([accuracies[2], accuracies[4]]))
    assert metrics['class_mean'] == pytest.approx(np.mean([accuracies[c] for c in seen]))
    assert metrics['worst_class'] == pytest.approx(min(accuracies[c] for c in seen))
    assert [value is None for value in metrics['per_class_accuracy']] == [c not in seen for c in range(7)]
    # absent but predicted: scikit-learn counts such a class with an F1 of 0
    assert metrics['macro_f1'] == pytest.approx(100 * f1_score(labels, logits.argmax(1), average='macro'))


def test_a_class_never_predicted_has_f1_zero():
    labels = np.repeat(np.arange(7), 3)
    logits = np.eye(7)[np.where(labels == 6, 0, labels)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = f1_score(labels, logits.argmax(1), average='macro', zero_division=0)
    metrics = measure(logits, labels)
    assert metrics['macro_f1'] == pytest.approx(100 * expected)
    assert metrics['harmonic_mean'] == metrics['worst_class'] == 0


@pytest.mark.parametrize('num_classes', [2, 3, 4])
def test_fewer_than_five_classes_are_all_in_the_top_five(num_classes):
    logits, labels = predictions(num_classes=num_classes)
    metrics = measure(logits, labels, [50] * num_classes)
    assert metrics['top5'] == 100
    assert metrics['top1'] == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_non_finite_logits_give_finite_metrics(value):
    logits, labels = predictions()
    logits[::5] = value
    metrics = measure(logits, labels)
    assert metrics['loss'] is None
    assert json.loads(json.dumps(metrics, allow_nan=False))['num_images'] == 400
    assert 0 < metrics['ece'] < 100


def test_nothing_evaluated_is_not_a_crash():
    metrics = LongTailEvaluator(TRAIN_COUNTS).compute()
    for name in ('many', 'medium', 'few', 'class_mean', 'worst_class', 'harmonic_mean', 'macro_f1'):
        assert metrics[name] is None
    assert metrics['ece'] == metrics['num_images'] == 0


def test_reset_forgets():
    logits, labels = predictions()
    evaluator = LongTailEvaluator(TRAIN_COUNTS)
    evaluator.update(torch.tensor(logits), torch.tensor(labels))
    evaluator.reset()
    evaluator.update(torch.tensor(logits[:100]), torch.tensor(labels[:100]))
    assert evaluator.compute() == measure(logits[:100], labels[:100], batch=100)


def test_table_shows_groups_and_a_dash_for_an_empty_one():
    logits, labels = predictions()
    kept = labels < 5
    metrics = measure(logits[kept], labels[kept])
    head, row, missing = shot_table(metrics, 'abcdefg').splitlines()
    assert head.split('  ') == ['top-1', 'top-5', 'many (2)', 'medium (3)', 'few (0)', 'class mean']
    assert missing == '2 classes without images, not evaluated: f, g'
    assert row.split() == [f'{metrics[name]:.2f}' for name in ('top1', 'top5', 'many', 'medium')] + [
        '–', f"{metrics['class_mean']:.2f}"]
    assert len(head) == len(row)


def test_the_legend_gives_the_training_images_of_each_group():
    assert shot_legend([20, 100]) == (
        'Training images per class: many-shot: more than 100, medium-shot: 21 to 100, few-shot: at most 20')
    assert 'medium-shot: none' in shot_legend([5, 5])


def test_line_for_the_log():
    logits, labels = predictions()
    kept = labels < 5
    metrics = measure(logits[kept], labels[kept])
    expected = 'top-1 {top1:.2f} ({many:.1f} / {medium:.1f} / –), class mean {class_mean:.2f}'
    assert shot_line(metrics) == expected.format(**metrics)


@pytest.mark.parametrize('seed', [1, 2])
def test_calibration_of_the_shot_groups_is_that_of_their_images(seed):
    logits, labels = predictions(seed)
    metrics = measure(logits, labels)
    for name, classes in GROUPS.items():
        inside = np.isin(labels, classes)
        assert metrics[f'ece_{name}'] == pytest.approx(loop_calibration_error(logits[inside], labels[inside]), abs=1e-3)
    assert sum(metrics['bin_images']) == 400
    assert sum(metrics['bin_hits']) == (logits.argmax(1) == labels).sum()
    assert sum(metrics['bin_confidence']) == pytest.approx(softmax(logits).max(1).sum(), rel=1e-5)
    gaps = np.abs(np.subtract(metrics['bin_hits'], metrics['bin_confidence']))
    assert metrics['ece'] == pytest.approx(100 * gaps.sum() / 400)


@pytest.mark.parametrize('num_classes', [2, 7, 40])
def test_ece_and_f1_are_torchmetrics(num_classes):
    functional = pytest.importorskip('torchmetrics.functional.classification', reason='needs torchmetrics')
    logits, labels = predictions(3, 1000, num_classes)
    metrics, probabilities = measure(logits, labels, [50] * num_classes), torch.tensor(softmax(logits))
    error = functional.multiclass_calibration_error(
        probabilities, torch.tensor(labels), num_classes, n_bins=15, norm='l1')
    f1 = functional.multiclass_f1_score(probabilities, torch.tensor(labels), num_classes, average='macro')
    assert metrics['ece'] == pytest.approx(100 * error.item(), abs=1e-3)
    assert metrics['macro_f1'] == pytest.approx(100 * f1.item(), abs=1e-3)


@pytest.mark.parametrize('num_classes, worst', [(7, 1), (10, 1), (11, 2), (30, 3)])
def test_the_worst_tenth_is_rounded_up(num_classes, worst):
    logits, labels = predictions(4, 2000, num_classes)
    accuracies = sorted(class_accuracies(logits, labels, num_classes))
    metrics = measure(logits, labels, [50] * num_classes)
    assert metrics['worst_tenth'] == pytest.approx(np.mean(accuracies[:worst]))


def test_predictions_are_kept_in_order():
    logits, labels = predictions()
    evaluator = LongTailEvaluator(TRAIN_COUNTS)
    for start in range(0, 400, 64):
        evaluator.update(torch.tensor(logits[start:start + 64]), torch.tensor(labels[start:start + 64]))
    kept = evaluator.predictions()
    np.testing.assert_array_equal(kept.labels, labels)
    np.testing.assert_array_equal(kept.predicted, logits.argmax(1))
    np.testing.assert_allclose(kept.confidence, softmax(logits).max(1), rtol=1e-5)
    assert LongTailEvaluator(TRAIN_COUNTS).predictions().labels.shape == (0,)


def test_confused_pairs_are_those_of_the_confusion_matrix():
    logits, labels = predictions()
    matrix = confusion_matrix(labels, logits.argmax(1))
    np.fill_diagonal(matrix, 0)
    kept = Predictions(labels, logits.argmax(1), logits.max(1))
    pairs = confused_pairs(kept, limit=100)
    assert {(label, predicted): images for label, predicted, images in pairs} == {
        (i, j): matrix[i, j] for i in range(7) for j in range(7) if matrix[i, j]}
    assert [pair[2] for pair in pairs] == sorted((pair[2] for pair in pairs), reverse=True)
    assert confused_pairs(kept, limit=3) == pairs[:3]
    assert confused_pairs(Predictions(labels, labels, logits.max(1))) == []


def test_details_of_a_group_without_images_are_a_dash():
    logits, labels = predictions()
    kept = labels < 5
    head, row = detail_table(measure(logits[kept], labels[kept])).splitlines()
    assert head.split('  ')[-2:] == ['ECE few', ' NLL']
    assert row.split()[-2] == '–'
    assert len(head) == len(row)


def test_stored_priors_resolve_to_probabilities():
    np.testing.assert_allclose(resolve_prior('uniform', [3, 1, 0]), [1 / 3] * 3)
    np.testing.assert_allclose(resolve_prior('train', [3, 1, 0]), np.array([3, 1, 0.5]) / 4.5)
    np.testing.assert_allclose(resolve_prior([1, 3, 4], [3, 1, 0]), [0.125, 0.375, 0.5])
    zero = resolve_prior([1, 0, 1], [3, 1, 2])
    assert np.isfinite(np.log(zero)).all() and zero.sum() == pytest.approx(1) and 0 < zero[1] < 1e-6
