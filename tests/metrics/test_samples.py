import itertools
import math
from fractions import Fraction

import pytest
import torch

from stable_opd.metrics import PassAtK
from stable_opd.metrics.samples import pass_at_k


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_estimate_is_the_share_of_the_choices_with_a_right_answer(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        choices = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        expected = sum(map(any, choices)) / len(choices)
        assert pass_at_k(torch.tensor([right]), samples, k).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(32, 1, 16), (1000, 3, 500), (4000, 1999, 2), (4000, 1, 2000)])
def test_many_samples_are_as_exact_as_fractions(samples, right, k):
    exact = 1 - Fraction(math.comb(samples - right, k), math.comb(samples, k))
    assert pass_at_k(torch.tensor([right]), samples, k).item() == pytest.approx(float(exact), rel=1e-10)


def test_mean_over_prompts_and_batches_for_powers_of_two_and_all_samples():
    metric = PassAtK(6)
    metric.update(torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.0] * 6]))
    metric.update(torch.tensor([[1.0] * 6]))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx(
        {"pass_at_2": (2 / 6 + 1) / 3, "pass_at_4": (4 / 6 + 1) / 3, "pass_at_6": (1 + 1) / 3}
    )


def test_half_a_grade_is_no_right_answer():
    metric = PassAtK(2)
    metric.update(torch.tensor([[0.5, 0.9]]))
    assert metric.compute()["pass_at_2"] == 0


def test_no_prompts_are_nan():
    metric = PassAtK(2)
    metric.update(torch.zeros(0, 2))
    assert metric.compute()["pass_at_2"].isnan()
