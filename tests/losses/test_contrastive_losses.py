"""Contrastive losses and their gradients against loops in float64, and the identities between them."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same

from glmc.losses.classification import LogitAdjustedLoss
from glmc.losses.contrastive import (
    balanced_contrastive,
    k_positive_contrastive,
    other_classes_contrastive,
    parametric_contrastive,
    pick_positives,
    supervised_contrastive,
    targeted_contrastive,
)

CLASSES, WIDTH, T = 4, 5, 0.3
LABELS = [0, 0, 2, 0, 1, 2]  # one class with a single image, one without any
COUNTS = [50, 12, 7, 3]
QUEUE_LABELS = [0, 2, -1, 0, 3, 0, -1, 1]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.from_numpy(np.random.default_rng(seed).normal(size=shape)), dim=-1)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return sum(x * y for x, y in zip(a, b, strict=True)) / T


def log_p(chosen: torch.Tensor, everything: list[torch.Tensor]) -> torch.Tensor:
    return chosen - sum(each.exp() for each in everything).log()


def in_batch(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Arguments of an in-batch loss on one process: two views of each image, side by side."""
    labels = torch.tensor(LABELS).repeat_interleave(2)
    return z, labels, z, labels, torch.arange(len(z))


def loop_supcon(z: torch.Tensor) -> torch.Tensor:
    labels, total = [label for label in LABELS for _ in range(2)], 0
    for i in range(len(z)):
        others = [dot(z[i], z[a]) for a in range(len(z)) if a != i]
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        total -= sum(log_p(dot(z[i], z[p]), others) for p in positives) / len(positives)
    return total / len(z)


def test_supcon_is_the_loop():
    assert_same(lambda z: supervised_contrastive(*in_batch(z), T), loop_supcon, unit(12, WIDTH))


def test_supcon_ignores_padding_and_survives_anchors_without_positives():
    z = unit(12, WIDTH)
    _, labels, *_ = in_batch(z)
    padded = torch.cat([z, unit(3, WIDTH, seed=1)]), torch.cat([labels, torch.full((3,), -1)])
    found = supervised_contrastive(z, labels, *padded, torch.arange(12), T)
    torch.testing.assert_close(found, supervised_contrastive(*in_batch(z), T))
    alone = supervised_contrastive(z, torch.arange(12), z, torch.arange(12), torch.arange(12), T)
    assert alone == 0


