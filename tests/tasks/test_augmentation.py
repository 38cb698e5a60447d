"""RISDA: its logits against loops and samples, running statistics against numpy, and its two phases."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, in_two_processes

from glmc.losses.augmentation import implicit_augmentation
from glmc.losses.classification import DeferredReweighting
from glmc.models.backbone import create_backbone
from glmc.models.statistics import ClassStatistics
from glmc.tasks.augmentation import SemanticAugmentationTask

COUNTS, LABELS = [150, 120, 12, 3], torch.tensor([0, 3, 1, 0, 2])
IMAGES = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1, 1, 2, 3, 0, 2, 2, 1])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def covariances(diagonal: bool) -> torch.Tensor:
    root = random(4, 6, 6, seed=3)
    return random(4, 6, seed=3) ** 2 if diagonal else root @ root.transpose(1, 2) / 6


@pytest.mark.parametrize('diagonal', [False, True])
def test_augmented_logits_are_the_loop(diagonal):
    sigma, delta, b, a = covariances(diagonal), random(4, 6, seed=4), 0.7, 0.4

    def loop(logits, weight):
        total = 0
        for i, y in enumerate(LABELS.tolist()):
            augmented = []
            for j in range(4):
                d = weight[j] - weight[y]
                matrix = torch.diag(sigma[y]) if diagonal else sigma[y]
                quadratic = sum(d[p] * matrix[p, q] * d[q] for p in range(6) for q in range(6))
                augmented.append(logits[i, j] + b * quadratic / 2 + a * sum(d * delta[y]))
            total -= (augmented[y] - sum(each.exp() for each in augmented).log()) / len(LABELS)
        return total
    assert_same(lambda s, w: F.cross_entropy(implicit_augmentation(s, w, LABELS, sigma, delta, b, a), LABELS), loop,
                random(5, 4), random(4, 6, seed=1))


def test_the_loss_bounds_that_of_sampled_features():
    """Tightly for small covariances."""
    weight, features, sigma, delta = random(4, 6), random(5, 6, seed=1), covariances(False) / 200, random(4, 6, seed=4) / 5
    loss = F.cross_entropy(implicit_augmentation(features @ weight.T, weight, LABELS, sigma, delta, 1.0, 1.0), LABELS)
    noise = random(20_000, 5, 6, seed=5)
    roots = torch.linalg.cholesky(sigma)[LABELS]
    sampled = features + delta[LABELS] + torch.einsum('bde,nbe->nbd', roots, noise)
    expected = F.cross_entropy((sampled @ weight.T).flatten(0, 1), LABELS.repeat(20_000))
    assert expected < loss < 1.02 * expected


@pytest.mark.parametrize('diagonal', [False, True])
def test_merged_statistics_are_those_of_numpy(diagonal, monkeypatch):
    monkeypatch.setattr('glmc.models.statistics.LARGEST', 0 if diagonal else 2 ** 26)
    statistics, rng = ClassStatistics(COUNTS, 5), np.random.default_rng(0)
    features, labels, predicted = rng.normal(2, 3, size=(60, 5)), rng.integers(3, size=60), rng.integers(4, size=60)
    for batch in np.split(np.arange(60), [7, 20, 21, 45]):
        rows = [torch.from_numpy(np.append(each[batch], filling, 0)) for each, filling in (
            (features, np.full((2, 5), np.nan)), (labels, [-1, -1]), (predicted, [0, 0]))]  # padding
        statistics.follow(rows[0].float(), *rows[1:], torch.tensor(True))
    for c in range(3):
        own = features[labels == c]
        covariance = np.cov(own.T, bias=True)
        np.testing.assert_allclose(statistics.means[c], own.mean(0), rtol=1e-4)
        np.testing.assert_allclose(statistics.own[c], np.diag(covariance) if diagonal else covariance, rtol=1e-3, atol=1e-4)
        assert statistics.confusion[c].tolist() == np.bincount(predicted[labels == c], minlength=4).tolist()
    assert statistics.numbers[3] == 0 and not statistics.own[3].any()


def test_rare_classes_borrow_by_confusion():
    statistics = ClassStatistics(COUNTS, 5)
    statistics.own.copy_(random(4, 5, 5))
    statistics.means.copy_(random(4, 5, seed=1))
    statistics.confusion.copy_(torch.tensor([[6., 2, 0, 0], [0, 5, 0, 0], [3, 0, 1, 0], [0, 0, 0, 0]]))
    statistics.begin_epoch(0.8, augment=True)
    own, means = statistics.own, statistics.means
    assert torch.equal(statistics.covariance[:2], own[:2])  # over 100 images
    torch.testing.assert_close(statistics.covariance[2], 0.75 * own[0] + 0.25 * own[2])
    torch.testing.assert_close(statistics.covariance[3], own[3])  # a class that was never seen
    torch.testing.assert_close(statistics.shift[2], 0.75 * (means[0] - means[2]))
    assert not statistics.shift[1].any() and not statistics.shift[3].any()
    before = copy.deepcopy(statistics.state_dict())
    statistics.confusion.zero_()
    statistics.own.mul_(2)
    statistics.begin_epoch(0.8, augment=True)  # a resumed epoch
    assert torch.equal(statistics.covariance, before['covariance'])
    statistics.begin_epoch(0.9, augment=True)  # from the covariances of now, and the confusion of then
    torch.testing.assert_close(statistics.covariance, 2 * before['covariance'])
    assert torch.equal(statistics.shift, before['shift'])


def new_task(**options) -> SemanticAugmentationTask:
    torch.manual_seed(0)
    net = create_backbone('vit_tiny_patch16_224', 4, img_size=16, patch_size=8, depth=1, embed_dim=16, num_heads=2)
    return SemanticAugmentationTask(net, COUNTS, **options).train()


def step(task, images=IMAGES, labels=CLASSES, batch_fraction: float = 1.0):
    task.before_batch(len(labels), batch_fraction)
    outputs = task(images, labels)
    (outputs['loss'] * batch_fraction).backward()
    task.after_batch({name: value.detach() for name, value in outputs.items()})
    return outputs['loss'].detach()


def test_without_amounts_it_is_weighted_cross_entropy():
    task, expected = new_task(isda_variance=0.0, isda_shift=0.0), DeferredReweighting(COUNTS)
    for progress in (0.7, 0.8, 0.9):
        task.set_progress(progress)
        expected.set_progress(progress)
        torch.testing.assert_close(step(task), expected(task.get_eval_model()(IMAGES), CLASSES))


def test_the_first_phase_is_cross_entropy_and_the_second_augments():
    task = new_task()
    for progress in (0.6, 0.7):
        task.set_progress(progress)
        for _ in range(2):
            torch.testing.assert_close(step(task), F.cross_entropy(task.get_eval_model()(IMAGES), CLASSES))
    assert task.memory.classes.numbers.sum() == 18  # those of one epoch
    task.set_progress(0.8)
    torch.testing.assert_close(task.amounts, torch.tensor([0.75, 0.5]) * 0.8)
    weighted = DeferredReweighting(COUNTS)
    weighted.set_progress(0.8)
    assert task.memory.classes.covariance.any()
    assert (step(task) - weighted(task.get_eval_model()(IMAGES), CLASSES)).abs() > 1e-4


def train(rank: int = 0, world: int = 1) -> tuple[dict, dict]:
    task = new_task()
    task.set_progress(0.7)
    step(task, IMAGES[rank::world], CLASSES[rank::world], len(IMAGES[rank::world]) * world / 9)
    gradients = {key: value.grad.numpy() for key, value in task.named_parameters() if value.grad is not None}
    return gradients, {key: value.numpy() for key, value in task.memory.state_dict().items()}


def test_two_processes_equal_one_of_twice_the_batch(tmp_path):
    expected, memory = train()
    (one, first), (two, second) = in_two_processes(lambda rank: train(rank, 2), tmp_path)
    for key, gradient in expected.items():
        np.testing.assert_allclose((one[key] + two[key]) / 2, gradient, rtol=1e-3, atol=2e-6, err_msg=key)
    for key, value in memory.items():
        np.testing.assert_allclose(first[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_a_batch_that_is_not_finite_leaves_no_trace():
    task = new_task()
    task.set_progress(0.7)
    step(task)
    before = copy.deepcopy(task.memory.state_dict())
    step(task, IMAGES.clone().index_fill_(0, torch.tensor([4]), float('nan')))
    assert all(torch.equal(value, before[name]) for name, value in task.memory.state_dict().items())
