"""Linear probes: the optimum of the loss they state, whatever the scale of the features."""
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from glmc.losses.classification import LogitAdjustedLoss
from glmc.stage2.features import Features
from glmc.stage2.probe import NORM, Linear, Standardizer, linear_probe

COUNTS = (300, 60, 12)


def clusters(width: int = 20, scale: float = 1.0, offset: float = 0.0) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    centres = torch.randn(3, width, generator=generator)
    values = centres[labels] + 3 * torch.randn(len(labels), width, generator=generator)
    return Features((scale * values + offset)[None], labels)


def probe(features: Features, adjustment=None, **options) -> Linear:
    return linear_probe(features, 3, adjustment, generator=torch.Generator().manual_seed(0), **options)


def test_standardised_features_have_no_mean_and_equal_deviations():
    features = clusters(scale=100, offset=50)
    features.views[..., 3] = 7.0  # constant
    values = Standardizer.of(features)(features.views[0])
    torch.testing.assert_close(values.mean(0), torch.zeros(20), atol=1e-3, rtol=0)
    deviation = values.std(0, correction=0)
    assert deviation[3] == 0
    torch.testing.assert_close(deviation[:3], torch.full((3,), NORM / 20 ** 0.5), rtol=1e-3, atol=0)


def test_folding_is_exact_and_undone():
    features, generator = clusters(scale=3, offset=-2), torch.Generator().manual_seed(1)
    linear = Linear(torch.randn(3, 20, generator=generator), torch.randn(3, generator=generator))
    standardize = Standardizer.of(features)
    rows = features.views[0]
    torch.testing.assert_close(standardize.fold(linear)(rows), linear(standardize(rows)), rtol=1e-4, atol=1e-4)
    for again, first in zip(standardize.unfold(standardize.fold(linear)), linear, strict=True):
        torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('scale', [0.01, 1.0, 100.0])
def test_the_probe_is_the_penalised_maximum_of_the_likelihood(scale):
    features, weight_decay = clusters(scale=scale, offset=scale), 1e-2
    found = probe(features, weight_decay=weight_decay, lr=0.1, epochs=800)
    values = Standardizer.of(features)(features.views[0]).numpy()
    expected = LogisticRegression(C=1 / (weight_decay * len(features)), max_iter=5000, tol=1e-8).fit(values, features.labels)
    logits = torch.from_numpy(expected.decision_function(values)).float()
    difference = F.softmax(found(features.views[0]), 1) - F.softmax(logits, 1)
    assert difference.abs().max() < 0.03


def test_the_log_prior_removes_the_prior():
    features = clusters()
    log_prior = LogitAdjustedLoss(COUNTS).adjustment
    plain, balanced = (probe(features, each, weight_decay=1e-2)(features.views[0]) for each in (None, log_prior))
    rare = features.labels == 2
    assert (balanced[rare].argmax(1) == 2).float().mean() > (plain[rare].argmax(1) == 2).float().mean()
    assert balanced.softmax(1)[:, 2].mean() > 1.5 * plain.softmax(1)[:, 2].mean()


def test_a_start_is_kept_by_a_probe_that_does_not_learn():
    features = clusters(scale=5, offset=1)
    start = probe(features, epochs=3)
    again = probe(features, epochs=1, lr=1e-9, start=start)
    torch.testing.assert_close(again.weight, start.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.bias, start.bias, rtol=1e-3, atol=1e-3)
