import pytest
import torch

from divergences.common import MINUS_INFINITY, assert_same, draw_logits, each_check, logs, outcomes
from helpers import closed_form, make_evidence
from stable_opd import ForwardKL, ReverseKL
from stable_opd.divergences.alpha import AlphaDivergence, alpha_divergence

each_alpha = pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])


@each_check
@each_alpha
def test_contract(check, alpha):
    check(AlphaDivergence(alpha))


def test_known_value():
    """p = (1/2, 1/2), q = (1, 0): the geometric means sum to (1/2)^(1 - alpha)."""
    student, teacher = logs([0.5, 0.5], [1.0, 0.0])
    assert alpha_divergence(student, teacher, 0.5).item() == pytest.approx(4 * (1 - 0.5**0.5))
    assert alpha_divergence(student, teacher, 0.2).item() == pytest.approx((1 - 0.5**0.8) / 0.16)


@each_alpha
def test_equals_the_sum_of_powers(alpha):
    student, teacher = draw_logits()
    p, q = student.softmax(-1), teacher.softmax(-1)
    expected = (1 - (q**alpha * p ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))
    for found, _ in outcomes(AlphaDivergence(alpha), student, teacher):
        torch.testing.assert_close(found.loss.detach(), expected)


def test_four_squared_hellinger_distances_at_one_half():
    student, teacher = draw_logits()
    squared = (student.softmax(-1).sqrt() - teacher.softmax(-1).sqrt()).square().sum(-1) / 2
    assert AlphaDivergence().alpha == 0.5
    for found, _ in outcomes(AlphaDivergence(), student, teacher):
        torch.testing.assert_close(found.loss.detach(), 4 * squared)


@each_alpha
def test_gradient_is_that_of_the_advantage(alpha):
    """-sum_v p_v A_v grad log p_v with A = (u^alpha - 1) / alpha: exact enumeration over the written token."""
    student, teacher = draw_logits()
    logits = student.clone().requires_grad_()
    ratio = teacher.softmax(-1) / student.softmax(-1)
    expected = -(student.softmax(-1) * (ratio**alpha - 1) / alpha * logits.log_softmax(-1)).sum()
    (slope,) = torch.autograd.grad(expected, logits)
    for _, gradient in outcomes(AlphaDivergence(alpha), student, teacher):
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize(("alpha", "limit"), [(1e-6, ReverseKL()), (1 - 1e-6, ForwardKL())], ids=["to 0", "to 1"])
def test_tends_to_both_kl_divergences_with_their_gradients(alpha, limit):
    student, teacher = draw_logits(scale=1.0)
    found, expected = (outcomes(term, student, teacher) for term in (AlphaDivergence(alpha), limit))
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


@each_alpha
def test_swapping_the_sides_mirrors_alpha(alpha):
    student, teacher = draw_logits().log_softmax(-1)
    torch.testing.assert_close(alpha_divergence(student, teacher, alpha), alpha_divergence(teacher, student, 1 - alpha))


def test_tokens_that_a_side_rules_out_have_no_gradient_that_is_not_a_number():
    student, teacher = logs([0.5, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0])
    value = alpha_divergence(student.requires_grad_(), teacher, 0.3)
    assert value.item() == pytest.approx(0.5 / 0.21)
    assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()
    assert alpha_divergence(student.detach() * torch.nan, teacher, 0.3).isnan().all()


@each_alpha
def test_bounded_by_what_distinct_supports_reach(alpha):
    bound = 1 / (alpha * (1 - alpha))
    student, teacher = draw_logits(scale=40.0).log_softmax(-1)
    assert (alpha_divergence(student, teacher, alpha) <= bound + 1e-12).all()
    disjoint = torch.tensor([[0.0, MINUS_INFINITY]]), torch.tensor([[MINUS_INFINITY, 0.0]])
    assert alpha_divergence(*disjoint, alpha).item() == pytest.approx(bound, rel=1e-6)


@each_alpha
def test_rounding_of_the_sums_is_not_taken_for_a_divergence(alpha):
    """Where float32 loses some 1e-5 of the sum of all probabilities, both sides have lost it."""
    student = draw_logits(vocabulary=30_000, scale=2.0)[0].float().log_softmax(-1) + 1e-5
    assert (student.exp().sum(-1) - 1).abs().min() > 5e-6
    found, gradient = closed_form(AlphaDivergence(alpha), make_evidence(torch.arange(6), student, student))
    assert found.value.abs().max() < 2e-6
    assert gradient.abs().max() < 1e-8
    assert alpha_divergence(student, student, alpha).abs().max() < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_alpha_outside_of_its_interval_is_refused_with_the_way_out(alpha):
    with pytest.raises(ValueError, match=rf"above 0 and below 1, but got {alpha}. Use ReverseKL .* and ForwardKL"):
        AlphaDivergence(alpha)
