import pytest

from stable_opd import Cosine, Linear
from stable_opd.schedules import scheduled


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 2.0), (0.25, 1.75), (0.5, 1.5), (1.0, 1.0)])
def test_linear(progress, factor):
    assert Linear(2.0, 1.0)(progress) == pytest.approx(factor)


# cos(pi / 3) = 1 / 2, so a third of the way is three quarters of the fall away from the end.
@pytest.mark.parametrize(("progress", "factor"), [(0.0, 2.0), (1 / 3, 1.75), (0.5, 1.5), (2 / 3, 1.25), (1.0, 1.0)])
def test_cosine(progress, factor):
    assert Cosine(2.0, 1.0)(progress) == pytest.approx(factor)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_default_schedules_fade_a_weight_out(schedule):
    assert scheduled(0.3, schedule, 0.0) == pytest.approx(0.3)
    assert scheduled(0.3, schedule, 1.0) == pytest.approx(0.0)


def test_no_schedule_is_a_constant_weight():
    assert scheduled(0.3, None, 0.7) == 0.3
