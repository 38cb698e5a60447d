"""Samples of a step: distributions by chi-square, coverage, seeds, and processes against one process."""
import threading

import numpy as np
import pytest
from scipy.stats import chisquare

from glmc.data import sampling
from glmc.data.sampling import PairSampler, ShardSampler, draw, image_weights, stream

LABELS = np.repeat([0, 1, 2], [40, 15, 5])


def batches(sampler: PairSampler, epoch: int = 0) -> list[list[tuple[int, ...]]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def loop_probabilities(power: float) -> list[float]:
    counts = [sum(other == label for other in LABELS) for label in LABELS]
    powers = [float(count) ** -power for count in counts]
    return [value / sum(powers) for value in powers]


@pytest.mark.parametrize('power', [0.0, 0.2, 1.0])
def test_image_weights_are_the_loop(power):
    np.testing.assert_allclose(image_weights(LABELS, power), loop_probabilities(power), rtol=1e-12)


def test_power_zero_is_uniform_over_images_and_one_over_classes():
    np.testing.assert_allclose(image_weights(LABELS, 0), 1 / 60)
    np.testing.assert_allclose(np.bincount(LABELS, image_weights(LABELS, 1)), 1 / 3)


@pytest.mark.parametrize('power', [0.0, 0.2, 1.0])
def test_partners_follow_their_distribution(power):
    sampler = PairSampler(LABELS, 20, resample_power=power, seed=1)
    partners = [j for epoch in range(400) for batch in batches(sampler, epoch) for _, _, j in batch]
    expected = np.array(loop_probabilities(power)) * len(partners)
    assert chisquare(np.bincount(partners, minlength=60), expected).pvalue > 0.001


@pytest.mark.parametrize('power', [0.0, 1.0, 2.5])
def test_partners_are_the_weighted_choice_of_numpy(power):
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    expected = np.random.default_rng(5).choice(1000, size=4000, p=image_weights(labels, power))
    cumulative = image_weights(labels, power).cumsum()
    assert np.array_equal(draw(np.random.default_rng(5), cumulative / cumulative[-1], 4000), expected)


def test_partners_are_independent_of_their_images():
    sampler = PairSampler(LABELS, 20, resample_power=1.0)
    table = np.zeros((3, 3))
    for epoch in range(400):
        for _, i, j in [sample for batch in batches(sampler, epoch) for sample in batch]:
            table[LABELS[i], LABELS[j]] += 1
    for row in table:
        assert chisquare(row).pvalue > 0.001


def test_first_places_are_uniform_over_images():
    sampler = PairSampler(LABELS, 20)
    first = [i for epoch in range(400) for _, i in batches(sampler, epoch)[0]]
    assert chisquare(np.bincount(first, minlength=60)).pvalue > 0.001


@pytest.mark.parametrize('batch_size, power', [(7, None), (20, 0.2), (60, 1.0)])
def test_every_image_comes_once_an_epoch(batch_size, power):
    draws = [draw for batch in batches(PairSampler(LABELS, batch_size, power)) for draw in batch]
    assert sorted(draw[1] for draw in draws) == list(range(60))
    assert {len(draw) for draw in draws} == {2 if power is None else 3}


def test_epochs_and_seeds_differ_and_the_same_repeats():
    def draw(seed, epoch):
        return batches(PairSampler(LABELS, 20, 0.2, seed=seed), epoch)
    assert draw(3, 5) == draw(3, 5)
    for column in range(3):
        seen = {tuple(d[column] for batch in draw(*which) for d in batch) for which in ((3, 5), (3, 6), (4, 5), (5, 3))}
        assert len(seen) == 4


def test_an_epoch_is_the_same_whatever_was_drawn_before():
    sampler = PairSampler(LABELS, 20, 0.2)
    fourth = batches(sampler, 4)
    batches(sampler, 9)
    np.random.seed(1)
    assert batches(sampler, 4) == fourth


@pytest.mark.parametrize('epochs', [(0, 1, 2), (3, 5, 5), (7,)])
def test_an_epoch_drawn_ahead_is_the_same(epochs, monkeypatch):
    """In order, after a resume elsewhere, and again; the next epoch is drawn while an epoch is read, by a thread."""
    expected = [batches(PairSampler(LABELS, 4, 0.5), epoch) for epoch in epochs]
    monkeypatch.setattr(sampling, 'LARGE', 0)
    sampler, drawn, sample_epoch = PairSampler(LABELS, 4, 0.5), [], PairSampler.sample_epoch
    monkeypatch.setattr(PairSampler, 'sample_epoch', lambda self, epoch: drawn.append(
        (epoch, threading.current_thread() is threading.main_thread())) or sample_epoch(self, epoch))
    assert [batches(sampler, epoch) for epoch in epochs] == expected
    sampler.ahead.result()
    assert (epochs[-1] + 1, False) in drawn and (epochs[0], True) in drawn
    if epochs == (0, 1, 2):
        assert drawn == [(0, True), (1, False), (2, False), (3, False)]


def test_an_error_of_the_thread_is_that_of_the_next_epoch(monkeypatch):
    monkeypatch.setattr(sampling, 'LARGE', 0)
    sampler = PairSampler(LABELS, 4)
    monkeypatch.setattr(PairSampler, 'sample_epoch', lambda self, epoch: 1 / (1 - epoch) and [np.arange(len(LABELS))])
    batches(sampler, 0)
    with pytest.raises(ZeroDivisionError):
        batches(sampler, 1)


@pytest.mark.parametrize('world_size', [1, 2, 3])
@pytest.mark.parametrize('num_images', [60, 59, 53, 49])
def test_union_over_processes_is_the_single_draw(world_size, num_images):
    samplers = [PairSampler(LABELS[:num_images], 4, 0.2, 7, rank, world_size) for rank in range(world_size)]
    parts = [batches(sampler, 2) for sampler in samplers]
    single = list(zip(*(column.tolist() for column in samplers[0].sample_epoch(2)), strict=True))
    dealt = []
    for step in zip(*parts, strict=True):  # card by card, as they were dealt
        longest = max(map(len, step))
        dealt += [part[place] for place in range(longest) for part in step if place < len(part)]
    assert dealt == single
    assert len(single) == num_images


@pytest.mark.parametrize('world_size', [1, 2, 3])
@pytest.mark.parametrize('num_images', range(36, 61))
def test_no_process_ever_has_fewer_than_two_images(world_size, num_images):
    for rank in range(world_size):
        sampler = PairSampler(LABELS[:num_images], 4, None, 0, rank, world_size)
        sizes = [len(batch) for batch in sampler]
        assert len(sizes) == len(sampler)
        assert set(sizes[:-1]) <= {4}
        assert 2 <= sizes[-1] <= 4 + 2


@pytest.mark.parametrize('num_images, sizes', [(12, [4, 4, 4]), (13, [4, 4, 5]), (14, [4, 4, 4, 2])])
def test_a_last_batch_of_one_joins_the_one_before(num_images, sizes):
    assert [len(batch) for batch in PairSampler(np.zeros(num_images, int), 4)] == sizes


def test_streams_meet_nowhere():
    positions = [('sampler', 0, 0), ('crops', 0, 0), ('mixture', 0, 0, 0), ('mixture', 0, 1, 0), ('mixture', 0, 0, 1),
                 ('sampler', 1, 0), ('sampler', 0, 1), ('crops', 1, 0), ('crops', 0, 1), ('mixture', 1, 0, 0)]
    assert len({stream(*position).integers(2 ** 62) for position in positions}) == len(positions)
    assert stream('sampler', 3, 5).integers(2 ** 62) == stream('sampler', 3, 5).integers(2 ** 62)


def test_augmentation_seeds_are_32_bit_and_differ():
    seeds = [seed for epoch in range(5) for batch in batches(PairSampler(LABELS, 20), epoch) for seed, _ in batch]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) < 2 ** 30
    assert 3 * 2 ** 30 < max(seeds) < 2 ** 32


def test_a_batch_larger_than_the_set_is_an_error():
    assert len(PairSampler(LABELS, 30, world_size=2)) == 1
    with pytest.raises(ValueError, match='a batch of 62 is larger than the set of 60 images'):
        PairSampler(LABELS, 31, world_size=2)


@pytest.mark.parametrize('world_size', [1, 2, 3])
@pytest.mark.parametrize('num_images', [1, 7, 9])
def test_shards_cover_each_index_exactly_once(num_images, world_size):
    shards = [ShardSampler(num_images, rank, world_size) for rank in range(world_size)]
    assert sorted(index for shard in shards for index in shard) == list(range(num_images))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
