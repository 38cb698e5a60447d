"""Each equation of the loss, and its gradient, against loops and hand formulas in float64."""
import math

import numpy as np
import pytest
import torch

from glmc.losses import class_weights, cumulative_alpha, negative_cosine, soft_cross_entropy
from glmc.mixing import mixup

BATCH, CLASSES, WIDTH = 5, 4, 6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)) * 3


def distributions(seed: int = 1) -> torch.Tensor:
    return random(BATCH, CLASSES, seed=seed).softmax(-1)


WEIGHT = torch.tensor([0.2, 0.5, 1.0, 2.3], dtype=torch.float64)


def loop_cross_entropy(logits, targets, weight) -> float:
    total = 0.0
    for z, p in zip(logits.tolist(), targets.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in z))
        total += sum(-w * q * (value - log_sum) for value, q, w in zip(z, p, weight, strict=True))
    return total / len(logits)


def loop_negative_cosine(u, h) -> float:
    total = 0.0
    for a, b in zip(u.tolist(), h.tolist(), strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        total -= dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))
    return total / len(u)


@pytest.mark.parametrize('weight', [None, WEIGHT])
def test_soft_cross_entropy_is_the_loop(weight):
    logits, targets = random(BATCH, CLASSES), distributions()
    expected = loop_cross_entropy(logits, targets, [1.0] * CLASSES if weight is None else weight.tolist())
    assert soft_cross_entropy(logits, targets, weight).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('weight', [None, WEIGHT])
def test_soft_cross_entropy_gradient_is_the_hand_formula(weight):
    logits, targets = random(BATCH, CLASSES).requires_grad_(), distributions()
    soft_cross_entropy(logits, targets, weight).backward()
    weighted = (targets * (1 if weight is None else weight)).numpy()  # w·p
    softmax = np.exp(logits.detach().numpy())
    softmax /= softmax.sum(1, keepdims=True)
    expected = (softmax * weighted.sum(1, keepdims=True) - weighted) / BATCH
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(z, targets, weight), logits)


def test_soft_cross_entropy_with_one_hot_labels_is_torchs():
    logits, labels = random(BATCH, CLASSES), torch.tensor([0, 3, 1, 1, 2])
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).double()
    assert soft_cross_entropy(logits, one_hot) == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


def test_weighting_the_mixed_label_is_mixing_the_weighted_one_hots():
    logits, lam = random(BATCH, CLASSES), 0.3
    i, j = (torch.eye(CLASSES, dtype=torch.float64)[labels] for labels in ([0, 3, 1, 1, 2], [3, 3, 0, 2, 1]))
    published = soft_cross_entropy(logits, lam * (WEIGHT * i) + (1 - lam) * (WEIGHT * j))
    assert soft_cross_entropy(logits, mixup(i, j, lam), WEIGHT).item() == pytest.approx(published.item(), rel=1e-12)


def test_soft_cross_entropy_of_half_precision_logits_is_computed_in_the_precision_of_the_targets():
    logits = random(BATCH, CLASSES).bfloat16()
    loss = soft_cross_entropy(logits, distributions())
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(loop_cross_entropy(logits.double(), distributions(), [1.0] * CLASSES), rel=1e-12)


def test_negative_cosine_is_the_loop():
    u, h = random(BATCH, WIDTH), random(BATCH, WIDTH, seed=1)
    assert negative_cosine(u, h).item() == pytest.approx(loop_negative_cosine(u, h), rel=1e-12)
    assert negative_cosine(u, 7 * u).item() == pytest.approx(-1)
    assert negative_cosine(u, -u).item() == pytest.approx(1)


def test_negative_cosine_gradient_is_the_hand_formula_and_stops_at_the_projection():
    u, h = random(BATCH, WIDTH).requires_grad_(), random(BATCH, WIDTH, seed=1).requires_grad_()
    negative_cosine(u, h).backward()
    unit_u, unit_h = (x.detach().numpy() / np.linalg.norm(x.detach().numpy(), axis=1, keepdims=True) for x in (u, h))
    cosine = (unit_u * unit_h).sum(1, keepdims=True)
    expected = -(unit_h - cosine * unit_u) / np.linalg.norm(u.detach().numpy(), axis=1, keepdims=True) / BATCH
    np.testing.assert_allclose(u.grad.numpy(), expected, rtol=1e-10)
    assert h.grad is None
    assert torch.autograd.gradcheck(lambda x: negative_cosine(x, h.detach()), u)


@pytest.mark.parametrize('loss', [soft_cross_entropy, negative_cosine])
def test_shapes_that_would_broadcast_are_errors(loss):
    with pytest.raises(ValueError, match=r'\(5, 4\).*\(1, 4\).*differ in shape'):
        loss(random(5, 4), random(1, 4))


@pytest.mark.parametrize('power', [0.0, 0.5, 1.0, 1.2])
def test_class_weights_are_equation_7(power):
    counts = [500, 120, 20, 5]
    inverse = [n ** -power for n in counts]
    expected = [4 * value / sum(inverse) for value in inverse]
    weights = class_weights(counts, power)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    assert weights.mean().item() == pytest.approx(1, rel=1e-6)
    assert weights.dtype == torch.float32


def test_power_zero_weighs_all_classes_alike():
    assert class_weights([900, 7, 1], 0).tolist() == [1, 1, 1]


@pytest.mark.parametrize('counts', [[3, 0], [], [[1, 2]], [-1, 2]])
def test_class_weights_need_an_image_in_every_class(counts):
    with pytest.raises(ValueError, match='one count >= 1 per class'):
        class_weights(counts, 1.0)


@pytest.mark.parametrize('t_max', [1, 2, 60, 200])
def test_alpha_falls_from_one_and_never_is_zero(t_max):
    alphas = [cumulative_alpha(t / t_max) for t in range(t_max)]
    assert alphas == pytest.approx([(t_max ** 2 - t ** 2) / t_max ** 2 for t in range(t_max)], rel=1e-12)
    assert alphas[0] == 1
    assert min(alphas) > 0
