"""Losses of several experts and their gradients against loops in float64, and the identities between them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same

from glmc.losses.classification import LDAMLoss, ldam_loss
from glmc.losses.experts import balanced_experts, diversity_temperatures, expert_diversity, expert_taus

COUNTS, LABELS = [50, 12, 7, 3], [0, 3, 1, 0, 2]
PRIOR = [n / sum(COUNTS) for n in COUNTS]


def random(*shape: int, seed: int = 0, scale: float = 3) -> torch.Tensor:
    return torch.from_numpy(scale * np.random.default_rng(seed).normal(size=shape))


def cross_entropy(z, c: int):
    return -(z[c] - sum(each.exp() for each in z).log())


def loop_ldam(logits, shares, margins, weights):
    total = norm = 0
    for z, share in zip(logits, shares, strict=True):
        for c, p in enumerate(share):
            total += p * weights[c] * cross_entropy([z[j] - (margins[c] if j == c else 0) for j in range(len(z))], c)
            norm += p * weights[c]
    return total / norm


def test_ldam_on_soft_labels_is_the_loop():
    shares = torch.zeros(5, 4).double()
    for row, (i, j, lam) in zip(shares, [(0, 3, 0.3), (3, 3, 0.6), (1, 2, 0.5), (0, 1, 1.0), (2, 0, 0.9)], strict=True):
        row[i] += lam
        row[j] += 1 - lam
    margins, weights = random(4).abs(), random(4, seed=1).abs()
    arguments = shares, margins, weights
    assert_same(lambda z: ldam_loss(z, *arguments), lambda z: loop_ldam(z, *arguments), random(5, 4))


def test_ldam_on_hard_labels_is_that_of_its_row():
    loss = LDAMLoss(COUNTS, drw_start=0.5)
    loss.set_progress(0.6)
    logits, labels = random(5, 4).float(), torch.tensor(LABELS)
    found = ldam_loss(logits, F.one_hot(labels, 4).float(), loss.margins, loss.class_weight)
    torch.testing.assert_close(found, loss(logits, labels))


def loop_diversity(logits, temperature):
    total, (size, number, classes) = 0, logits.shape
    for i in range(size):
        means = [sum(logits[i, k, c].detach() for k in range(number)) / number for c in range(classes)]
        mean = [(each / t).exp() for each, t in zip(means, temperature, strict=True)]
        for k in range(number):
            own = [(logits[i, k, c] / temperature[c]).exp() for c in range(classes)]
            for c in range(classes):
                p, q = mean[c] / sum(mean), own[c] / sum(own)
                total += p * (p.log() - q.log())
    return (sum(temperature) / classes) ** 2 * total / size


@pytest.mark.parametrize('eta', [0.0, 0.05, 0.4])
def test_the_divergence_of_experts_is_the_loop(eta):
    temperature = diversity_temperatures(COUNTS, eta).double()
    assert_same(lambda z: expert_diversity(z, temperature), lambda z: loop_diversity(z, temperature), random(5, 3, 4))


def test_experts_that_agree_do_not_diverge():
    logits = random(5, 1, 4).expand(5, 3, 4)
    assert expert_diversity(logits, diversity_temperatures(COUNTS).double()).abs() < 1e-12


def test_temperatures_by_hand():
    """π = .5, .3, .2 and η = .1: u = 1.05, .99, .96."""
    expected = torch.tensor([1, 0.99 / 1.05, 0.96 / 1.05])
    torch.testing.assert_close(diversity_temperatures([50, 30, 20], 0.1), expected)
    assert diversity_temperatures([50, 30, 20], 0.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize('soft', [False, True])
def test_balanced_experts_are_the_loop(soft):
    taus = [0.0, 1.0, 2.0]
    adjustments = torch.tensor([[tau * np.log(p) for p in PRIOR] for tau in taus]).double()
    shares = torch.full((5, 4), 0.05).double() + 0.8 * F.one_hot(torch.tensor(LABELS), 4)

    def loop(logits):
        total = 0
        for i, k, c in np.ndindex(5, 3, 4):
            p = shares[i, c] if soft else float(c == LABELS[i])
            total += p * cross_entropy([logits[i, k, j] + adjustments[k, j] for j in range(4)], c) / 5 / 3
        return total
    targets = shares if soft else torch.tensor(LABELS)
    assert_same(lambda z: balanced_experts(z, targets, adjustments), loop, random(5, 3, 4))


@pytest.mark.parametrize('number, tau, expected', [
    (3, 1.0, [0, 1, 2]), (3, 1.25, [0, 1.25, 2.5]), (2, 1.0, [0, 2]), (1, 1.0, [1])])
def test_taus_of_the_experts(number, tau, expected):
    assert expert_taus(number, tau).tolist() == expected
