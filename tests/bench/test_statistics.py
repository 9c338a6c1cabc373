"""The test of significance against its definition, and against closed forms."""

import itertools
import math
import random
import statistics

import pytest

from stable_opd.bench.statistics import deviation, mean, sign_flip, smallest_p


def one(differences):
    """The p-value of a single comparison."""
    (p,) = sign_flip([dict(enumerate(differences))])
    return p


def by_definition(differences):
    flipped = list(itertools.product((-1, 1), repeat=len(differences)))
    seen = abs(sum(differences))
    as_large = [signs for signs in flipped if abs(sum(map(lambda a, b: a * b, signs, differences))) >= seen - 1e-9]
    return len(as_large) / len(flipped)


def stepped_down(comparisons):
    """Westfall and Young's step-down maxT by its definition, pattern by pattern; equal seeds for all comparisons."""

    def clear(differences, signs):
        scale = math.sqrt(len(differences) * sum(each**2 for each in differences))
        return abs(sum(map(lambda a, b: a * b, signs, differences))) / scale if scale else 0.0

    count = len(comparisons[0])
    seen = [clear(each, [1] * count) for each in comparisons]
    order = sorted(range(len(comparisons)), key=lambda each: -seen[each])
    found, least = {}, 0.0
    for rank, index in enumerate(order):
        patterns = list(itertools.product((1, -1), repeat=count))
        largest = [max(clear(comparisons[other], signs) for other in order[rank:]) for signs in patterns]
        least = max(least, sum(each >= seen[index] - 1e-9 for each in largest) / len(patterns))
        found[index] = least
    return [found[index] for index in range(len(comparisons))]


@pytest.mark.parametrize("count", range(1, 9))
def test_p_value_is_the_share_of_sign_patterns_with_as_large_a_sum(count):
    rng = random.Random(count)
    for _ in range(20):
        differences = [rng.gauss(0.3, 1) for _ in range(count)]
        assert one(differences) == by_definition(differences)


@pytest.mark.parametrize("count", range(2, 8))
def test_several_comparisons_are_corrected_by_their_joint_distribution(count):
    rng = random.Random(count)
    for number in (2, 3, 5):
        comparisons = [[rng.gauss(0.5 * shift, 1) for _ in range(count)] for shift in range(number)]
        comparisons.append([0.0] * count)
        found = sign_flip([dict(enumerate(each)) for each in comparisons])
        assert found == pytest.approx(stepped_down(comparisons))
        assert all(p >= one(each) - 1e-12 for p, each in zip(found, comparisons, strict=True))
        assert found[-1] == 1.0


def test_seeds_that_a_comparison_lacks_do_not_count_for_it():
    full, part = {0: 0.3, 1: 0.2, 2: 0.4, 3: 0.3}, {1: 0.1, 3: 0.2}
    assert sign_flip([full, {}])[0] == one(list(full.values()))
    assert sign_flip([part])[0] == one(list(part.values())) == 0.5
    assert sign_flip([full, part])[1] >= 0.5


def test_false_alarms_of_many_comparisons_are_as_rare_as_promised():
    """Nothing differs in 400 made-up benchmarks of ten variants, which share the noise of their baseline."""
    rng = random.Random(0)
    alarms = 0
    for _ in range(400):
        base = [rng.gauss(0, 1) for _ in range(6)]
        comparisons = [{seed: rng.gauss(0, 1) - base[seed] for seed in range(6)} for _ in range(10)]
        alarms += min(sign_flip(comparisons)) <= 0.05
    assert alarms / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("count", range(1, 13))
def test_p_value_of_pairs_that_all_go_one_way_is_two_in_all_patterns(count):
    assert one([0.1 * (each + 1) for each in range(count)]) == 2 / 2**count == smallest_p(count)


@pytest.mark.parametrize(("plus", "minus"), [(5, 1), (6, 2), (4, 4), (7, 0)])
def test_p_value_of_equal_sizes_is_that_of_a_coin(plus, minus):
    """The sum of n equal steps is as large if as few heads or tails come: a two-sided binomial test."""
    count, fewer = plus + minus, min(plus, minus)
    tail = sum(math.comb(count, each) for each in range(fewer + 1)) / 2**count
    assert one([0.1] * plus + [-0.1] * minus) == pytest.approx(min(1.0, 2 * tail))


def test_rounding_does_not_break_ties():
    """0.1 + 0.2 - 0.3 is no zero in floating point; every pattern is at least as large."""
    assert one([0.1, 0.2, -0.3]) == 1.0
    assert one([0.0, 0.0]) == 1.0
    assert one([]) == 1.0
    assert sign_flip([]) == []


def test_order_and_sign_and_scale_change_nothing():
    differences = [0.3, -0.1, 0.25, 0.7, 0.05]
    p = one(differences)
    assert one(differences[::-1]) == one([-each for each in differences]) == p
    assert one([1000 * each for each in differences]) == p


def test_many_pairs_are_sampled_near_the_exact_value():
    """Twelve of twenty equal steps go one way: the binomial test gives 0.503."""
    tail = sum(math.comb(20, each) for each in range(9)) / 2**20
    assert one([1.0] * 12 + [-1.0] * 8) == pytest.approx(2 * tail, abs=0.01)
    assert 0 < one([1.0] * 40) < 1e-4


def test_mean_and_deviation_are_those_of_a_sample():
    values = [0.1, 0.4, 0.35, 0.8]
    assert mean(values) == pytest.approx(statistics.fmean(values))
    assert deviation(values) == pytest.approx(statistics.stdev(values))
    assert deviation([1.0]) is None
