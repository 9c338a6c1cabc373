from itertools import product

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import MINUS_INFINITY, draw_logits, each_check, logs, outcomes
from stable_opd import JensenShannon
from stable_opd.divergences.total_variation import TotalVariation, total_variation


@each_check
def test_contract(check):
    check(TotalVariation())


def test_known_value():
    assert total_variation(*logs([0.5, 0.5, 0.0], [0.25, 0.25, 0.5])).item() == pytest.approx(0.5)


def test_is_the_largest_difference_in_the_probability_of_any_event():
    student, teacher = draw_logits(vocabulary=6)
    p, q = student.softmax(-1), teacher.softmax(-1)
    events = torch.tensor(list(product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    expected = ((p - q) @ events.T).max(-1).values
    for found, _ in outcomes(TotalVariation(), student, teacher):
        torch.testing.assert_close(found.loss.detach(), expected)


def test_from_zero_to_one_which_distinct_supports_reach():
    student, teacher = draw_logits(scale=40.0).log_softmax(-1)
    assert (total_variation(student, teacher) <= 1 + 1e-12).all()
    disjoint = torch.tensor([[0.0, MINUS_INFINITY]]), torch.tensor([[MINUS_INFINITY, 0.0]])
    assert total_variation(*disjoint).item() == 1


def test_symmetric_and_within_the_inequality_of_pinsker():
    student, teacher = draw_logits(scale=1.0).log_softmax(-1)
    found = total_variation(student, teacher)
    torch.testing.assert_close(found, total_variation(teacher, student))
    assert (found <= (kl_divergence(Categorical(logits=student), Categorical(logits=teacher)) / 2).sqrt()).all()


def test_gradient_is_that_of_the_sign_as_an_advantage():
    """-sum_v p_v A_v grad log p_v with A = sign(q - p) / 2: exact enumeration over the written token."""
    student, teacher = draw_logits()
    logits = student.clone().requires_grad_()
    advantage = (teacher.softmax(-1) - student.softmax(-1)).sign() / 2
    expected = -(student.softmax(-1) * advantage * logits.log_softmax(-1)).sum()
    (slope,) = torch.autograd.grad(expected, logits)
    for _, gradient in outcomes(TotalVariation(), student, teacher):
        torch.testing.assert_close(gradient, slope)


def test_token_on_which_both_agree_has_the_sign_zero():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): s = (1, 0, -1) and E_p s = 1/4, worked out by hand."""
    expected = torch.tensor([[0.5 * 0.75, 0.25 * -0.25, 0.25 * -1.25]], dtype=torch.float64) / 2
    for _, gradient in outcomes(TotalVariation(), *logs([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])):
        torch.testing.assert_close(gradient, expected)


def test_gradient_does_not_shrink_as_the_student_comes_close():
    far, near = 1e-2, 1e-6
    student, teacher = draw_logits(scale=1.0)

    def norm(term, distance):
        return outcomes(term, teacher + distance * student, teacher)[0][1].norm()

    assert norm(TotalVariation(), near) == pytest.approx(norm(TotalVariation(), far).item(), rel=0.05)
    assert norm(JensenShannon(), near) < 1e-3 * norm(JensenShannon(), far)


def test_unlikely_tokens_hardly_matter():
    student, teacher = logs([0.5, 0.5 - 1e-6, 1e-6], [0.5, 0.5 - 1e-30, 1e-30])
    assert total_variation(student, teacher).item() == pytest.approx(1e-6, rel=1e-3)
