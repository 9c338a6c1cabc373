import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import (
    AUTHORS,
    assert_reads_the_top_alone,
    assert_same,
    draw_logits,
    each_check,
    likeliest,
    logs,
    outcomes,
    see,
)
from stable_opd import ForwardKL, ReverseKL, TeacherTopK
from stable_opd.divergences.top_k import TeacherTopKForwardKL

each_class = pytest.mark.parametrize(
    ("restricted", "whole"),
    [(TeacherTopK, ReverseKL), (TeacherTopKForwardKL, ForwardKL)],
    ids=["reverse", "forward"],
)


@each_check
@pytest.mark.parametrize("k", [2, 5, 32])
@each_class
def test_contract(check, restricted, whole, k):
    check(restricted(k))


def test_known_values():
    """The teacher prefers the outer tokens, on which p = (1/2, 1/4, 1/4) and q = (15, 10, 75)% are as written below."""
    seen = see(*logs([0.5, 0.25, 0.25], [0.15, 0.1, 0.75]))
    p, q = Categorical(torch.tensor([2 / 3, 1 / 3])), Categorical(torch.tensor([1 / 6, 5 / 6]))
    assert TeacherTopK(2)(seen).loss.item() == pytest.approx(kl_divergence(p, q).item(), rel=1e-6)
    assert TeacherTopKForwardKL(2)(seen).loss.item() == pytest.approx(kl_divergence(q, p).item(), rel=1e-6)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_equal_torch_distributions_renormalised_on_both_sides(k):
    student, teacher = draw_logits()
    inside = likeliest(teacher, k)
    assert inside.sum(-1).tolist() == [k] * 6
    p, q = (Categorical(probs=(each.softmax(-1) * inside)[inside].view(6, k)) for each in (student, teacher))
    for term, expected in ((TeacherTopK(k), kl_divergence(p, q)), (TeacherTopKForwardKL(k), kl_divergence(q, p))):
        for found, _ in outcomes(term, student, teacher, AUTHORS):
            torch.testing.assert_close(found.loss.detach(), expected)
            torch.testing.assert_close(found.value, expected)


@pytest.mark.parametrize("k", [9, 10, 1000])
@each_class
def test_all_tokens_are_the_divergence_over_the_vocabulary(restricted, whole, k):
    student, teacher = draw_logits()
    assert_same(outcomes(restricted(k), student, teacher), outcomes(whole(), student, teacher))


@pytest.mark.parametrize("k", [2, 5])
@each_class
def test_gradient_lies_on_the_teachers_tokens(restricted, whole, k):
    student, teacher = draw_logits(2)
    for _, gradient in outcomes(restricted(k), student, teacher):
        assert gradient[~likeliest(teacher, k)].abs().max() < 1e-15
        assert (gradient[likeliest(teacher, k)] != 0).all()


@each_class
def test_zero_wherever_the_ratios_agree(restricted, whole):
    """The student is free to give the other tokens what it likes."""
    student, teacher = draw_logits()
    shifted = torch.where(likeliest(teacher, 3), teacher - 2.5, student)
    for term, gradient in outcomes(restricted(3), shifted, teacher):
        assert term.loss.abs().max() < 1e-12
        assert gradient.abs().max() < 1e-12
    assert (restricted(3)(see(student, teacher)).loss > 1e-4).all()


@each_class
def test_reads_the_top_alone(restricted, whole):
    assert_reads_the_top_alone(restricted(4))


@pytest.mark.parametrize("k", [1, 0, -3])
@each_class
def test_fewer_than_two_tokens_are_refused(restricted, whole, k):
    with pytest.raises(ValueError, match=rf"Expected k of at least 2, but got {k}: on one token"):
        restricted(k)
