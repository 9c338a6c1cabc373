"""The trend of the endurance benchmark, and what it is held against."""

import numpy as np
import pytest
from benchmarks.endurance import Quantity, trend

STEPS = np.arange(220.0, 2001.0, 20.0)


def test_an_exact_line_has_its_growth_and_no_interval():
    found = trend(STEPS, 3.0 + 0.01 * STEPS)
    assert (found.growth, found.low, found.high) == pytest.approx([0.01 * (STEPS[-1] - STEPS[0])] * 3)
    assert found.median == pytest.approx(3.0 + 0.01 * np.median(STEPS))


def test_outliers_do_not_move_it_and_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        values = 100 + 0.002 * STEPS + rng.normal(0, 1, len(STEPS))
        values[rng.choice(len(STEPS), 5, replace=False)] += 1000
        found = trend(STEPS, values)
        covered += found.low <= 0.002 * (STEPS[-1] - STEPS[0]) <= found.high
    assert covered / 200 >= 0.88


@pytest.mark.parametrize(("growth", "holds"), [(0.0, True), (6.0, False)])
def test_drift_of_six_hundredths_is_noticed_and_noise_is_not(growth, holds):
    noise = np.random.default_rng(1).normal(0, 3, len(STEPS))
    values = 100 + growth * (STEPS - STEPS[0]) / (STEPS[-1] - STEPS[0]) + noise
    assert trend(STEPS, values).holds(Quantity("step", "time", 0.05, relative=True)) is holds


def test_a_thread_that_is_left_behind_at_every_look_is_noticed():
    quantity = Quantity("threads", "threads", 0.5)
    assert trend(STEPS, np.full(len(STEPS), 6.0)).holds(quantity)
    assert not trend(STEPS, 6.0 + np.arange(len(STEPS)) // 30).holds(quantity)
