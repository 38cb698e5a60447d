"""MixUp, CutMix pixel by pixel, the box, and the mixer on a batch, against loops."""
import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_distribution
from scipy.stats import chisquare, kstest
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam

from glmc.mixing import (
    IDENTITY_MIXTURE,
    BatchCutmix,
    BatchMixup,
    CMOMixer,
    GLMCMixer,
    HalvesMixer,
    Mixture,
    PairMixer,
    ResampledOnly,
    cutmix,
    mixup,
    partners_within,
    random_box,
    sample_mixture,
)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def loop_mixup(a: np.ndarray, b: np.ndarray, lam: float) -> np.ndarray:
    mixed = np.empty_like(a)
    for place in np.ndindex(a.shape):
        mixed[place] = lam * a[place] + (1 - lam) * b[place]
    return mixed


def loop_cutmix(a: np.ndarray, b: np.ndarray, box) -> np.ndarray:
    y0, y1, x0, x1 = box
    mixed = a.copy()
    for place in np.ndindex(a.shape):
        *_, y, x = place
        if y0 <= y < y1 and x0 <= x < x1:
            mixed[place] = b[place]
    return mixed


@pytest.mark.parametrize('lam', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (6, 7)])
def test_mixup_is_the_loop(lam, shape):
    a, b = images(*shape), images(*shape, seed=1)
    expected = loop_mixup(a.numpy(), b.numpy(), lam)
    np.testing.assert_allclose(mixup(a, b, lam).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(mixup(a, b, torch.tensor(lam, dtype=torch.float64)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize('box', [(1, 3, 2, 6), (0, 5, 0, 7), (0, 2, 5, 7), (3, 3, 0, 7), (0, 1, 6, 7)])
def test_cutmix_is_the_loop(box):
    a, b = images(2, 3, 5, 7), images(2, 3, 5, 7, seed=1)
    expected = loop_cutmix(a.numpy(), b.numpy(), box)
    assert (cutmix(a, b, box).numpy() == expected).all()
    assert (cutmix(a, b, torch.tensor(box)).numpy() == expected).all()


def test_mixing_returns_new_tensors():
    a, b = images(2, 3, 5, 7), images(2, 3, 5, 7, seed=1)
    before = a.clone(), b.clone()
    for mixed in (mixup(a, b, 1.0), cutmix(a, b, (0, 0, 0, 0))):
        mixed.zero_()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize('mix, weight', [(mixup, 0.5), (cutmix, (0, 1, 0, 1))])
def test_shapes_that_would_broadcast_are_errors(mix, weight):
    with pytest.raises(ValueError, match=r'\(2, 3, 5, 7\) and \(1, 3, 5, 7\)'):
        mix(images(2, 3, 5, 7), images(1, 3, 5, 7), weight)


@pytest.mark.parametrize('lam', [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize('height, width', [(8, 8), (9, 32), (31, 7)])
def test_box_has_its_sides_around_its_centre_and_is_clipped(lam, height, width):
    sides = int(height * (1 - lam) ** 0.5), int(width * (1 - lam) ** 0.5)
    rng, replay = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(200):
        y0, y1, x0, x1 = random_box(height, width, lam, rng)
        centres = int(replay.integers(height)), int(replay.integers(width))
        for low, high, size, side, centre in zip((y0, x0), (y1, x1), (height, width), sides, centres, strict=True):
            covered = [p for p in range(size) if centre - side // 2 <= p < centre - side // 2 + side]
            assert list(range(low, high)) == covered
            assert 0 <= low <= high <= size


def test_box_is_uniform_over_its_places():
    # sides of 2 in 8x4 pixels around a uniform centre: rows 0-1 clipped to 1, then 2 each
    rows = [(0, 1), *((y, y + 2) for y in range(7))]
    columns = [(0, 2), (1, 3)]
    rng = np.random.default_rng(0)
    boxes = [random_box(8, 8, 1 - 1 / 16, rng) for _ in range(8000)]
    for side in (slice(0, 2), slice(2, 4)):
        found = [box[side] for box in boxes]
        assert set(found) == set(rows)
        assert chisquare([found.count(row) for row in rows]).pvalue > 0.001
    wide = [random_box(8, 4, 0.75, rng)[2:] for _ in range(4000)]  # 4x2 in 8x4: first columns -1 … 2, the first clipped
    assert chisquare([wide.count(place) for place in [(0, 1), *columns, (2, 4)]]).pvalue > 0.001


@pytest.mark.parametrize('beta', [0.5, 1.0, 2.0])
def test_lambda_follows_its_beta_distribution(beta):
    rng = np.random.default_rng(0)
    lams = [sample_mixture((8, 8), beta, 'nominal', rng).lam.item() for _ in range(2000)]
    assert kstest(lams, beta_distribution(beta, beta).cdf).pvalue > 0.001


def test_label_of_the_local_view_is_nominal_or_by_area():
    corrected = 0
    for seed in range(50):
        nominal, area = (sample_mixture((8, 6), 1.0, name, np.random.default_rng(seed)) for name in ('nominal', 'area'))
        y0, y1, x0, x1 = area.box.tolist()
        assert nominal.local_lam == nominal.lam == area.lam
        assert area.local_lam.item() == pytest.approx(1 - (y1 - y0) * (x1 - x0) / 48)
        corrected += area.local_lam > nominal.local_lam + 0.05
    assert corrected > 10  # clipping leaves more of the first image


def test_the_nominal_label_is_a_fifth_off_the_picture():
    """The statement of docs/methods.md at β = 0.2, on 32x32 pixels."""
    rng = np.random.default_rng(0)
    drawn = [sample_mixture((32, 32), 0.2, 'area', rng) for _ in range(4000)]
    nominal, pixels = (np.array([getattr(each, name).item() for each in drawn]) for name in ('lam', 'local_lam'))
    assert np.abs(nominal - pixels).mean() == pytest.approx(0.21, abs=0.01)
    assert (nominal < 0.1).mean() == pytest.approx(1 / 3, abs=0.02)
    assert pixels[nominal < 0.1].mean() == pytest.approx(0.46, abs=0.02)


@pytest.mark.parametrize('power', [0.0, 0.2, 1.0])
def test_partners_within_a_batch_are_the_loop(power):
    counts, labels = [40, 15, 5], [0, 0, 2, 1, 0, 2, 0]
    weights = [counts[label] ** -power for label in labels]
    uniform = np.random.default_rng(0).random(500)
    expected = []
    for number in uniform:
        index, reached = 0, weights[0]
        while reached <= number * sum(weights):
            index += 1
            reached += weights[index]
        expected.append(index)
    class_weight = torch.tensor(counts, dtype=torch.float64) ** -power
    assert partners_within(torch.tensor(labels), class_weight, torch.from_numpy(uniform)).tolist() == expected


def test_partners_share_the_unit_interval_in_halves_closed_below():
    uniform = torch.tensor([0.0, 0.4999, 0.5, 0.9999])
    assert partners_within(torch.tensor([0, 0]), torch.ones(1), uniform).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('power', [0.0, 0.2, 1.0])
def test_partners_within_a_batch_follow_their_distribution(power):
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 1, 0])
    mixer = GLMCMixer([100, 20, 5], partner='batch', resample_power=power)
    rng = np.random.default_rng(0)
    partners = [j for _ in range(500) for j in partners_within(
        labels, mixer.partner_weight, mixer.sample_params(8, (4, 4), rng).uniform).tolist()]
    weights = np.array([[100, 20, 5][label] ** -power for label in labels.tolist()])
    assert chisquare(np.bincount(partners, minlength=8), weights / weights.sum() * len(partners)).pvalue > 0.001


def loop_targets(i_labels, j_labels, lam: float, num_classes: int) -> np.ndarray:
    targets = np.zeros((len(i_labels), num_classes))
    for row, (i, j) in enumerate(zip(i_labels, j_labels, strict=True)):
        targets[row, i] += lam
        targets[row, j] += 1 - lam
    return targets


MIXTURE = Mixture(torch.tensor(0.25).double(), torch.tensor([1, 4, 0, 3]), torch.tensor(0.75).double())


def check_mixed(mixed, views: np.ndarray, partner_views: np.ndarray, labels, partner_labels) -> None:
    """The mixer's output against loops; global views stand first, local views second."""
    (global_view, local_view), (global_target, local_target) = mixed
    expected_global = loop_mixup(views[:, 0], partner_views[:, 0], 0.25)
    expected_local = loop_cutmix(views[:, 1], partner_views[:, 1], (1, 4, 0, 3))
    np.testing.assert_allclose(global_view.numpy(), expected_global, rtol=1e-12)
    assert (local_view.numpy() == expected_local).all()
    np.testing.assert_allclose(global_target.numpy(), loop_targets(labels, partner_labels, 0.25, 4), rtol=1e-12)
    np.testing.assert_allclose(local_target.numpy(), loop_targets(labels, partner_labels, 0.75, 4), rtol=1e-12)


def test_mixer_mixes_pairs_of_the_sampler():
    views, labels = images(3, 2, 2, 2, 6, 5), torch.tensor([[0, 3], [2, 2], [1, 0]])
    mixed = GLMCMixer([9, 9, 9, 9])(views, labels, MIXTURE)
    check_mixed(mixed, views[:, 0].numpy(), views[:, 1].numpy(), [0, 2, 1], [3, 2, 0])


def test_mixer_finds_partners_in_the_batch():
    views, labels = images(3, 1, 2, 2, 6, 5), torch.tensor([[0], [2], [1]])
    mixture = MIXTURE._replace(uniform=torch.tensor([0.9, 0.1, 0.5]).double())  # q = 0: thirds
    mixed = GLMCMixer([9, 9, 9, 9], partner='batch')(views, labels, mixture)
    check_mixed(mixed, views[:, 0].numpy(), views[[2, 0, 1], 0].numpy(), [0, 2, 1], [1, 0, 2])


@pytest.mark.parametrize('partner', ['sampler', 'batch'])
@pytest.mark.parametrize('size', [1, 4, 5])
def test_halves_are_the_global_and_the_local_mixture(size, partner):
    """Those of GLMC on the same images, where both views are alike; of an odd batch the larger part is local."""
    places = 2 if partner == 'sampler' else 1
    views, labels = images(size, places, 1, 2, 6, 5), torch.arange(size * places).view(size, places) % 4
    mixture = MIXTURE._replace(uniform=torch.linspace(0.9, 0.1, size).double())
    mixed, target = HalvesMixer([9, 9, 9, 9], partner=partner)(views, labels, mixture)
    expected, targets = GLMCMixer([9, 9, 9, 9], partner=partner)(views.expand(-1, -1, 2, -1, -1, -1), labels, mixture)
    half = size // 2
    assert torch.equal(mixed, torch.cat([expected[0][:half], expected[1][half:]]))
    assert torch.equal(target, torch.cat([targets[0][:half], targets[1][half:]]))


@pytest.mark.parametrize('partner', ['sampler', 'batch'])
@pytest.mark.parametrize('cutmix_lambda', ['nominal', 'area'])
def test_mixer_draws_what_it_uses(partner, cutmix_lambda):
    mixer = GLMCMixer([9, 5, 2], 0.5, cutmix_lambda, partner)
    mixture, again = (mixer.sample_params(6, (8, 7), np.random.default_rng(3)) for _ in range(2))
    assert str(mixture) == str(again)
    drawn = sample_mixture((8, 7), 0.5, cutmix_lambda, np.random.default_rng(3))
    assert [value.tolist() for value in mixture[:3]] == [value.tolist() for value in drawn[:3]]
    assert (mixture.uniform is None) == (partner == 'sampler')
    views = images(6, 2 if partner == 'sampler' else 1, 2, 3, 8, 7).float()
    labels = torch.randint(3, (6, views.shape[1]), generator=torch.Generator().manual_seed(0))
    mixed, targets = mixer(views, labels, mixture.to(torch.device('cpu')))
    assert [tuple(view.shape) for view in mixed] == [(6, 3, 8, 7)] * 2
    for target in targets:
        assert target.dtype == torch.float32
        np.testing.assert_allclose(target.sum(1).numpy(), 1, rtol=1e-6)


def fixed(lam: float, box=(0, 0, 0, 0), local_lam: float = 1.0, **kwargs) -> Mixture:
    return Mixture(torch.tensor(lam), torch.tensor(box), torch.tensor(local_lam), **kwargs)


def test_flipped_mixup_is_timms(monkeypatch):
    x, labels = images(6, 3, 5, 7).float(), torch.tensor([0, 2, 1, 3, 3, 0])
    timms = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=4)
    monkeypatch.setattr(timms, '_params_per_batch', lambda: (0.3, False))
    expected, targets = timms(x.clone(), labels)
    found = BatchMixup([9, 5, 3, 1])(x[:, None, None], labels[:, None], fixed(0.3))
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], targets)


def test_flipped_cutmix_is_timms(monkeypatch):
    x, labels = images(6, 3, 8, 8).float(), torch.tensor([0, 2, 1, 3, 3, 0])
    timms = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=4)
    monkeypatch.setattr(timms, '_params_per_batch', lambda: (0.3, True))
    np.random.seed(0)
    expected, targets = timms(x.clone(), labels)
    np.random.seed(0)
    box, lam = cutmix_bbox_and_lam((6, 3, 8, 8), 0.3)
    found = BatchCutmix([9, 5, 3, 1])(x[:, None, None], labels[:, None], fixed(0.3, tuple(map(int, box)), float(lam)))
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], targets)


