import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import AUTHORS, draw_logits, each_check, outcomes, see
from stable_opd import ForwardKL


@each_check
def test_contract(check):
    check(ForwardKL())


def test_known_value():
    """KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 log 1/2 + 3/4 log 3/2: the teacher comes first."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    half, three_halves = torch.tensor([0.5, 1.5]).log().tolist()
    assert ForwardKL()(see(student, teacher)).loss.item() == pytest.approx(0.25 * half + 0.75 * three_halves)


def test_equals_torch_distributions_where_the_student_wrote():
    student, teacher = draw_logits()
    student.requires_grad_()
    term = ForwardKL()(see(student, teacher, AUTHORS))
    expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student))
    torch.testing.assert_close(term.loss, expected)
    torch.testing.assert_close(term.value, expected.detach())
    assert term.loss.requires_grad
    assert not term.value.requires_grad
    assert term.where.tolist() == (AUTHORS == 0).tolist()


def test_exactly_zero_for_equal_distributions_and_positive_otherwise():
    student, teacher = draw_logits()
    for found, _ in outcomes(ForwardKL(), student, student):
        assert found.loss.abs().max() == 0
    assert (ForwardKL()(see(student, teacher)).loss > 0).all()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_gradient_is_the_difference_of_the_probabilities(scale):
    student, teacher = draw_logits(1, scale=scale)
    for _, gradient in outcomes(ForwardKL(), student, teacher):
        torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1))


def test_token_that_the_teacher_rules_out_contributes_nothing():
    """And its probability is pushed to zero: the gradient in its logit is p."""
    student = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    loss = ForwardKL()(see(student, teacher)).loss
    assert loss.item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    loss.sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.0, -0.25, 0.25]]))


def test_token_that_only_the_student_rules_out_makes_it_infinite():
    student, teacher = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert ForwardKL()(see(student, teacher)).loss.item() == float("inf")
