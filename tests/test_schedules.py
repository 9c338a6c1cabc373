import io
import math

import pytest
import torch

from stable_opd import Cosine, Linear
from stable_opd.constraints import ReferenceKL
from stable_opd.schedules import OnMetric, Step, scheduled

METRIC = "train/repetition_rate"


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 2.0), (0.25, 1.75), (0.5, 1.5), (1.0, 1.0)])
def test_linear(progress, factor):
    assert Linear(2.0, 1.0)(progress) == pytest.approx(factor)


# cos(pi / 3) = 1 / 2, so a third of the way is three quarters of the fall away from the end.
@pytest.mark.parametrize(("progress", "factor"), [(0.0, 2.0), (1 / 3, 1.75), (0.5, 1.5), (2 / 3, 1.25), (1.0, 1.0)])
def test_cosine(progress, factor):
    assert Cosine(2.0, 1.0)(progress) == pytest.approx(factor)


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 2.0), (0.29, 2.0), (0.3, 5.0), (1.0, 5.0)])
def test_step(progress, factor):
    assert Step(0.3, 2.0, 5.0)(progress) == factor


@pytest.mark.parametrize("at", [-0.1, 1.1, math.nan])
def test_step_outside_the_training_is_refused(at):
    with pytest.raises(ValueError, match="at between 0 and 1"):
        Step(at)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Step()], ids=["linear", "cosine", "step"])
def test_default_schedules_fade_a_weight_out(schedule):
    assert scheduled(0.3, schedule, 0.0) == pytest.approx(0.3)
    assert scheduled(0.3, schedule, 1.0) == pytest.approx(0.0)


def test_no_schedule_is_a_constant_weight():
    assert scheduled(0.3, None, 0.7) == 0.3


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Step()], ids=["linear", "cosine", "step"])
def test_schedules_of_the_progress_have_no_state_and_do_not_look_at_metrics(schedule):
    assert schedule.state_dict() == {}
    before = schedule(0.4)
    schedule.observe({METRIC: 1.0})
    assert schedule(0.4) == before


def factors(schedule, *values):
    """The factor after each step."""
    found = []
    for value in values:
        schedule.observe({METRIC: value, "train/truncation_rate": 0.0})
        found.append(schedule(0.5))
    return found


def test_metric_that_is_too_high_for_long_enough_raises_the_factor():
    schedule = OnMetric(METRIC, above=0.05, patience=2, raise_by=2.0, largest=8.0)
    assert schedule(0.0) == 1
    assert factors(schedule, 0.05, 0.06, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9) == [1, 2, 2, 4, 4, 8, 8, 8]


def test_single_high_values_do_not_raise_the_factor():
    assert factors(OnMetric(METRIC), 0.1, 0.0, 0.1, 0.0, 0.1, 0.0) == [1] * 6


def test_factor_falls_back_to_one_while_the_metric_is_low():
    schedule = OnMetric(METRIC, patience=1, raise_by=3.0, relax=0.25)
    assert factors(schedule, 0.1, 0.0, 0.0, 0.0) == pytest.approx([3, 2.5, 2.125, 1 + 2 * 0.75**3])
    assert factors(schedule, *[0.0] * 200)[-1] == pytest.approx(1)


@pytest.mark.parametrize(("relax", "after"), [(0.0, 2.0), (1.0, 1.0)])
def test_factor_stays_or_falls_back_at_once(relax, after):
    assert factors(OnMetric(METRIC, patience=1, relax=relax), 0.1, 0.0)[-1] == after


def test_metric_that_is_not_a_number_changes_nothing():
    """It is the mean over no token; the count goes on where it was."""
    schedule = OnMetric(METRIC, patience=2)
    assert factors(schedule, 0.1, math.nan, 0.1, math.nan) == [1, 1, 2, 2]
    assert factors(OnMetric(METRIC, patience=1), math.inf) == [2]


def test_step_without_rows_of_the_students_is_skipped():
    schedule = OnMetric(METRIC, patience=1)
    schedule.observe({METRIC: 0.1, "train/truncation_rate": 0.0})
    schedule.observe({"train/loss": 0.0})
    assert schedule(0.0) == 2


def test_unknown_metric_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"got 'train/repetition'.*train/repetition_rate, train/truncation_rate"):
        OnMetric("train/repetition").observe({METRIC: 0.1, "train/truncation_rate": 0.0})


def test_checkpoint_holds_factor_and_count():
    """In the constraint's state, through a file that holds tensors alone; the next step is that of an unbroken run."""
    make = lambda: OnMetric(METRIC, patience=3, raise_by=1.7, relax=0.1)  # noqa: E731
    term = ReferenceKL(schedule=make())
    factors(term.schedule, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1)
    file = io.BytesIO()
    torch.save(term.state_dict(), file)
    file.seek(0)
    restored = ReferenceKL(schedule=make())
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.schedule(0.0) == term.schedule(0.0) != 1
    assert factors(restored.schedule, 0.1, 0.0) == factors(term.schedule, 0.1, 0.0)


@pytest.mark.parametrize(
    "arguments", [{"patience": 0}, {"raise_by": 1.0}, {"largest": 1.5}, {"relax": -0.1}, {"relax": 1.1}]
)
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match="Expected patience of at least 1"):
        OnMetric(**arguments)