@pytest.mark.parametrize('mixer', [BatchMixup, BatchCutmix])
def test_a_flipped_batch_may_be_odd_and_uint8(mixer):
    views, labels = torch.arange(3 * 4).reshape(3, 1, 1, 1, 2, 2).to(torch.uint8), torch.tensor([[0], [1], [1]])
    before = views.clone()
    mixed, targets = mixer([2, 1])(views, labels, fixed(0.25, (0, 1, 0, 2), 0.5))
    assert mixed.shape == (3, 1, 2, 2) and torch.equal(views, before)
    assert targets.sum(1).tolist() == [1, 1, 1] and targets[1].tolist() == [0, 1]


@pytest.mark.parametrize('probability', [0.0, 0.5, 1.0])
def test_a_batch_is_mixed_with_its_probability(probability):
    rng, mixer = np.random.default_rng(0), BatchMixup([1, 1], mixup_prob=probability)
    mixed = np.mean([mixer.sample_params(4, (8, 8), rng) is not IDENTITY_MIXTURE for _ in range(400)])
    assert mixed == pytest.approx(probability, abs=0.08)


def test_unmixed_is_the_image():
    x, labels = images(4, 1, 1, 3, 5, 5), torch.tensor([[0], [1], [2], [2]])
    for mixer in (BatchMixup([3, 2, 1]), BatchCutmix([3, 2, 1])):
        found, targets = mixer(x, labels, IDENTITY_MIXTURE)
        assert torch.equal(found, x[:, 0, 0]) and torch.equal(targets, torch.eye(3)[labels[:, 0]])


