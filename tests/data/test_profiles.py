"""Counts, splits, shot groups and the fingerprint against loops and published numbers."""
import random

import numpy as np
import pytest

from glmc.data.profiles import Profile, fingerprint, long_tail_counts, long_tail_indices, pluralize, shot_groups


@pytest.mark.parametrize('n_max, num_classes, factor, total', [
    (500, 100, 100, 10847), (500, 100, 50, 12608), (500, 100, 10, 19573),
    (5000, 10, 100, 12406), (5000, 10, 50, 13996), (5000, 10, 10, 20431)])
def test_cifar_profiles_have_the_published_number_of_images(n_max, num_classes, factor, total):
    counts = long_tail_counts(n_max, num_classes, factor)
    assert counts.sum() == total
    assert (counts[0], counts[-1]) == (n_max, n_max // factor)


def test_exponential_profile_is_its_formula():
    expected = [int(500 * 100 ** (-c / 99)) for c in range(100)]
    assert long_tail_counts(500, 100, 100).tolist() == expected


@pytest.mark.parametrize('num_classes, head', [(10, 5), (7, 4), (2, 1), (1, 1)])
def test_step_profile_is_two_levels(num_classes, head):
    assert long_tail_counts(90, num_classes, 20, 'step').tolist() == [90] * head + [4] * (num_classes - head)


@pytest.mark.parametrize('kind', ['exp', 'step'])
def test_factor_one_keeps_the_set_balanced(kind):
    assert long_tail_counts(30, 4, 1, kind).tolist() == [30] * 4


@pytest.mark.parametrize('arguments, match', [
    ((0, 10, 10), 'n_max'), ((10, 0, 10), 'num_classes'), ((10, 10, 0.5), 'imbalance_factor must be >= 1, got 0.5'),
    ((10, 10, float('nan')), 'imbalance_factor'), ((10, 10, 10, 'linear'), "'linear'"), ((50, 10, 100), 'with none')])
def test_impossible_profiles_are_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        long_tail_counts(*arguments)


def mersenne_twister(seed: int) -> random.Random:
    """Python's generator in the state of numpy's legacy seeding, which gives the same 32-bit numbers without numpy."""
    _, keys, position, _, _ = np.random.RandomState(seed).get_state()
    generator = random.Random()
    generator.setstate((3, (*keys.tolist(), position), None))
    return generator


def shuffled(items: list, generator: random.Random) -> list:
    """Shuffle by Fisher-Yates from the end; each index is drawn with the needed bits until it is in range."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        bits = (1 << last.bit_length()) - 1
        place = generator.getrandbits(32) & bits
        while place > last:
            place = generator.getrandbits(32) & bits
        items[last], items[place] = items[place], items[last]
    return items


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
COUNTS = [40, 20, 9, 4, 1]


@pytest.mark.parametrize('split, seed, used_seed', [('cao', 0, 0), ('cao', 7, 0), ('random', 7, 7)])
def test_split_is_a_shuffle_inside_each_class_in_label_order(split, seed, used_seed):
    generator = mersenne_twister(used_seed)
    expected = []
    for label, count in enumerate(COUNTS):
        members = [i for i in range(len(LABELS)) if LABELS[i] == label]
        expected += shuffled(members, generator)[:count]
    assert long_tail_indices(LABELS, COUNTS, split, seed).tolist() == sorted(expected)


def test_first_split_keeps_the_first_of_each_class():
    expected = sorted(i for c, n in enumerate(COUNTS) for i in [i for i in range(200) if LABELS[i] == c][:n])
    assert long_tail_indices(LABELS, COUNTS, 'first').tolist() == expected


def test_splits_differ_and_do_not_change_the_labels():
    before = LABELS.copy()
    splits = [long_tail_indices(LABELS, COUNTS, *which).tolist()
              for which in (('cao',), ('first',), ('random', 1), ('random', 2))]
    assert all(a != b for i, a in enumerate(splits) for b in splits[:i])
    np.testing.assert_array_equal(LABELS, before)


@pytest.mark.parametrize('arguments, match', [
    (([41, 1],), 'class 0 has 40 images, 41 are needed'), (([1, 1], 'last'), "'last'")])
def test_impossible_splits_are_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        long_tail_indices(LABELS, *arguments)


def test_shot_groups_at_their_borders():
    groups = shot_groups([101, 100, 21, 20, 500, 1, 0])
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        'many': [0, 4], 'medium': [1, 2], 'few': [3, 5, 6]}


def test_shot_groups_of_cifar100():
    groups = shot_groups(long_tail_counts(500, 100, 100))
    assert [len(groups[name]) for name in ('many', 'medium', 'few')] == [35, 34, 31]


def test_shot_groups_with_own_thresholds():
    assert {name: classes.tolist() for name, classes in shot_groups([9, 5, 4, 3], 3, 5).items()} == {
        'many': [0], 'medium': [1, 2], 'few': [3]}
    with pytest.raises(ValueError, match='got 6 and 5'):
        shot_groups([1, 2], 6, 5)


@pytest.mark.parametrize('number, noun, text', [
    (0, 'image', '0 images'), (1, 'image', '1 image'), (1200, 'image', '1,200 images'), (1, 'class', '1 class'),
    (2, 'class', '2 classes')])
def test_plural(number, noun, text):
    assert pluralize(number, noun) == text


def test_fingerprint_knows_the_set_and_not_its_order():
    assert fingerprint(['b/1', 'a/2', 'a/1']) == fingerprint(iter(['a/1', 'a/2', 'b/1']))
    different = [['a/1', 'a/2'], ['a/1', 'a/2', 'b/2'], ['a/1', 'a/2', 'b/1', 'b/1'], ['a/1a/2', 'b/1'], []]
    assert len({fingerprint(names) for names in [*different, ['a/1', 'a/2', 'b/1']]}) == 6


def test_fingerprint_is_sha256_of_sorted_lines():
    # printf 'a/1\nb/1' | sha256sum
    assert fingerprint(['b/1', 'a/1']) == '9d0ef62d0fc20ae41a03483bae8cca10a6f5dddfef743b998508bd9b558f5088'


def test_profile_of_a_set():
    labels = np.repeat([0, 1, 2], [30, 5, 2])
    profile = Profile.of(labels, 4, map(str, range(37)), (4, 20))
    assert profile.summary() == '37 images of 4 classes, 30 … 0 per class (1 many, 1 medium, 2 few)'
    assert profile.as_dict() == {
        'num_images': 37, 'class_counts': [30, 5, 2, 0], 'shot_thresholds': [4, 20],
        'shot_classes': {'many': 1, 'medium': 1, 'few': 2}, 'fingerprint': fingerprint(map(str, range(37)))}
