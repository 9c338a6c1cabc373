"""What holds for every weighted constraint."""

import pytest
import torch

from constraints.common import ALL, AUTHORS, ESTIMATED, FULL, SAMPLED, _Fixed, draw_logits, outcomes, see
from stable_opd import Linear, components
from stable_opd.constraints import WeightedConstraint
from stable_opd.controllers import Proportional

each = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
each_full = pytest.mark.parametrize("make", FULL.values(), ids=FULL.keys())


def test_nothing_that_is_shipped_is_left_out():
    """`InitialWeights` speaks about no token, and has a file of its own."""
    tested = {type(make()).__name__ for make in ALL.values()}
    weighted = {name for name, cls in components("constraint").items() if issubclass(cls, WeightedConstraint)}
    assert weighted - tested == {"InitialWeights"}


@each_full
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_closed_form_is_autograd(make, scale):
    student, reference = draw_logits(1, scale=scale)
    (expected, slope), (found, gradient) = outcomes(make(0.7), student, reference, AUTHORS)
    torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)
    assert gradient.sum(-1).abs().max() < 1e-12
    assert found.where.tolist() == expected.where.tolist()


@pytest.mark.parametrize("make", (FULL | SAMPLED).values(), ids=(FULL | SAMPLED).keys())
def test_gradient_is_the_slope(make):
    student, reference = draw_logits(n=4, vocabulary=6)
    term = make(0.7)
    assert torch.autograd.gradcheck(lambda x: term(see(x, reference)).loss, student.requires_grad_())
    (_, gradient), *_ = outcomes(term, student.detach(), reference)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("make", [*ESTIMATED.values(), *(FULL[name] for name in ("reference", "forward", "stop"))])
def test_nothing_where_the_student_is_the_reference(make):
    logits, _ = draw_logits()
    for found, gradient in outcomes(make(0.7), logits, logits):
        assert found.value.abs().max() < 1e-13
        assert found.loss.abs().max() < 1e-13
        assert gradient.abs().max() < 1e-13


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite(make, dtype):
    """Up to 1e4 apart, and as good as certain: of the same token, of different ones, or one side alone."""
    student, reference = draw_logits(3, scale=1e4)
    one_hot = 1e4 * torch.eye(6, 9, dtype=torch.float64)
    pairs = [(student, reference), (-one_hot, one_hot), (one_hot, one_hot), (one_hot, one_hot.roll(1, 1))]
    pairs += [(one_hot, reference / 1e4), (student / 1e4, one_hot), (one_hot / 300, one_hot.roll(2, 1) / 300)]
    for ours, theirs in pairs:
        for found, gradient in outcomes(make(), ours.to(dtype), theirs.to(dtype)):
            assert found.loss.isfinite().all()
            assert found.value.isfinite().all()
            assert gradient.isfinite().all()


@each
def test_no_positions_at_all(make):
    empty = torch.zeros(0, 9, dtype=torch.float64)
    for found, gradient in outcomes(make(), empty, empty):
        assert [len(part) for part in found] == [0, 0, 0]
        assert found.where.dtype == torch.bool
        assert gradient.shape == (0, 9)


@each
def test_speaks_about_the_students_tokens_only(make):
    student, reference = draw_logits()
    term = make()
    for found, _ in outcomes(term, student, reference, AUTHORS):
        assert found.where.any()
        assert not found.where[AUTHORS != 0].any()
    if make is not SAMPLED["unlikelihood"]:
        assert found.where.tolist() == (AUTHORS == 0).tolist()


@each
def test_weight_schedule_and_controller_scale_the_loss_and_not_the_value(make):
    student, reference = draw_logits()
    plain = make(1.0)(see(student, reference))
    assert plain.value.abs().max() > 0
    for factor, term in {
        0.3: make(0.3),
        0.75: make(1.0, schedule=Linear(1.0, 0.0)),
        2.5: make(1.0, controller=_Fixed(2.5)),
        0.375: make(0.25, schedule=Linear(1.0, 0.0), controller=_Fixed(2.0)),
        0.0: make(0.0),
    }.items():
        found = term(see(student, reference, progress=0.25))
        torch.testing.assert_close(found.loss, factor * plain.loss)
        torch.testing.assert_close(found.value, plain.value)
        assert found.where.tolist() == plain.where.tolist()


@each_full
def test_closed_form_is_scaled_too(make):
    student, reference = draw_logits()
    (_, once), (_, thrice) = (outcomes(make(weight), student, reference)[1] for weight in (0.2, 0.6))
    torch.testing.assert_close(thrice, 3 * once)


@each
def test_gradient_goes_to_the_loss_alone(make):
    student, reference = draw_logits()
    found = make()(see(student.requires_grad_(), reference))
    assert found.loss.requires_grad
    assert not found.value.requires_grad
    assert not found.where.requires_grad


@each
@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_weight_below_zero_is_refused(make, weight):
    with pytest.raises(ValueError, match="weight of at least 0"):
        make(weight)


@each
def test_controller_learns_of_the_value(make):
    """Of one above the target: the weight grows, but for a value that it raises."""
    term = make(controller=Proportional(target=0.1))
    term.adapt(torch.tensor(0.2))
    assert (term.controller.factor > 1) == (make is not FULL["floor"])
    assert term.controller.factor != 1
    make().adapt(torch.tensor(0.2))
