import io
import math

import pytest
import torch

from constraints.common import _Fixed
from stable_opd.constraints import EntropyFloor, ReferenceKL
from stable_opd.controllers import Controller, DualAscent, Proportional

BOTH = pytest.mark.parametrize("cls", [Proportional, DualAscent])


@pytest.mark.parametrize(
    ("value", "factor"), [(0.05, 1.0), (0.055, 1.01), (0.06, 1.02), (0.5, 1.02), (0.045, 0.99), (0.0, 0.98)]
)
def test_proportional(value, factor):
    """A rate of 0.1: a tenth of the relative error, and at most a tenth of a fifth."""
    controller = Proportional(target=0.05, rate=0.1)
    controller.update(value)
    assert controller.factor == pytest.approx(factor)


@pytest.mark.parametrize(("value", "logarithm"), [(0.05, 0.0), (0.1, 0.1), (0.0, -0.1), (0.55, 1.0)])
def test_dual_ascent(value, logarithm):
    controller = DualAscent(target=0.05, rate=0.1)
    controller.update(value)
    assert math.log(controller.factor) == pytest.approx(logarithm)


@BOTH
def test_steps_multiply(cls):
    once, twice = cls(0.05), cls(0.05)
    once.update(0.052)
    twice.update(0.052)
    twice.update(0.052)
    assert twice.factor == pytest.approx(once.factor**2)


@BOTH
def test_value_that_the_weight_raises_is_held_the_other_way_round(cls):
    usual, other = cls(0.05), cls(0.05)
    usual.update(0.04)
    other.update(0.06, raises_value=True)
    assert usual.factor == pytest.approx(other.factor)
    assert usual.factor < 1


@BOTH
@pytest.mark.parametrize("start", [0.1, 1.0, 10.0])
def test_closed_loop_comes_to_the_target(cls, start):
    """A student that drifts away at a constant rate, and that a weight pulls back: the value is drift / weight."""
    controller, value = cls(target=0.05), 0.0
    controller.factor = start
    for _ in range(600):
        value += 0.1 * (0.15 - controller.factor * value)
        controller.update(value)
    assert value == pytest.approx(0.05, rel=0.02)
    assert controller.factor == pytest.approx(3.0, rel=0.02)


@BOTH
def test_closed_loop_of_an_entropy_comes_to_the_target(cls):
    """It falls at a constant rate, and the weight raises it: the value is weight / drift."""
    term, value = EntropyFloor(1.0, controller=cls(target=0.5)), 2.0
    for _ in range(800):
        value += 0.1 * (0.4 * term.controller.factor - value)
        term.adapt(torch.tensor(value))
    assert value == pytest.approx(0.5, rel=0.02)


def test_noise_does_not_take_the_proportional_controller_away():
    """Values between a third and three times the value that the weight deserves."""
    generator = torch.Generator().manual_seed(0)
    controller, seen = Proportional(target=0.05), []
    for _ in range(3000):
        controller.update(0.15 / controller.factor * math.exp(torch.randn((), generator=generator).clamp(-1, 1)))
        seen.append(controller.factor)
    tail = torch.tensor(seen[1000:])
    assert 2.4 < tail.mean() < 3.9
    assert tail.max() / tail.min() < 2


@BOTH
@pytest.mark.parametrize(("value", "limit"), [(1e9, 1e3), (0.0, 1e-3), (-1.0, 1e-3)])
def test_factor_stays_within_its_limits_and_comes_back_at_once(cls, value, limit):
    controller = cls(target=0.05)
    for _ in range(2000):
        controller.update(value)
    assert controller.factor == pytest.approx(limit)
    controller.update(0.1 if limit < 1 else 0.0)
    assert 0.9 * limit < controller.factor < 1.2 * limit
    assert controller.factor != pytest.approx(limit, rel=1e-3)


@BOTH
def test_one_huge_value_does_not_overflow(cls):
    controller = cls(target=1e-9)
    controller.update(1e300)
    assert 1 < controller.factor <= 1e3


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_changes_nothing(cls, value):
    controller = cls(0.05)
    controller.update(0.06)
    before = controller.factor
    controller.update(value)
    assert controller.factor == before != 1


@BOTH
def test_checkpoint_holds_the_factor(cls):
    """In the constraint's state, through a file that holds tensors alone."""
    term = ReferenceKL(controller=cls())
    term.adapt(torch.tensor(0.061))
    file = io.BytesIO()
    torch.save(term.state_dict(), file)
    file.seek(0)
    restored = ReferenceKL(controller=cls())
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.controller.factor == term.controller.factor != 1
    for each in (term, restored):
        each.adapt(torch.tensor(0.033))
    assert restored.controller.factor == term.controller.factor


def test_state_of_a_constraint_without_controller_is_empty():
    assert ReferenceKL().state_dict() == {}


def test_cast_to_another_precision_leaves_the_factor_alone():
    controller = DualAscent()
    controller.update(0.0613)
    before = controller.factor
    controller.to(torch.bfloat16)
    controller.set_extra_state(controller.get_extra_state())
    assert controller.factor == before


@pytest.mark.parametrize("target", [0.0, -0.1, math.nan, math.inf])
def test_target_that_is_not_positive_is_refused(target):
    with pytest.raises(ValueError, match="target above 0"):
        Proportional(target=target)


@BOTH
@pytest.mark.parametrize("rate", [0.0, -0.1, math.nan])
def test_rate_that_is_not_positive_is_refused(cls, rate):
    with pytest.raises(ValueError, match="rate above 0"):
        cls(rate=rate)


def test_rate_that_would_take_the_weight_away_is_refused():
    with pytest.raises(ValueError, match=r"rate below 5, but got 5.*DualAscent"):
        Proportional(rate=5.0)


def test_a_controller_of_ones_own_needs_only_the_next_factor():
    assert Controller.__abstractmethods__ == {"next_factor"}
    fixed = _Fixed(2.0)
    fixed.update(3.0)
    assert fixed.factor == 2.0
