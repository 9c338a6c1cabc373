import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from helpers import closed_form, make_evidence
from stable_opd import ForwardKL
from stable_opd.divergences import reverse_kl

AUTHORS = torch.tensor([0, 0, 1, 0, 2, 0])


def draw_logits(seed=0, n=6, vocabulary=9, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64) * scale


def see(student, teacher, author=0):
    """Evidence from the logits of student and teacher, each (n, V)."""
    tokens = torch.arange(len(student)) % student.shape[1]
    return make_evidence(tokens, student.log_softmax(-1), teacher.log_softmax(-1), author=author)


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


def test_zero_for_equal_distributions_and_positive_otherwise():
    student, teacher = draw_logits()
    for found in (ForwardKL()(see(student, student)), closed_form(ForwardKL(), see(student, student))[0]):
        assert found.loss.abs().max() == 0
    assert (ForwardKL()(see(student, teacher)).loss > 0).all()


def test_against_finite_differences():
    student, teacher = draw_logits(n=3, vocabulary=5)
    assert torch.autograd.gradcheck(
        lambda x: reverse_kl(teacher.log_softmax(-1), x.log_softmax(-1)), student.requires_grad_()
    )


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_closed_form_is_what_autograd_makes_of_the_logits(scale):
    student, teacher = draw_logits(1, scale=scale)
    student.requires_grad_()
    expected = ForwardKL()(see(student, teacher, AUTHORS))
    (gradient,) = torch.autograd.grad(expected.loss.sum(), student)
    with torch.no_grad():
        found, in_logits = closed_form(ForwardKL(), see(student, teacher, AUTHORS))
    torch.testing.assert_close(found.loss, expected.loss.detach())
    torch.testing.assert_close(found.value, expected.value)
    assert found.where.tolist() == expected.where.tolist()
    torch.testing.assert_close(in_logits, gradient)
    torch.testing.assert_close(in_logits, student.softmax(-1).detach() - teacher.softmax(-1))


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
