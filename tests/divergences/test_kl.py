import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import draw_logits, each_check
from helpers import make_evidence
from stable_opd import ReverseKL
from stable_opd.divergences import reverse_kl


def distributions(**options):
    return draw_logits(**options).log_softmax(-1)


@each_check
def test_contract(check):
    check(ReverseKL())


def test_known_value():
    """KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3."""
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert reverse_kl(student, teacher).item() == pytest.approx(0.5 * torch.tensor(4 / 3).log().item())


def test_equals_torch_distributions():
    student, teacher = distributions()
    expected = kl_divergence(Categorical(logits=student), Categorical(logits=teacher))
    torch.testing.assert_close(reverse_kl(student, teacher), expected)


def test_direction_is_student_first():
    student, teacher = distributions()
    assert not torch.allclose(reverse_kl(student, teacher), reverse_kl(teacher, student), rtol=0.1)


def test_zero_for_equal_distributions_and_positive_otherwise():
    student, teacher = distributions()
    assert reverse_kl(student, student).abs().max() == 0
    assert (reverse_kl(student, teacher) > 0).all()


def test_any_leading_shape():
    student, teacher = distributions(n=12)
    shaped = reverse_kl(student.view(3, 4, 9), teacher.view(3, 4, 9))
    torch.testing.assert_close(shaped, reverse_kl(student, teacher).view(3, 4))


def test_against_finite_differences():
    student, teacher = distributions(n=3, vocabulary=5)
    logits = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reverse_kl(x.log_softmax(-1), teacher), logits)


def test_gradient_in_the_logits_is_the_closed_form():
    """d KL / d logit_v = p_v (log p_v - log q_v - KL)."""
    student, teacher = distributions()
    logits = (student + 1.7).requires_grad_()
    reverse_kl(logits.log_softmax(-1), teacher).sum().backward()
    gap = student - teacher
    expected = student.exp() * (gap - (student.exp() * gap).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected)


def test_token_that_the_student_rules_out_contributes_nothing():
    minus_infinity = -float("inf")
    student = torch.tensor([[0.5, 0.5, 0.0]]).log().requires_grad_()
    for teacher_third in (torch.tensor([[0.4, 0.4, 0.2]]).log(), torch.tensor([[0.5, 0.5, 0.0]]).log()):
        value = reverse_kl(student, teacher_third)
        expected = (torch.tensor([0.5]).log() - teacher_third[0, 0]).item()
        assert value.item() == pytest.approx(expected, abs=1e-7)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert gradient.isfinite().all()
    assert student[0, 2].item() == minus_infinity


def test_logits_of_minus_infinity_give_a_finite_gradient():
    logits = torch.tensor([[1.0, 2.0, -float("inf")]], requires_grad=True)
    reverse_kl(logits.log_softmax(-1), torch.tensor([[0.2, 0.3, 0.5]]).log()).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2] == 0


def test_token_that_only_the_teacher_rules_out_makes_it_infinite():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert reverse_kl(student, teacher).item() == float("inf")


def test_token_that_the_teacher_rules_out_and_whose_probability_underflows_is_not_nan():
    """exp(-200) is 0 in float32, and 0 times infinity would be nan."""
    student, teacher = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -float("inf")]])
    assert not reverse_kl(student, teacher).isnan().any()


@pytest.mark.parametrize("scale", [1e3, 1e4, 1e30])
def test_huge_logits_stay_free_of_nan(scale):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 7, generator=generator) * scale).requires_grad_()
    teacher = (torch.randn(5, 7, generator=generator) * scale).log_softmax(-1)
    value = reverse_kl(logits.log_softmax(-1), teacher)
    value.sum().backward()
    assert not value.isnan().any()
    assert not logits.grad.isnan().any()


def test_bfloat16_within_its_tolerance():
    student, teacher = distributions(scale=1.0)
    exact = reverse_kl(student, teacher)
    rounded = reverse_kl(student.bfloat16(), teacher.bfloat16()).double()
    assert ((rounded - exact).abs() <= 0.03 * (1 + exact)).all()


def test_class_returns_the_divergence_where_the_student_wrote():
    student, teacher = distributions()
    student.requires_grad_()
    evidence = make_evidence(torch.arange(6), student, teacher, author=torch.tensor([0, 0, 1, 0, 2, 0]))
    term = ReverseKL()(evidence)
    expected = kl_divergence(Categorical(logits=student), Categorical(logits=teacher))
    torch.testing.assert_close(term.loss, expected)
    torch.testing.assert_close(term.value, expected.detach())
    assert term.loss.requires_grad
    assert not term.value.requires_grad
    assert term.where.tolist() == [True, True, False, True, False, True]
