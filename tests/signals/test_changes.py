import numpy as np
import pytest
from stable_opd.report.changes import LASTING, QUIET, Effect, departure, find_change, first_reaching, together

from report.made import noise, ramp

RISE, FALL = Effect("rise", absolute=1.0), Effect("fall", absolute=1.0)


def change(values, effect=RISE):
    return find_change(np.arange(len(values), dtype=float), np.asarray(values, dtype=float), effect)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("effect", [RISE, FALL])
def test_noise_is_no_change(seed, effect):
    assert change(noise(500, level=3.0, size=0.5, seed=seed), effect) is None


@pytest.mark.parametrize("value", [0.0, 7.5, -2.0])
def test_a_constant_is_no_change(value):
    assert change(np.full(100, value)) is None
    assert change(np.full(100, value), FALL) is None


@pytest.mark.parametrize("seed", range(10))
def test_a_step_is_found_where_it_is(seed):
    values = noise(100, size=0.2, seed=seed) + 2.0 * (np.arange(100) >= 60)
    found = change(values)
    assert 57 <= found.start <= 60
    assert found.start <= found.sure < 60 + LASTING
    assert found.before == pytest.approx(0.0, abs=0.2)
    assert found.after == pytest.approx(2.0, abs=0.4)


def test_a_step_without_noise_is_found_to_the_step():
    assert change(2.0 * (np.arange(60) >= 33))[:2] == (33, 35)  # the mean of five reaches 1 with the third


@pytest.mark.parametrize("seed", range(10))
def test_a_ramp_is_found_at_its_foot_and_not_where_it_got_large(seed):
    values = ramp(120, start=50, before=0.0, after=10.0, over=40) + noise(120, size=0.1, seed=seed)
    found = change(values)
    assert 48 <= found.start <= 53
    assert found.sure > found.start


def test_a_fall_is_found_by_the_effect_that_looks_for_it_alone():
    values = -2.0 * (np.arange(60) >= 33)
    assert change(values) is None
    assert change(values, FALL).start == 33
    assert change(values, FALL).after == -2.0


def test_one_spike_is_no_change():
    values = np.zeros(60)
    values[30] = 4.9  # a mean of five stays below 1
    assert change(values) is None


def test_what_does_not_last_through_the_noise_is_no_change():
    """Large in units, small beside the noise of the quiet phase."""
    values = np.tile([5.0, -5.0], 50)
    values[60:] += 2.0
    assert change(values) is None


def test_earlier_wobbles_that_came_back_do_not_move_the_start():
    values = np.zeros(80)
    values[20:22] = 0.9
    values[50:] = 3.0
    assert change(values).start == 50


def test_nan_is_left_out_and_steps_are_those_of_the_rows():
    values = 2.0 * (np.arange(60) >= 33)
    values[::4] = np.nan
    steps = 10.0 * np.arange(60)
    assert find_change(steps, values, RISE).start == 330


def test_a_relative_effect_is_one_of_the_quiet_level():
    values = np.where(np.arange(60) >= 33, 120.0, 100.0)
    assert change(values, Effect("rise", relative=0.25)) is None
    assert change(values, Effect("rise", relative=0.15)).start == 33


def test_the_larger_of_both_effects_counts():
    assert Effect("rise", absolute=2.0, relative=0.5).size(10.0) == 5.0
    assert Effect("rise", absolute=2.0, relative=0.5).size(-1.0) == 2.0


@pytest.mark.parametrize("count", [0, 1, QUIET, QUIET + LASTING - 1])
def test_too_little_is_no_change(count):
    assert change(np.arange(count) * 100.0) is None


def test_nothing_but_nan_is_no_change():
    assert change(np.full(100, np.nan)) is None


def test_departures_are_in_quiet_standard_deviations():
    values = np.array([1.0, 3.0] * 5 + [10.0])
    quiet = values[:10].std(ddof=1)
    assert departure(values)[-1] == pytest.approx((10 - 2) / quiet)


def test_departure_of_too_few_is_nan():
    assert np.isnan(departure(np.arange(QUIET - 1.0))).all()


def test_together_is_high_only_where_both_are():
    one = noise(60) + 50.0 * (np.arange(60) >= 20)
    other = noise(60, seed=1) + 50.0 * (np.arange(60) >= 40)
    both = together(one, other)
    assert change(both, Effect("rise", absolute=4.0)).start == 40


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([0, 0, 1, 0, 0, 0, 0, 0], None),
        ([0.0] * 4 + [1.0] * 6, 4),
        ([0.0] * 4 + [0.8] + [1.0] * 6, 5),
        ([0.95] * 8, 0),
        ([0.0] * 8 + [1.0] * 2, None),
        ([], None),
        ([np.nan, np.nan], None),
    ],
    ids=["a spike", "a step", "a step on the way", "from the start", "too short", "nothing", "nan"],
)
def test_first_reaching_needs_a_mean_above_the_bound(values, step):
    assert first_reaching(np.arange(len(values), dtype=float), np.array(values, dtype=float), 0.9) == step
