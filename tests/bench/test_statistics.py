"""The test of significance against its definition, and against closed forms."""

import itertools
import math
import random
import statistics

import pytest

from stable_opd.bench.statistics import deviation, holm, mean, sign_flip, smallest_p


def by_definition(differences):
    flipped = list(itertools.product((-1, 1), repeat=len(differences)))
    seen = abs(sum(differences))
    as_large = [signs for signs in flipped if abs(sum(map(lambda a, b: a * b, signs, differences))) >= seen - 1e-12]
    return len(as_large) / len(flipped)


@pytest.mark.parametrize("count", range(1, 9))
def test_p_value_is_the_share_of_sign_patterns_with_as_large_a_sum(count):
    rng = random.Random(count)
    for _ in range(20):
        differences = [rng.gauss(0.3, 1) for _ in range(count)]
        assert sign_flip(differences) == by_definition(differences)


@pytest.mark.parametrize("count", range(1, 13))
def test_p_value_of_pairs_that_all_go_one_way_is_two_in_all_patterns(count):
    assert sign_flip([0.1 * (each + 1) for each in range(count)]) == 2 / 2**count == smallest_p(count)


@pytest.mark.parametrize(("plus", "minus"), [(5, 1), (6, 2), (4, 4), (7, 0)])
def test_p_value_of_equal_sizes_is_that_of_a_coin(plus, minus):
    """The sum of n equal steps is as large if as few heads or tails come: a two-sided binomial test."""
    count, fewer = plus + minus, min(plus, minus)
    tail = sum(math.comb(count, each) for each in range(fewer + 1)) / 2**count
    assert sign_flip([0.1] * plus + [-0.1] * minus) == pytest.approx(min(1.0, 2 * tail))


def test_rounding_does_not_break_ties():
    """0.1 + 0.2 - 0.3 is no zero in floating point; every pattern is at least as large."""
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([]) == 1.0


def test_order_and_sign_and_scale_change_nothing():
    differences = [0.3, -0.1, 0.25, 0.7, 0.05]
    p = sign_flip(differences)
    assert sign_flip(differences[::-1]) == sign_flip([-each for each in differences]) == p
    assert sign_flip([1000 * each for each in differences]) == p


def test_many_pairs_are_sampled_near_the_exact_value():
    """Twelve of twenty equal steps go one way: the binomial test gives 0.503."""
    tail = sum(math.comb(20, each) for each in range(9)) / 2**20
    assert sign_flip([1.0] * 12 + [-1.0] * 8) == pytest.approx(2 * tail, abs=0.01)
    assert 0 < sign_flip([1.0] * 40) < 1e-4


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_mean_and_deviation_are_those_of_a_sample():
    values = [0.1, 0.4, 0.35, 0.8]
    assert mean(values) == pytest.approx(statistics.fmean(values))
    assert deviation(values) == pytest.approx(statistics.stdev(values))
    assert deviation([1.0]) is None