def test_cmo_pastes_the_resampled_image_on_the_other():
    views, labels = images(3, 2, 1, 3, 6, 6), torch.tensor([[0, 2], [0, 1], [1, 2]])
    box, lam = (1, 4, 2, 6), 1 - 12 / 36
    mixed, targets = CMOMixer([50, 20, 3])(views, labels, fixed(0.4, box, lam))
    for k, (background, foreground) in enumerate(labels.tolist()):
        assert (mixed[k].numpy() == loop_cutmix(views[k, 0, 0].numpy(), views[k, 1, 0].numpy(), box)).all()
        expected = [0.0] * 3
        expected[background] += lam
        expected[foreground] += 1 - lam
        assert targets[k].tolist() == pytest.approx(expected)


def test_the_partner_takes_the_place_of_the_image():
    views, labels = images(3, 2, 1, 3, 6, 6), torch.tensor([[0, 2], [0, 1], [1, 2]])
    found, found_labels = ResampledOnly([50, 20, 3])(views, labels, None)
    assert torch.equal(found, views[:, 1, 0]) and found_labels.tolist() == [2, 1, 2]
    pairs, pair_labels = PairMixer([50, 20, 3])(views, labels, None)
    assert all(torch.equal(pairs[k], views[:, k, 0]) and torch.equal(pair_labels[k], labels[:, k]) for k in range(2))


@pytest.mark.parametrize('mixer', [ResampledOnly, PairMixer, CMOMixer])
def test_partners_come_from_the_batch_where_it_holds_single_images(mixer):
    rng, views, labels = np.random.default_rng(0), images(400, 1, 1, 1, 2, 2), torch.arange(400)[:, None] % 10 // 9
    mixer = mixer([9, 1], partner='batch', resample_power=1.0)  # 360 images of one class, 40 of the other
    mixture = mixer.sample_params(400, (2, 2), rng)
    pairs, pair_labels = mixer.pairs(views, labels, mixture)
    assert pairs.shape == (400, 2, 1, 1, 2, 2) and torch.equal(pair_labels[:, 0], labels[:, 0])
    assert pair_labels[:, 1].float().mean().item() == pytest.approx(0.5, abs=0.1)
    mixer(views, labels, mixture)
