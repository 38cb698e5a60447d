"""Each equation of the loss, and its gradient, against loops and hand formulas in float64."""
import math

import numpy as np
import pytest
import torch
from timm.loss import AsymmetricLossSingleLabel

from glmc.losses.classification import (
    ClassBalancedFocalLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    effective_number_weights,
    focal_loss,
    ldam_margins,
)
from glmc.losses.glmc import class_weights, cumulative_alpha, negative_cosine, soft_cross_entropy
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


COUNTS, LABELS = [500, 120, 20, 5], torch.tensor([0, 3, 1, 1, 2])


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def effective_numbers(beta: float) -> list[float]:
    """Weights by a geometric sum: the effective number is 1 + β + β² + … of n terms."""
    inverse = [1 / sum(beta ** k for k in range(n)) for n in COUNTS]
    return [4 * value / sum(inverse) for value in inverse]


def loop_focal(logits, weight, gamma) -> float:
    terms = []
    for z, y in zip(logits.tolist(), LABELS.tolist(), strict=True):
        p = softmax(z)[y]
        terms.append(-weight[y] * (1 - p) ** gamma * math.log(p))
    return sum(terms) / len(terms)


def loop_weighted_mean(logits, weight) -> float:
    """Cross-entropy as torch averages it: over the weights, not over the images."""
    pairs = [(weight[y], -math.log(softmax(z)[y])) for z, y in zip(logits.tolist(), LABELS.tolist(), strict=True)]
    return sum(w * loss for w, loss in pairs) / sum(w for w, _ in pairs)


@pytest.mark.parametrize('beta', [0.9, 0.999, 0.9999])
def test_effective_number_is_a_geometric_sum(beta):
    np.testing.assert_allclose(effective_number_weights(COUNTS, beta).numpy(), effective_numbers(beta), rtol=1e-5)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_focal_losses_are_the_loop(gamma):
    logits = random(BATCH, CLASSES)
    assert FocalLoss(COUNTS, gamma)(logits, LABELS).item() == pytest.approx(loop_focal(logits, [1] * 4, gamma), rel=1e-5)
    weighted = ClassBalancedFocalLoss(COUNTS, gamma, 0.999)(logits, LABELS).item()
    assert weighted == pytest.approx(loop_focal(logits, effective_numbers(0.999), gamma), rel=1e-5)
    timms = AsymmetricLossSingleLabel(gamma_pos=gamma, gamma_neg=0, eps=0.0)(logits, LABELS).item()
    assert focal_loss(logits, LABELS, gamma).item() == pytest.approx(timms, rel=1e-5)


def test_focal_gradient_of_a_sure_hit_is_finite():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0]), 0.5).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize('tau', [0.0, 0.5, 1.0, 2.0])
def test_logit_adjustment_is_a_softmax_weighted_by_powers_of_the_counts(tau):
    logits = random(BATCH, CLASSES)
    expected = 0.0
    for z, y in zip(logits.tolist(), LABELS.tolist(), strict=True):
        parts = [n ** tau * math.exp(value) for n, value in zip(COUNTS, z, strict=True)]
        expected -= math.log(parts[y] / sum(parts)) / BATCH
    assert LogitAdjustedLoss(COUNTS, tau)(logits, LABELS).item() == pytest.approx(expected, rel=1e-5)


def test_balanced_softmax_of_equal_counts_is_cross_entropy():
    logits = random(BATCH, CLASSES)
    expected = torch.nn.functional.cross_entropy(logits, LABELS).item()
    assert LogitAdjustedLoss([7] * 4)(logits, LABELS).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('epoch, deferred', [(0, False), (159, False), (160, True), (199, True)])
def test_reweighting_is_deferred_to_epoch_160_of_200(epoch, deferred):
    loss, logits = DeferredReweighting(COUNTS), random(BATCH, CLASSES)
    buffer = loss.class_weight
    loss.set_progress(epoch / 200)
    weight = effective_numbers(0.9999) if deferred else [1.0] * 4
    assert loss(logits, LABELS).item() == pytest.approx(loop_weighted_mean(logits, weight), rel=1e-5)
    assert loss.class_weight is buffer  # filled, so that a compiled step stays as it is
    loss.set_progress(0.0)
    assert loss.class_weight.tolist() == [1] * 4


@pytest.mark.parametrize('progress', [0.0, 0.9])
def test_ldam_is_the_loop(progress):
    cosines, margins = random(BATCH, CLASSES) / 10, [0.5 * (5 / n) ** 0.25 for n in COUNTS]
    np.testing.assert_allclose(ldam_margins(COUNTS).numpy(), margins, rtol=1e-6)
    shifted = [[30 * (c - margins[y] * (k == y)) for k, c in enumerate(row)]
               for row, y in zip(cosines.tolist(), LABELS.tolist(), strict=True)]
    weight = effective_numbers(0.9999) if progress else [1.0] * 4
    loss = LDAMLoss(COUNTS)
    loss.set_progress(progress)
    assert loss(30 * cosines, LABELS).item() == pytest.approx(loop_weighted_mean(torch.tensor(shifted), weight), rel=1e-4)
