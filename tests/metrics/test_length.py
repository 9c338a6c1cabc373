import math
import random

import pytest
import torch

from stable_opd.metrics import LengthInflation, ResponseLength


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 40, 100, 1000])
def test_mean_percentile_and_maximum_are_exact(count):
    lengths = random.Random(count).choices(range(1, 51), k=count)
    metric = ResponseLength(50)
    for start in range(0, count, 7):
        metric.update(torch.tensor(lengths[start : start + 7]))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == {
        "length_mean": pytest.approx(sum(lengths) / count),
        "length_p95": sorted(lengths)[math.ceil(19 * count / 20) - 1],
        "length_max": max(lengths),
    }


def test_percentile_does_not_see_one_long_answer_in_twenty():
    metric = ResponseLength(100)
    metric.update(torch.tensor([3] * 19 + [100]))
    assert metric.compute()["length_p95"] == 3
    metric.update(torch.tensor([100]))
    assert metric.compute()["length_p95"] == 100


def test_forward_gives_the_batch_and_keeps_counting():
    metric = ResponseLength(9)
    assert metric(torch.tensor([2, 4]))["length_mean"] == 3
    assert metric(torch.tensor([9]))["length_max"] == 9
    assert metric(torch.tensor([1]))["length_max"] == 1
    assert metric.compute()["length_mean"] == 4
    metric.reset()
    metric.update(torch.tensor([5]))
    assert metric.compute()["length_max"] == 5


def test_no_answers_are_nan_and_not_an_error():
    metric = ResponseLength(9)
    metric.update(torch.zeros(0, dtype=torch.long))
    assert all(value.isnan() for value in metric.compute().values())


def test_answer_above_the_budget_is_an_error():
    with pytest.raises(ValueError, match="at most max_length=9 tokens, but got one of 10"):
        ResponseLength(9).update(torch.tensor([1, 10]))


STEPS = [[10, 20], [30], [40, 50, 60], [5]]


def test_inflation_is_the_latest_mean_over_that_of_the_first_steps():
    metric = LengthInflation(baseline_steps=2)
    values = [metric(torch.tensor(step)).item() for step in STEPS]
    assert values == pytest.approx([1.0, 30 / 20, 50 / 20, 5 / 20])
    assert metric.compute().item() == pytest.approx(5 / 20)


def test_inflation_by_update_equals_inflation_by_forward():
    metric = LengthInflation(baseline_steps=2)
    for step in STEPS:
        metric.update(torch.tensor(step))
    assert metric.compute().item() == pytest.approx(5 / 20)


def test_inflation_survives_a_checkpoint():
    metric = LengthInflation(baseline_steps=2)
    for step in STEPS[:3]:
        metric.update(torch.tensor(step))
    resumed = LengthInflation(baseline_steps=2)
    resumed.load_state_dict(metric.state_dict())
    assert resumed(torch.tensor(STEPS[3])).item() == pytest.approx(5 / 20)


def test_inflation_resumed_within_the_first_steps_goes_on_collecting_them():
    metric = LengthInflation(baseline_steps=2)
    metric.update(torch.tensor(STEPS[0]))
    resumed = LengthInflation(baseline_steps=2)
    resumed.load_state_dict(metric.state_dict())
    assert [resumed(torch.tensor(step)).item() for step in STEPS[1:]] == pytest.approx([30 / 20, 50 / 20, 5 / 20])


def test_reset_starts_a_new_run():
    metric = LengthInflation(baseline_steps=1)
    metric(torch.tensor([10]))
    metric.reset()
    assert metric(torch.tensor([30])).item() == 1.0
