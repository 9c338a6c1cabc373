import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from constraints.common import draw_logits, see
from stable_opd.constraints import ReferenceForwardKL, ReferenceKL


@pytest.mark.parametrize("forward", [False, True], ids=["reverse", "forward"])
def test_value_is_the_divergence_by_another_library(forward):
    student, reference = draw_logits()
    found = (ReferenceForwardKL if forward else ReferenceKL)(0.3)(see(student, reference))
    pair = Categorical(logits=student), Categorical(logits=reference)
    expected = kl_divergence(*(pair[::-1] if forward else pair))
    torch.testing.assert_close(found.value, expected)
    torch.testing.assert_close(found.loss, 0.3 * expected)


def test_forward_divergence_grows_without_bound_where_the_student_rules_a_token_out():
    """The gap in the logit of a token that the reference gives a half: by a half of it, against next to nothing."""
    values = []
    for gap in (10.0, 20.0):
        student, reference = torch.tensor([[0.0, -gap]]).double(), torch.zeros(1, 2).double()
        values.append([term()(see(student, reference)).value.item() for term in (ReferenceForwardKL, ReferenceKL)])
    (forward, reverse), (later, barely) = values
    assert later - forward == pytest.approx(5, abs=1e-3)
    assert barely == pytest.approx(reverse, abs=1e-3)


@pytest.mark.parametrize("cls", [ReferenceKL, ReferenceForwardKL])
def test_declares_that_it_needs_the_reference_and_not_the_teacher(cls):
    """Otherwise the initial student would not be kept, or a teacher would be asked for nothing."""
    assert cls.needs_reference
    assert not cls.needs_teacher
    assert cls.support == "full"
