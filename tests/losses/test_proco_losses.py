"""ProCo's logits and gradients against scipy's Bessel functions, and its class statistics against numpy."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import ive

from glmc.losses.proco import concentrations, log_bessel, proco_logits
from glmc.models.statistics import ClassDirections, merge_means


def log_i(order: float, x: np.ndarray) -> np.ndarray:
    return np.log(ive(order, x)) + x - order * np.log(x)


@pytest.mark.parametrize('order', [-0.5, 0.0, 0.5, 2.5, 15.0, 31.0, 63.0, 200.0])
def test_log_bessel_and_its_gradient_are_those_of_scipy(order):
    x = np.array([0.3, 1, 5, 20, 100, 700, 3e4, 1e5])
    x = x[ive(order, x) > 1e-250]
    leaf = torch.from_numpy(x).requires_grad_()
    value = log_bessel(order, leaf)
    value.sum().backward()
    np.testing.assert_allclose(value.detach(), log_i(order, x), rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(leaf.grad, ive(order + 1, x) / ive(order, x), rtol=1e-7)


def test_log_bessel_at_zero_is_the_first_term_of_its_series():
    """I_ν(x) → (x/2)^ν / Γ(ν + 1)."""
    for order in (0.0, 2.5, 63.0):
        expected = -order * np.log(2) - torch.lgamma(torch.tensor(order + 1, dtype=torch.float64)).item()
        assert log_bessel(order, torch.zeros(1).double()).item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize('width', [3, 8, 128])
def test_logits_and_gradients_are_the_loop(width):
    rng, temperature = np.random.default_rng(0), 0.1
    z = F.normalize(torch.from_numpy(rng.normal(size=(5, width))), dim=1)
    means = torch.from_numpy(rng.normal(size=(4, width)))
    means = F.normalize(means, dim=1) * torch.tensor([0.3, 0.6, 0.9, 0.99]).double()[:, None]
    upstream = rng.normal(size=(5, 4))
    expected, gradient = np.zeros((5, 4)), np.zeros((5, width))
    for i, c in np.ndindex(5, 4):
        length = np.linalg.norm(means[c])
        kappa = width * length / (1 - length ** 2)
        vector = kappa * means[c].numpy() / length + z[i].numpy() / temperature
        new, order = np.linalg.norm(vector), width / 2 - 1
        expected[i, c] = log_i(order, new) - log_i(order, kappa)
        gradient[i] += upstream[i, c] * ive(order + 1, new) / ive(order, new) * vector / new / temperature
    leaf = z.clone().requires_grad_()
    logits = proco_logits(leaf, means, temperature)
    logits.backward(torch.from_numpy(upstream))
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-8, atol=1e-7)
    np.testing.assert_allclose(leaf.grad, gradient, rtol=1e-6, atol=1e-8)


def test_the_logit_is_the_expectation_over_features_of_the_class():
    """On the circle, by a sum over angles."""
    angles = torch.linspace(0, 2 * np.pi, 20_001).double()[:-1]
    circle, kappa, temperature = torch.stack([angles.cos(), angles.sin()], 1), 2.0, 0.5
    density = (kappa * angles.cos()).exp()
    density = density / density.sum()
    length = (-1 + np.sqrt(1 + kappa ** 2)) / kappa  # κ = 2R / (1 - R²)
    z = torch.tensor([[0.6, 0.8]]).double()
    expected = ((z @ circle.T / temperature).exp() @ density).log()
    found = proco_logits(z, torch.tensor([[length, 0.0]]).double(), temperature)
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-8)


def test_concentrations_are_bounded():
    means = torch.tensor([[0.5, 0], [1.0, 0], [1.0 + 1e-12, 0], [0, 0]], dtype=torch.float64)
    assert concentrations(means).tolist() == pytest.approx([2 * 0.5 / 0.75, 1e5, 1e5, 0])


def test_merged_means_are_those_of_all_features():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 4)), rng.integers(3, size=30)
    classes = ClassDirections(4, 4)
    means, numbers = classes.means, classes.numbers
    for batch in np.split(np.arange(30), [7, 8, 20]):
        means, numbers = merge_means(means, numbers, torch.from_numpy(features[batch]), torch.from_numpy(labels[batch]))
    for c in range(3):
        np.testing.assert_allclose(means[c], features[labels == c].mean(0), rtol=1e-4, atol=1e-6)
    assert torch.equal(means[3], classes.start[3]) and numbers.sum() == 30
    assert concentrations(classes.start).tolist() == pytest.approx([4 * 90 / 19] * 4, rel=1e-5)  # the authors' start


def test_an_epoch_remembers_the_last_one():
    classes, yes = ClassDirections(2, 3), torch.tensor(True)
    for epoch, value in enumerate((1.0, 2.0, 6.0)):
        classes.begin_epoch(epoch / 10)
        classes.begin_epoch(epoch / 10)  # a resumed epoch
        classes.follow(torch.full((2, 3), value), torch.tensor([0, -1]), yes)
        classes.follow(torch.full((1, 3), torch.nan), torch.tensor([1]), torch.tensor(False))
    assert classes.means[0].tolist() == [4.0] * 3 and classes.next_means[0].tolist() == [6.0] * 3
    assert torch.equal(classes.means[1], classes.start[1])
