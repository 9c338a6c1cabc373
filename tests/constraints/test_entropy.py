import math

import pytest
import torch
from torch.distributions import Categorical

from constraints.common import EVERYWHERE, draw_logits, outcomes, see
from stable_opd.constraints import EntropyFloor
from stable_opd.constraints.entropy import entropy
from stable_opd.controllers import Proportional


def test_value_is_the_entropy_by_another_library_and_the_loss_the_shortfall():
    student, _ = draw_logits()
    expected = Categorical(logits=student).entropy()
    floor = expected.median().item() + 1e-3
    found = EntropyFloor(0.3, floor)(see(student))
    torch.testing.assert_close(found.value, expected)
    torch.testing.assert_close(found.loss, 0.3 * (floor - expected).clamp(min=0))
    assert 0 < (found.loss > 0).sum() < 6


def test_nothing_is_asked_above_the_floor():
    student, _ = draw_logits()
    values = entropy(student.log_softmax(-1))
    floor = values.median().item() + 1e-3
    for found, gradient in outcomes(EntropyFloor(0.3, floor), student, None):
        assert (gradient[values > floor] == 0).all()
        assert (gradient[values < floor].abs().sum(-1) > 0).all()
        assert (found.loss[values > floor] == 0).all()


def test_floor_above_every_entropy_is_the_entropy_bonus():
    student, _ = draw_logits()
    student.requires_grad_()
    (bonus,) = torch.autograd.grad(-0.3 * entropy(student.log_softmax(-1)).sum(), student)
    for _, gradient in outcomes(EntropyFloor(0.3, EVERYWHERE), student.detach(), None):
        torch.testing.assert_close(gradient, bonus)


def test_token_that_is_ruled_out_has_no_part():
    logprobs = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log().requires_grad_()
    value = entropy(logprobs)
    assert value.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    assert gradient.isfinite().all()


def test_controller_raises_the_weight_while_the_entropy_is_too_low():
    term = EntropyFloor(controller=Proportional(target=0.5))
    term.adapt(torch.tensor(0.1))
    assert term.controller.factor == pytest.approx(1.02)
    term.adapt(torch.tensor(5.0))
    assert term.controller.factor == pytest.approx(1.02 * 0.98)


@pytest.mark.parametrize("floor", [0.0, -1.0, math.nan])
def test_floor_that_nothing_is_below_is_refused(floor):
    with pytest.raises(ValueError, match="floor above 0"):
        EntropyFloor(floor=floor)
