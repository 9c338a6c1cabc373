import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from report.made import noise, ramp
from stable_opd.signals.changes import (
    CLEAR,
    LASTING,
    QUIET,
    SLACK,
    Change,
    Departures,
    Detector,
    Effect,
    find_change,
    first_reaching,
)

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


def by_definition(steps, values, effect):
    """The rule of the docstring, over arrays: the whole curve at once."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) < QUIET + LASTING:
        return None
    level, sign = values[:QUIET].mean(), 1.0 if effect.direction == "rise" else -1.0
    noise_ = max(values[:QUIET].std(ddof=1), effect.size(level) / 8)
    away = sign * (values[QUIET:] - level)
    lasting = np.lib.stride_tricks.sliding_window_view(away, LASTING).mean(1)
    reached = np.flatnonzero(lasting >= max(effect.size(level), CLEAR * noise_))
    if not len(reached):
        return None
    sure = LASTING - 1 + reached[0]
    sums = np.cumsum(away[: sure + 1] / noise_ - SLACK)
    # The sum that may not fall below zero leaves it behind the last place where the plain sum is at its least.
    least = np.minimum.accumulate(np.concatenate([[0.0], sums]))[:-1]
    start = int(np.flatnonzero(np.concatenate([[0.0], sums])[:-1] <= least)[-1])
    return Change(steps[QUIET + start], steps[QUIET + sure], level, level + sign * lasting.max())


EFFECTS = st.builds(
    Effect, st.sampled_from(["rise", "fall"]), st.sampled_from([0.37, 1.3]), st.sampled_from([0.0, 0.3])
)
MEASURED = st.lists(st.one_of(st.floats(-3, 3), st.just(float("nan")), st.floats(2, 9)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(MEASURED, EFFECTS)
def test_fed_one_by_one_it_knows_at_every_step_what_the_whole_curve_so_far_says(values, effect):
    detector, curve = Detector(effect), np.array(values, dtype=float)
    for count, value in enumerate(values, 1):
        detector.observe(10 * count, value)
        expected = by_definition(10 * np.arange(1, count + 1), curve[:count], effect)
        assert (detector.change is None) == (expected is None)
        if expected is not None:
            assert detector.change[:2] == expected[:2]
            np.testing.assert_allclose(detector.change[2:], expected[2:], rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(MEASURED, EFFECTS, st.integers(0, 60))
def test_a_detector_goes_on_from_its_state_as_if_it_had_not_been_interrupted(values, effect, cut):
    whole, first, second = Detector(effect), Detector(effect), Detector(effect)
    for step, value in enumerate(values):
        whole.observe(step, value)
        if step < cut:
            first.observe(step, value)
    second.load_state_dict(first.state_dict())
    for step, value in list(enumerate(values))[cut:]:
        second.observe(step, value)
    assert second.state_dict() == whole.state_dict()


def test_a_second_departure_has_a_start_of_its_own():
    values = np.zeros(80)
    values[20:30], values[60:] = 3.0, 3.0
    detector, away = Detector(RISE), []
    for step, value in enumerate(values):
        detector.observe(step, value)
        away += [(step, detector.start)] if detector.away else []
    assert (away[0], away[-1]) == ((21, 20), (79, 60))
    assert not any(35 < step < 60 for step, _ in away)
    assert detector.change[:2] == (20, 21)
    assert detector.mean == 3.0


def observed(*signals):
    departures = Departures(len(signals))
    found = [
        each for step, values in enumerate(zip(*signals, strict=True)) for each in departures.observe(step, values)
    ]
    return departures, found


def test_departures_are_in_quiet_standard_deviations():
    values = np.array([1.0, 3.0] * 5 + [10.0])
    _, found = observed(values)
    assert found[-1] == (10, pytest.approx((10 - 2) / values[:10].std(ddof=1)))
    assert [step for step, _ in found] == list(range(11))


def test_departures_of_too_few_are_not_known():
    assert observed(np.arange(QUIET - 1.0))[1] == []


def test_departures_are_high_only_where_all_are():
    one = noise(60) + 50.0 * (np.arange(60) >= 20)
    other = noise(60, seed=1) + 50.0 * (np.arange(60) >= 40)
    steps, values = map(np.array, zip(*observed(one, other)[1], strict=True))
    assert find_change(steps, values, Effect("rise", absolute=4.0)).start == 40


def test_departures_go_on_from_their_state():
    signals = [noise(30), noise(30, seed=1)]
    for cut in (4, 20):
        departures, found = observed(*(each[:cut] for each in signals))
        second = Departures(2)
        second.load_state_dict(departures.state_dict())
        for step in range(cut, 30):
            found += second.observe(step, [each[step] for each in signals])
        assert found == observed(*signals)[1]
