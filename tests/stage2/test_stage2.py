"""Stage 2: features as the model gives them, classifiers against plain formulas, and the choice among them."""
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import run_command
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from glmc.data.profiles import Profile
from glmc.data.sources import TrainingData, load_digits_set
from glmc.errors import InputError
from glmc.evaluation.priors import resolve_prior
from glmc.models.backbone import create_backbone
from glmc.models.classifier import cap_norms
from glmc.stage2.classifiers import (
    CLASSIFIERS,
    CRT,
    LWS,
    BalancedProbe,
    BalancedSoftmax,
    HeadAverage,
    LabelOverSmoothing,
    Linear,
    LinearDiscriminant,
    LinearProbe,
    LogitAdjust,
    MaxNorm,
    NearestClassMean,
    NearestNeighbours,
    Stage1,
    TauNorm,
    softmax_bce,
    train_linear,
)
from glmc.stage2.features import Features
from glmc.stage2.finetune import run_stage2
from glmc.stage2.select import fit, measure, parse_classifiers, search, stratified_split

COUNTS = [60, 25, 10, 4]
CENTRES = torch.rand(4, 8, generator=torch.Generator().manual_seed(9)) * 3
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
DATA_CONFIG = dict(input_size=(3, 16, 16), mean=MEAN, std=STD, interpolation='bilinear', crop_pct=1.0)
AUGMENTATION = dict(augmentation='cifar', hflip=0.5)


