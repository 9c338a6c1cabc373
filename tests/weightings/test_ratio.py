import math

import pytest
import torch

from helpers import make_rollout
from stable_opd.look import Glance
from stable_opd.weightings import RatioMask
from weightings.looks import draw, look_of


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limit", [0.001, 0.02, 0.2])
def test_tokens_within_the_region_count(seed, limit):
    look = draw(seed)
    weights = RatioMask(limit)(look).tolist()
    both = zip(look.glance.student.tolist(), look.rollout.behaviour_logprobs.tolist(), strict=True)
    expected = [float(math.log(math.exp(p) / math.exp(b)) ** 2 / 2 <= limit) for p, b in both]
    assert [weight for weight, own in zip(weights, look.own, strict=True) if own] == [
        value for value, own in zip(expected, look.own, strict=True) if own
    ]


@pytest.mark.parametrize(("ratio", "weight"), [(0.81, 0), (0.83, 1), (1.0, 1), (1.21, 1), (1.23, 0)])
def test_default_is_the_interval_that_is_documented(ratio, weight):
    student = torch.tensor([math.log(0.3 * ratio)])
    rollout = make_rollout([[4]], behaviour=torch.tensor([math.log(0.3)]))
    seen = Glance(student, *torch.zeros(3, 1))
    assert RatioMask()(look_of(rollout, seen=seen)).tolist() == [weight]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limit_that_leaves_nothing_is_refused(limit):
    with pytest.raises(ValueError, match=r"Expected limit above 0, but got .*rounding"):
        RatioMask(limit)
