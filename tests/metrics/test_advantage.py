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
def test_tail_is_the_smallest_gap_that_enough_tokens_do_not_exceed(count):
    rng = random.Random(count)
    advantage = torch.tensor([rng.gauss(0, 2) for _ in range(count)])
    quantiles = {"log_ratio_p99": 0.99, "log_ratio_p50": 0.5, "log_ratio_p57": 0.57, "log_ratio_p99.9": 0.999}
    metric = LogRatioTail([*quantiles.values(), 1.0])
    for part in advantage.split(37):
        metric.update(part)
    found, gaps = values(metric.compute()), advantage.abs().tolist()
    assert found.pop("log_ratio_p100") == max(gaps)
    assert found == {name: smallest_that_covers(gaps, quantile) for name, quantile in quantiles.items()}


def test_two_tails_are_reported_of_a_hundred_gaps():
    metric = LogRatioTail()
    metric.update(torch.arange(-100.0, 0.0).flip(0))
    assert values(metric.compute()) == {"log_ratio_p95": 95.0, "log_ratio_p99": 99.0}


def test_tail_by_forward_is_that_of_the_batch():
    metric = LogRatioTail([1.0])
    assert values(metric(torch.tensor([-3.0, 1.0]))) == {"log_ratio_p100": 3.0}
    assert values(metric(torch.tensor([2.0]))) == {"log_ratio_p100": 2.0}
    assert values(metric.compute()) == {"log_ratio_p100": 3.0}
    metric.reset()
    metric.update(torch.tensor([0.5]))
    assert values(metric.compute()) == {"log_ratio_p100": 0.5}


def test_tail_of_bfloat16_gaps_is_float32():
    found = LogRatioTail()(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert {each.dtype for each in found.values()} == {torch.float32}


def test_tail_of_no_tokens_is_nan_and_not_an_error():
    found = values(LogRatioTail()(torch.zeros(0)))
    assert found.keys() == {"log_ratio_p95", "log_ratio_p99"}
    assert all(map(math.isnan, found.values()))