def loop_bcl(z: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    labels = [label for label in LABELS for _ in range(2)]
    everything, of = [*z, *prototypes], [*labels, *range(CLASSES)]
    number = [labels.count(k) + 1 for k in range(CLASSES)]
    total = 0
    for i in range(len(z)):
        denominator = 0
        for j in range(len(everything)):
            if j != i:
                weigh = number[of[j]] - 1 if of[j] == labels[i] else number[of[j]]
                denominator = denominator + dot(z[i], everything[j]).exp() / weigh
        for p in range(len(everything)):
            if p != i and of[p] == labels[i]:
                total -= (dot(z[i], everything[p]) - denominator.log()) / (number[labels[i]] - 1)
    return total / len(z)


def test_bcl_is_the_loop():
    """With a class that has a prototype alone, and a class of one image."""
    assert_same(lambda z, c: balanced_contrastive(*in_batch(z), c, T), loop_bcl,
                unit(12, WIDTH), unit(CLASSES, WIDTH, seed=1))


def test_bcl_ignores_padding():
    z, prototypes = unit(12, WIDTH), unit(CLASSES, WIDTH, seed=1)
    _, labels, *_ = in_batch(z)
    padded = torch.cat([z, unit(3, WIDTH, seed=2)]), torch.cat([labels, torch.full((3,), -1)])
    found = balanced_contrastive(z, labels, *padded, torch.arange(12), prototypes, T)
    torch.testing.assert_close(found, balanced_contrastive(*in_batch(z), prototypes, T))


def loop_paco(logits, z, candidates, candidate_labels, alpha: float, gamma: float) -> torch.Tensor:
    total = 0
    for i, label in enumerate(LABELS):
        similar = {j: dot(z[i], candidates[j]) for j, of in enumerate(candidate_labels) if of >= 0 and j != i}
        denominator = sum(logit.exp() for logit in logits[i]) + gamma * sum(value.exp() for value in similar.values())
        positives = [j for j in similar if candidate_labels[j] == label]
        terms = logits[i][label] - denominator.log()
        for j in positives:
            terms = terms + alpha * (similar[j] - denominator.log())
        total -= terms / (1 + alpha * len(positives))
    return total / len(LABELS)


@pytest.mark.parametrize('alpha, gamma', [(0.05, 1.0), (1.0, 1.0), (0.3, 0.5)])
def test_paco_is_the_loop(alpha, gamma):
    labels = torch.tensor(LABELS)
    candidate_labels = torch.cat([labels, torch.tensor(QUEUE_LABELS)])

    def ours(logits, z, others):
        candidates = torch.cat([z, others])
        return parametric_contrastive(z, labels, candidates, candidate_labels, torch.arange(6), logits, T, alpha, gamma)

    def loop(logits, z, others):
        return loop_paco(logits, z, torch.cat([z, others]), candidate_labels.tolist(), alpha, gamma)
    assert_same(ours, loop, unit(6, CLASSES, seed=3) * 3, unit(6, WIDTH), unit(8, WIDTH, seed=1))


def test_paco_without_contrast_is_balanced_softmax():
    logits, z, labels = unit(6, CLASSES, seed=3) * 3, unit(6, WIDTH), torch.tensor(LABELS)
    loss = LogitAdjustedLoss(COUNTS).double()
    assert_same(
        lambda s: parametric_contrastive(z, labels, z, labels, torch.arange(6), s + loss.adjustment, T, 0.0, 0.0),
        lambda s: F.cross_entropy(s + loss.adjustment, labels), logits)


def loop_kcl(q, k, queue, picked, targets=None, weight: float = 0.0) -> torch.Tensor:
    total = 0
    for i, label in enumerate(LABELS):
        slots = [dot(q[i], queue[j]) for j, of in enumerate(QUEUE_LABELS) if of >= 0]
        extra = [] if targets is None else [dot(q[i], target) for target in targets]
        everything = [dot(q[i], k[i]), *slots, *extra]
        chosen = [j for j in range(len(queue)) if picked[i][j]]
        terms = log_p(dot(q[i], k[i]), everything) + sum(log_p(dot(q[i], queue[j]), everything) for j in chosen)
        if targets is not None:
            terms = terms + weight * log_p(extra[label], everything)
        total -= terms / (1 + len(chosen) + (targets is not None))
    return total / len(LABELS)


def picks(number: int, seed: int = 0) -> torch.Tensor:
    uniform = torch.from_numpy(np.random.default_rng(seed).random(8))
    return pick_positives(torch.tensor(LABELS), torch.tensor(QUEUE_LABELS), number, uniform, torch.arange(6))


@pytest.mark.parametrize('number', [0, 1, 2, 6])
def test_kcl_is_the_loop(number):
    queue_labels, keys, queue = torch.tensor(QUEUE_LABELS), unit(6, WIDTH, seed=1), unit(8, WIDTH)
    picked = picks(number)
    assert_same(
        lambda q: k_positive_contrastive(q, keys, queue, queue_labels, picked, T),
        lambda q: loop_kcl(q, keys, queue, picked), unit(6, WIDTH, seed=2))


def test_kcl_without_positives_is_info_nce():
    """MoCo's loss: cross-entropy in which the own key comes first."""
    labels, queue_labels = torch.tensor(LABELS), torch.zeros(8).long()
    keys, queue = unit(6, WIDTH, seed=1), unit(8, WIDTH)
    nothing = pick_positives(labels, queue_labels, 0, torch.rand(8), torch.arange(6))
    assert_same(
        lambda q: k_positive_contrastive(q, keys, queue, queue_labels, nothing, T),
        lambda q: F.cross_entropy(torch.cat([(q * keys).sum(1, keepdim=True), q @ queue.T], 1) / T, torch.zeros(6).long()),
        unit(6, WIDTH, seed=2))


@pytest.mark.parametrize('active', [0.0, 1.0])
def test_tsc_is_the_loop(active):
    labels, queue_labels = torch.tensor(LABELS), torch.tensor(QUEUE_LABELS)
    keys, queue = unit(6, WIDTH, seed=1), unit(8, WIDTH)
    picked, targets, flag = picks(2), unit(CLASSES, WIDTH, seed=4), torch.tensor(active).double()
    assert_same(
        lambda q: targeted_contrastive(q, keys, queue, queue_labels, picked, T, labels, targets, 0.2, flag),
        lambda q: loop_kcl(q, keys, queue, picked, targets if active else None, 0.2), unit(6, WIDTH, seed=2))


def test_positives_are_of_the_class_at_most_k_and_all_that_there_are():
    match = torch.tensor(LABELS)[:, None] == torch.tensor(QUEUE_LABELS)
    for number in range(9):
        picked = picks(number, seed=number)
        assert not (picked & ~match).any()
        assert picked.sum(1).tolist() == [min(number, count) for count in match.sum(1).tolist()]
    assert torch.equal(picks(8), match)  # k as large as the class: the positives of SupCon over the queue


def test_positives_are_drawn_uniformly():
    """One of four slots of the class among many, for each of three anchors: chi-square of 4,000 draws."""
    queue_labels = torch.tensor([0, 1, 1, 0, 2, 0, -1, 0, 1, 1])
    rng, found = np.random.default_rng(0), torch.zeros(3, 10)
    for _ in range(4000):
        uniform = torch.from_numpy(rng.random(10))
        found += pick_positives(torch.zeros(3).long(), queue_labels, 1, uniform, torch.arange(3))
    found = found[:, queue_labels == 0]
    assert ((found - 1000) ** 2 / 1000).sum(1).max() < 16.3  # p = 0.001 for three degrees of freedom


@pytest.mark.parametrize('loss', [supervised_contrastive, lambda *args: balanced_contrastive(*args[:-1], args[0][:4], T)])
def test_similarities_are_not_those_of_bfloat16(loss):
    z = unit(12, WIDTH).float()
    with torch.autocast('cpu', torch.bfloat16):
        found = loss(*in_batch(z), T)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(*in_batch(z), T), rtol=1e-6, atol=0)
    assert math.isfinite(found)


def test_the_contrast_with_other_classes_is_the_loop():
    """The own key is a positive though it is of the anchor's class; slots of its class and empty ones are no negatives."""
    def loop(queries, keys, queue):
        total = 0
        for i, label in enumerate(LABELS):
            negatives = [dot(queries[i], queue[j]) for j, other in enumerate(QUEUE_LABELS) if other not in (label, -1)]
            own = dot(queries[i], keys[i])
            total -= log_p(own, [own, *negatives]) / len(LABELS)
        return total
    labels, queue_labels = torch.tensor(LABELS), torch.tensor(QUEUE_LABELS)
    assert_same(lambda q, k, queue: other_classes_contrastive(q, k, labels, queue, queue_labels, T), loop,
                unit(6, WIDTH), unit(6, WIDTH, seed=1), unit(8, WIDTH, seed=2))
