import math
import random

import pytest
import torch

from stable_opd.metrics import LogRatioTail, RepeatedAdvantage

ADVANTAGE = [torch.tensor([-4.0, -2.0, -1.0]), torch.tensor([-3.0, 0.5])]
IN_LOOP = [torch.tensor([False, False, True]), torch.tensor([False, True])]


def values(figures):
    return {name: value.item() for name, value in figures.items()}


def test_means_over_repeated_regular_and_all_tokens():
    metric = RepeatedAdvantage()
    for advantage, in_loop in zip(ADVANTAGE, IN_LOOP, strict=True):
        metric.update(advantage, in_loop)
    assert values(metric.compute()) == pytest.approx(
        {
            "repeated_share": 2 / 5,
            "advantage_repeated": -0.25,
            "advantage_regular": -3.0,
            "advantage_mean": -9.5 / 5,
        }
    )


def test_forward_gives_the_batch_keeps_counting_and_reset_forgets():
    metric = RepeatedAdvantage()
    first, second = (metric(a, r) for a, r in zip(ADVANTAGE, IN_LOOP, strict=True))
    assert first["advantage_regular"] == -3.0
    assert second["advantage_repeated"] == 0.5
    assert metric.compute()["repeated_share"] == pytest.approx(2 / 5)
    metric.reset()
    metric.update(ADVANTAGE[1], IN_LOOP[1])
    assert metric.compute()["advantage_regular"] == -3.0
    assert metric.compute()["repeated_share"] == 0.5


def test_mean_over_no_repeated_token_is_nan_and_the_others_are_not():
    metric = RepeatedAdvantage()
    metric.update(torch.tensor([-1.0, -2.0]), torch.tensor([False, False]))
    figures = values(metric.compute())
    assert math.isnan(figures.pop("advantage_repeated"))
    assert figures == {"repeated_share": 0.0, "advantage_regular": -1.5, "advantage_mean": -1.5}


def smallest_that_covers(gaps: list[float], quantile: float) -> float:
    ordered = sorted(gaps)
    return next(gap for place, gap in enumerate(ordered, 1) if place / len(gaps) >= quantile)


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 250, 10_000])
@pytest.mark.parametrize("quantile", [0.99, 0.5, 0.57, 0.999999, 1.0])
def test_tail_is_the_smallest_gap_that_enough_tokens_do_not_exceed(count, quantile):
    rng = random.Random(count)
    advantage = torch.tensor([rng.gauss(0, 2) for _ in range(count)])
    metric = LogRatioTail(quantile)
    for part in advantage.split(37):
        metric.update(part)
    assert metric.compute().item() == smallest_that_covers(advantage.abs().tolist(), quantile)


def test_tail_by_forward_is_that_of_the_batch():
    metric = LogRatioTail(1.0)
    assert metric(torch.tensor([-3.0, 1.0])).item() == 3.0
    assert metric(torch.tensor([2.0])).item() == 2.0
    assert metric.compute().item() == 3.0
    metric.reset()
    metric.update(torch.tensor([0.5]))
    assert metric.compute().item() == 0.5


def test_tail_of_bfloat16_gaps_is_float32():
    assert LogRatioTail()(torch.tensor([1.0, 2.0], dtype=torch.bfloat16)).dtype == torch.float32