def clusters(num_views: int = 2, seed: int = 0) -> Features:
    """Positive features around a centre for each class, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    noise = torch.randn(1 + num_views, len(labels), 8, generator=generator)
    return Features((CENTRES[labels] + noise).relu(), labels)


def stage1(prior: str | list[float] = 'train') -> Stage1:
    """A classifier that favours the head."""
    linear = Linear((CENTRES - CENTRES.mean(0)) * torch.tensor([[0.8], [0.6], [0.4], [0.2]]),
                    torch.tensor([2.0, 1.0, 0.0, -1.0]))
    return Stage1(linear, COUNTS, resolve_prior(prior, COUNTS), Linear(linear.weight.flip(0), linear.bias + 1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_backbone('resnet32_cifar', 10, channels=(4, 6, 8), depth=1)


# --- classifiers ---

def test_training_is_sgd_on_a_cosine():
    """Against momentum written out, one full batch an epoch and one view."""
    features, lr, decay, epochs = clusters(num_views=0), 0.1, 0.05, 5
    start = stage1().linear
    trained = Linear(*(tensor.clone().requires_grad_() for tensor in start))
    train_linear(trained, list(trained), features, F.cross_entropy, lr=lr, epochs=epochs, weight_decay=decay,
                 generator=torch.Generator().manual_seed(0), batch_size=len(features))
    values = [tensor.clone().double() for tensor in start]
    momenta = [torch.zeros_like(value) for value in values]
    x, one_hot = features.views[0].double(), torch.eye(4)[features.labels].double()
    for epoch in range(epochs):
        error = ((x @ values[0].T + values[1]).softmax(1) - one_hot) / len(x)
        rate = lr * (1 + np.cos(np.pi * epoch / epochs)) / 2
        for value, momentum, gradient in zip(values, momenta, (error.T @ x, error.sum(0)), strict=True):
            momentum.mul_(0.9).add_(gradient + decay * value)
            value -= rate * momentum
    for found, expected in zip(trained, values, strict=True):
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('project', ['step', 'epoch'])
def test_maxnorm_rows_are_within_the_radius_after_every_projection(project, monkeypatch):
    norms = stage1().linear.weight.norm(dim=1)
    radius = (norms.min() + 0.1 * (norms.max() - norms.min())).item()
    seen = []
    monkeypatch.setattr('glmc.stage2.classifiers.cap_norms', lambda w, r: seen.append(capped := cap_norms(w, r)) or capped)
    found = fit(MaxNorm(epochs=3, lr=0.5, project=project), stage1(), clusters(), seed=0)
    assert len(seen) == (3 if project == 'epoch' else 3 * 2)
    assert all((weight.norm(dim=1) <= radius * (1 + 1e-5)).all() for weight in [*seen, found.weight])
    assert any((weight.norm(dim=1) > radius * (1 - 1e-5)).any() for weight in seen)


def loop_bce(logits, labels, weights) -> tuple[float, list[list[float]]]:
    """Σ_b Σ_c of weighted binary cross-entropies over B·C, and its gradient by the chain rule."""
    size, loss, gradient = len(logits) * len(weights), 0.0, []
    for row, label in zip(logits, labels, strict=True):
        total = sum(math.exp(z) for z in row)
        p, by_p = [math.exp(z) / total for z in row], []
        for c, probability in enumerate(p):
            loss -= weights[label] / size * math.log(probability if c == label else 1 - probability)
            by_p.append(weights[label] / size * (-1 / probability if c == label else 1 / (1 - probability)))
        gradient.append([sum(by_p[k] * p[k] * ((k == c) - p[c]) for k in range(len(p))) for c in range(len(p))])
    return loss, gradient


def test_bce_of_the_softmax_is_the_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64).mul(3).requires_grad_()
    labels, weights = torch.tensor([0, 1, 2, 3, 1, 0]), [0.1, 0.4, 1.2, 2.3]
    found = softmax_bce(logits, labels, torch.tensor(weights, dtype=torch.float64))
    found.backward()
    loss, gradient = loop_bce(logits.tolist(), labels.tolist(), weights)
    assert found.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_bce_shrinks_the_rows_far_more_than_cross_entropy():
    """Its gradient is about C times smaller, while the weight decay is the same."""
    size, width, counts = 60, 16, [max(round(40 * 0.93 ** c), 1) for c in range(60)]
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(size, width, generator=generator)
    labels = torch.repeat_interleave(torch.arange(size), torch.tensor(counts))
    features = Features((centres[labels] + torch.randn(3, len(labels), width, generator=generator)).relu(), labels)
    start = Stage1(Linear(centres / 4, torch.zeros(size)), counts, resolve_prior('train', counts))
    ce, bce = (fit(MaxNorm(loss=loss, epochs=60), start, features, 0).weight.norm(dim=1) for loss in ('ce', 'bce'))
    assert ce.min() > 3 * bce.max() and ce.median() > 6 * bce.median()


def test_balanced_softmax_of_equal_counts_is_cross_entropy():
    features, classifier = clusters(), BalancedSoftmax(epochs=2)
    even = features.subset(torch.cat([torch.where(features.labels == c)[0][:4] for c in range(4)]))
    found, start = fit(classifier, stage1(), even, seed=0), stage1().linear
    plain = Linear(*(tensor.clone().requires_grad_() for tensor in start))
    train_linear(plain, list(plain), even, F.cross_entropy, lr=classifier.lr, epochs=2, weight_decay=5e-4,
                 generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.weight, plain.weight.detach())
    assert not torch.allclose(fit(classifier, stage1(), features, seed=0).bias, found.bias)


def test_logit_adjustment_divides_probabilities_by_the_prior():
    features, tau = clusters().views[0], 0.7
    adjusted, start = fit(LogitAdjust(tau=tau), stage1(), clusters(), 0), stage1().linear
    expected = start(features).softmax(1) / (torch.tensor(COUNTS) / sum(COUNTS)) ** tau
    torch.testing.assert_close(adjusted(features).softmax(1), expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize('prior, tau', [('train', 1.0), ('uniform', 0.0)])
def test_logit_adjustment_removes_the_prior_of_stage_1(prior, tau):
    found, expected = fit(LogitAdjust(), stage1(prior), clusters(), 0), fit(LogitAdjust(tau), stage1(), clusters(), 0)
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)


@pytest.mark.parametrize('prior, tau, expected', [
    ('train', None, 'uniform'), ('train', 1.0, [1, 1, 1, 1]), ('train', 0.0, COUNTS),
    ('uniform', 0.5, [n ** -0.5 for n in COUNTS]),
    ('train', 1.4, [n ** -0.4 for n in COUNTS])])
def test_logit_adjustment_states_the_prior_that_it_leaves(prior, tau, expected):
    found = LogitAdjust(tau).class_prior(stage1(prior))
    assert found == (expected if tau is None else pytest.approx(np.array(expected) / sum(expected), rel=1e-4))


def test_logit_adjustment_by_default_handles_a_prior_between_the_two():
    """A stage 1 trained with half the logit adjustment has such a prior; an explicit τ refers to the training prior."""
    half = [n ** 0.5 for n in COUNTS]
    found, expected = fit(LogitAdjust(), stage1(half), clusters(), 0), fit(LogitAdjust(0.5), stage1(), clusters(), 0)
    torch.testing.assert_close(found.bias - found.bias.mean(), expected.bias - expected.bias.mean())
    assert torch.equal(fit(LogitAdjust(0.5), stage1(half), clusters(), 0).bias, expected.bias)


def test_the_prior_of_an_export_reaches_the_classifiers(model, tmp_path):
    images = load_digits_set('train')
    data = TrainingData(images, images.subset(np.arange(20)), None, images.class_names, Profile(images.counts().tolist()))
    prior = (np.arange(1, 11) / 55).tolist()
    _, result = run_stage2(
        tmp_path, 'logit_adjust', model=model, data=data, accelerator=Accelerator(), augmentation=AUGMENTATION, workers=0,
        metrics=dict(method='ce', train_images=len(images), num_classes=10, evaluated_on='validation',
                     seed=0, epochs=1, parameters=1, precision='no', processes=1, device='cpu'), feature_views=0,
        export=dict(data_config=DATA_CONFIG, class_names=images.class_names, source=dict(prior=prior)))
    torch.testing.assert_close(result.linear.bias, model.fc.bias.detach() - torch.tensor(prior).log())


def test_crt_starts_anew_and_sees_the_classes_alike(monkeypatch):
    drawn, features = [], clusters()
    monkeypatch.setattr('glmc.stage2.classifiers.F.cross_entropy', lambda z, y: drawn.append(y) or z.square().mean())
    fit(CRT(epochs=40), stage1(), features, 0)
    shares = torch.bincount(torch.cat(drawn)).double() / 40 / len(features)
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    monkeypatch.undo()
    one, two = (fit(CRT(), replace(stage1(), linear=start), features, 0) for start in (
        stage1().linear, Linear(*(5 * tensor for tensor in stage1().linear))))
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize('classifier', [LWS(), TauNorm(), TauNorm(tau=1.0)])
def test_scaling_changes_norms_only(classifier):
    found, start = fit(classifier, stage1(), clusters(), 0), stage1().linear
    torch.testing.assert_close(torch.cosine_similarity(found.weight, start.weight), torch.ones(4))
    ratio = found.weight.norm(dim=1) / start.weight.norm(dim=1)
    torch.testing.assert_close(found.bias, ratio * start.bias)
    assert ratio.max() > 1.01 * ratio.min()


def test_tau_norm_is_its_formula():
    start = stage1().linear
    same = fit(TauNorm(tau=0.0), stage1(), clusters(), 0)
    assert all(torch.equal(a, b) for a, b in zip(same, start, strict=True))
    for tau in (0.3, 1.0):
        expected = torch.stack([row / row.norm() ** tau for row in start.weight])
        found = fit(TauNorm(tau=tau), stage1(), clusters(), 0).weight
        torch.testing.assert_close(found / expected, (found / expected)[0, 0].expand(4, 8))  # but for a factor of all
    assert fit(TauNorm(tau=1.0), stage1(), clusters(), 0).weight.norm(dim=1).std() < 1e-5


def test_label_over_smoothing_pulls_towards_nearly_uniform_probabilities():
    features = clusters(num_views=0)
    found = fit(LabelOverSmoothing(lr=0.05, epochs=300), stage1(), features, 0)(features.views[0]).softmax(1)
    assert found.gather(1, features.labels[:, None]).mean().item() == pytest.approx(0.02 + 0.98 / 4, abs=0.01)


@pytest.mark.filterwarnings('ignore:invalid value encountered')  # scikit-learn's, of one image a class
def test_nearest_class_mean_is_scikit_learns_on_normalised_features():
    """Class means as scikit-learn has them; then, as the exported layer knows no norms, nearest of the normalised means."""
    features, test = clusters(), clusters(seed=5).views[0]
    unit = F.normalize(features.views[0]).numpy()
    means = NearestCentroid().fit(unit, features.labels.numpy()).centroids_
    nearest = NearestCentroid().fit(means / np.linalg.norm(means, axis=1, keepdims=True), np.arange(4))
    found = fit(NearestClassMean(), stage1(), features, 0)
    assert (found(test).argmax(1).numpy() == nearest.predict(F.normalize(test).numpy())).all()
    raw = NearestCentroid().fit(unit, features.labels.numpy()).predict(F.normalize(test).numpy())
    assert (found(test).argmax(1).numpy() == raw).mean() > 0.9


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_classifier_repeats_and_changes_nothing(name):
    start, features = stage1(), clusters()
    before = [tensor.clone() for tensor in (*start.linear, features.views)]
    one, two = (fit(CLASSIFIERS[name](), start, features, seed=3) for _ in range(2))
    assert torch.equal(one(CENTRES), two(CENTRES)) and one(CENTRES).shape == (4, 4) and not one(CENTRES).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (*start.linear, features.views), strict=True))
    assert one(CENTRES).isfinite().all()


@pytest.mark.parametrize('shrinkage', [0.0, 0.3])
def test_discriminant_is_scikit_learns(shrinkage):
    features, test = clusters(), clusters(seed=5).views[0]
    x, y = features.views[0].double().numpy(), features.labels.numpy()

    class Shrunk:  # scikit-learn's own shrinkage scales each feature first
        def fit(self, x):
            cov = np.cov(x.T, bias=True)
            self.covariance_ = (1 - shrinkage) * cov + shrinkage * np.trace(cov) / len(cov) * np.eye(len(cov))
            return self
    prior = np.bincount(y) / len(y)
    oracle = LinearDiscriminantAnalysis('lsqr', priors=prior, covariance_estimator=Shrunk()).fit(x, y)
    expected = oracle.decision_function(test.numpy()) - np.log(prior)
    found = fit(LinearDiscriminant(shrinkage), stage1(), features, 0)(test).double().numpy()
    for logits in (found, expected):
        logits -= logits.mean(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_discriminant_of_a_singular_covariance_is_finite():
    features = clusters(num_views=0)
    constant = Features(F.pad(features.views, (0, 3), value=1.0), features.labels)
    start = replace(stage1(), linear=Linear(torch.zeros(4, 11), torch.zeros(4)))
    for shrinkage in (0.0, 0.1):
        assert fit(LinearDiscriminant(shrinkage), start, constant, 0)(constant.views[0]).isfinite().all()


@pytest.mark.parametrize('chunk', [7, 4096])
def test_neighbours_are_scikit_learns(chunk, monkeypatch):
    monkeypatch.setattr('glmc.stage2.classifiers.READ', chunk)
    features, test = clusters(), clusters(seed=5).views[0]
    oracle = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.07), metric='cosine')
    expected = oracle.fit(features.views[0].numpy(), features.labels.numpy()).predict_proba(test.numpy())
    found = fit(NearestNeighbours(), stage1(), features, 0)(test).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_probes_have_the_prior_that_they_claim():
    """Balanced Softmax is cross-entropy on logits + log prior, and its path picks from strong to weak decay."""
    features, held = clusters(), clusters(seed=4)
    start = replace(stage1(), linear=Linear(torch.zeros(4, 8), torch.zeros(4)))
    plain, balanced = (fit(rule(), start, features, 0) for rule in (LinearProbe, BalancedProbe))
    counts = [torch.bincount(probe(held.views[0]).argmax(1), minlength=4) for probe in (plain, balanced)]
    assert counts[1][3] > counts[0][3] and (LinearProbe.prior, BalancedProbe.prior) == ('train', 'uniform')
    chosen, score = search(LinearProbe(), start, features, held, seed=0)
    candidates = [LinearProbe(), *(LinearProbe(value) for value in LinearProbe.grid['weight_decay'])]
    scores = [measure(linear, held, COUNTS)[0]['class_mean']
              for linear in LinearProbe.path(list(dict.fromkeys(candidates)), start, features, 0)]
    assert len(scores) == 4 and score == max(scores)
    assert chosen == list(dict.fromkeys(candidates))[int(np.argmax(scores))]


@pytest.mark.parametrize('weight, tau', [(1.0, 0.0), (0.0, 1.0), (0.3, 0.5)])
def test_averaged_heads_average_logits(weight, tau):
    start, test = stage1(), clusters(seed=2).views[0]
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    expected = weight * start.linear(test) + (1 - weight) * (start.conventional(test) - tau * prior.log())
    torch.testing.assert_close(fit(HeadAverage(weight, tau), start, clusters(), 0)(test), expected)


# --- choosing ---

@pytest.mark.parametrize('holdout, expected', [(0.2, [12, 5, 2, 1, 0]), (0.01, [1, 1, 1, 1, 0]), (3, [3, 3, 3, 3, 0])])
def test_split_holds_out_some_images_of_every_class(holdout, expected):
    labels = np.repeat(np.arange(5), [*COUNTS[:3], 5, 1])
    train, held = stratified_split(labels, holdout, 'abcde', seed=0)
    assert np.bincount(labels[held], minlength=5).tolist() == expected
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert (stratified_split(labels, holdout, 'abcde', seed=0)[1] == held).all()
    assert holdout < 1 or (stratified_split(labels, holdout, 'abcde', seed=1)[1] != held).any()


@pytest.mark.parametrize('holdout, counts, message', [
    (4, [9, 4], "class 'b' has 4 training images, setting 4 aside leaves none"),
    (0.5, [1, 1], 'every class has a single image')])
def test_a_split_that_empties_a_class_is_an_error(holdout, counts, message):
    with pytest.raises(InputError, match=f'--stage2-holdout {holdout:g}: .*{message}'):
        stratified_split(np.repeat(np.arange(2), counts), holdout, 'ab', seed=0)


def test_search_takes_the_best_of_the_grid_and_prefers_the_default():
    train, held = clusters(), clusters(seed=4)
    chosen, score = search(TauNorm(), stage1(), train, held, seed=0)
    scores = {tau: measure(fit(TauNorm(tau), stage1(), train, 0), held, COUNTS)[0]['class_mean']
              for tau in TauNorm.grid['tau']}
    assert score == max(scores.values()) == scores[chosen.tau]
    assert scores[0.7] < score or chosen.tau == 0.7
    assert search(NearestClassMean(), stage1(), train, held, seed=0)[0] == NearestClassMean()
    worst = TauNorm(min(scores, key=scores.get))
    assert search(worst, stage1(), train, held, seed=0)[0] == chosen != worst
    assert search(worst, stage1(), train, held, seed=0, fixed=['tau']) == (worst, scores[worst.tau])


def test_classifiers_by_name():
    assert list(parse_classifiers('all', {})) == list(CLASSIFIERS)
    assert list(parse_classifiers('all', {}, two_heads=False)) == [name for name in CLASSIFIERS if name != 'average']
    found = parse_classifiers('los,maxnorm', {'maxnorm.project': 'epoch', 'los.lr': 1})
    assert found == {'los': LabelOverSmoothing(lr=1.0), 'maxnorm': MaxNorm(project='epoch')}


@pytest.mark.parametrize('names, settings, message', [
    ('maxnrm', {}, "found 'maxnrm'; did you mean maxnorm"), ('los,', {}, "found ''"),
    ('los', {'crt.lr': 1.0}, 'crt.lr: expected NAME.FIELD, NAME of los'), ('los', {'lr': 1.0}, 'expected NAME.FIELD'),
    ('los', {'los.epoch': 3}, 'los.epoch: expected one of lr, epochs.*; did you mean epochs'),
    ('los', {'los.epochs': 1.5}, 'los.epochs: expected int, found 1.5'),
    ('los', {'los.lr': 'x'}, "expected float, found 'x'"),
    ('maxnorm', {'maxnorm.project': 'never'}, "expected step or epoch, found 'never'"),
    ('maxnorm', {'maxnorm.loss': 'mse'}, "maxnorm.loss: expected ce or bce, found 'mse'")])
def test_names_and_settings_that_are_wrong_are_one_line(names, settings, message):
    with pytest.raises(InputError, match=message):
        parse_classifiers(names, settings)


def test_help_names_every_classifier():
    from glmc.config import finetune_parser
    text = finetune_parser()._option_string_actions['--stage2'].help
    assert all(name in text for name in CLASSIFIERS)


MEMORY = '''
import resource, torch
from glmc.stage2.classifiers import LinearDiscriminant, NearestNeighbours, Stage1
from glmc.stage2.features import Features
from glmc.stage2.probe import Linear
from glmc.stage2.select import fit, measure

class Generated(Features):
    """Rows that are computed when they are read."""
    num_views, width = 1, 1280

    def rows(self, indices, views=0):
        return self.views[0, indices % 1009] + self.views[0, self.labels[indices]]

labels = torch.arange(400_000) % 100
features, query = (Generated(torch.rand(1, 1009, 1280), labels[:n]) for n in (400_000, 200))
stage1 = Stage1(Linear(torch.zeros(100, 1280), torch.zeros(100)), [4000] * 100, [0.01] * 100)
measure(fit(LinearDiscriminant(), stage1, features, 0), features, stage1.counts)
measure(fit(NearestNeighbours(), stage1, features, 0), query, stage1.counts)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''


@pytest.mark.slow
def test_large_features_are_never_in_memory():
    """400,000 x 1,280 float32 are 2 GB; reading them by batches takes less, with torch itself."""
    outcome = run_command(sys.executable, '-c', MEMORY)
    assert outcome.code == 0, outcome.err
    assert int(outcome.out) * 1024 < 2e9
