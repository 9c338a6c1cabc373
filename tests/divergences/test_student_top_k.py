import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import assert_same, draw_logits, each_check, likeliest, logs, outcomes, see
from stable_opd import ReverseKL, TeacherTopK
from stable_opd.divergences.student_top_k import StudentTopK, student_top_k_kl


@each_check
@pytest.mark.parametrize("k", [3, 16])
def test_contract(check, k):
    check(StudentTopK(k))


def test_known_value():
    """The student prefers the first two tokens, on which q is (1/6, 5/6)."""
    student, teacher = logs([0.5, 0.3, 0.2], [0.1, 0.5, 0.4])
    p, q = Categorical(torch.tensor([5 / 8, 3 / 8])), Categorical(torch.tensor([1 / 6, 5 / 6]))
    assert student_top_k_kl(student, teacher, 2).item() == pytest.approx(kl_divergence(p, q).item(), rel=1e-6)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_equals_torch_distributions_renormalised_on_both_sides(k):
    student, teacher = draw_logits()
    inside = likeliest(student, k)
    p, q = (Categorical(probs=(each.softmax(-1) * inside)[inside].view(6, k)) for each in (student, teacher))
    for term, gradient in outcomes(StudentTopK(k), student, teacher):
        torch.testing.assert_close(term.loss.detach(), kl_divergence(p, q))
        assert gradient[~inside].abs().max() < 1e-15
        assert (gradient[inside] != 0).all()


def test_all_tokens_are_the_reverse_kl():
    student, teacher = draw_logits()
    for k in (9, 1000):
        assert_same(outcomes(StudentTopK(k), student, teacher), outcomes(ReverseKL(), student, teacher))


def test_token_that_only_the_teacher_likes_is_never_learnt():
    student, teacher = logs([0.5, 0.4, 0.1 - 1e-6, 1e-6], [0.05, 0.04, 0.01, 0.9])
    for term, gradient in outcomes(StudentTopK(3), student, teacher):
        assert term.loss.abs().max() < 1e-4
        assert gradient[0, 3].abs() < 1e-15
    assert TeacherTopK(3)(see(student, teacher)).loss > 1


@pytest.mark.parametrize("k", [1, 0, -3])
def test_fewer_than_two_tokens_are_refused(k):
    with pytest.raises(ValueError, match=rf"Expected k of at least 2, but got {k}: on one token"):
        StudentTopK(k)
