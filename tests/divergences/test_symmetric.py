import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import draw_logits, each_check, logs, outcomes
from stable_opd import ForwardKL, ReverseKL
from stable_opd.divergences.symmetric import SymmetricKL, symmetric_kl


@each_check
def test_contract(check):
    check(SymmetricKL())


def test_known_value():
    """p = (1/2, 1/2), q = (1/4, 3/4): 1/2 (1/4 log 2 - 1/4 log 2/3) = 1/8 log 3."""
    assert symmetric_kl(*logs([0.5, 0.5], [0.25, 0.75])).item() == pytest.approx(math.log(3) / 8)


def test_equals_torch_distributions_in_both_directions():
    student, teacher = draw_logits()
    p, q = Categorical(logits=student), Categorical(logits=teacher)
    for found, _ in outcomes(SymmetricKL(), student, teacher):
        torch.testing.assert_close(found.loss.detach(), (kl_divergence(p, q) + kl_divergence(q, p)) / 2)


def test_symmetric_and_at_least_half_of_the_larger_side():
    student, teacher = draw_logits().log_softmax(-1)
    found = symmetric_kl(student, teacher)
    torch.testing.assert_close(found, symmetric_kl(teacher, student))
    product = ((student.exp() - teacher.exp()) * (student - teacher)).sum(-1) / 2
    torch.testing.assert_close(found, product)
    p, q = Categorical(logits=student), Categorical(logits=teacher)
    assert (found >= torch.maximum(kl_divergence(p, q), kl_divergence(q, p)) / 2).all()


def test_teaches_what_the_student_gives_nothing_and_takes_back_what_the_teacher_gives_nothing():
    """Each half alone is all but blind to one of the two."""
    unknown, (half,) = logs([1e-9, 1 - 1e-9], [0.5, 0.5])[0], logs([0.5, 0.5])
    for _, gradient in outcomes(SymmetricKL(), unknown, half):
        assert gradient[0, 0] < -0.2
    for _, gradient in outcomes(ReverseKL(), unknown, half):
        assert gradient[0, 0].abs() < 1e-7
    for (_, gradient), (_, forward) in zip(
        outcomes(SymmetricKL(), half, unknown), outcomes(ForwardKL(), half, unknown), strict=True
    ):
        assert gradient[0, 0] > 5 * forward[0, 0] > 0
