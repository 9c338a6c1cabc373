import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from helpers import closed_form, make_evidence
from stable_opd import ReverseKL, TeacherTopK

AUTHORS = torch.tensor([0, 0, 1, 0, 2, 0])


def draw_logits(seed=0, n=6, vocabulary=9, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64) * scale


def see(student, teacher, author=0):
    """Evidence from the logits of student and teacher, each (n, V)."""
    tokens = torch.arange(len(student)) % student.shape[1]
    return make_evidence(tokens, student.log_softmax(-1), teacher.log_softmax(-1), author=author)


def outcomes(term, student, teacher, author=0):
    """Loss and gradient in the logits, by autograd and in closed form."""
    student = student.clone().requires_grad_()
    by_autograd = term(see(student, teacher, author))
    (gradient,) = torch.autograd.grad(by_autograd.loss.sum(), student)
    with torch.no_grad():
        closed, in_logits = closed_form(term, see(student, teacher, author))
    return (by_autograd, gradient), (closed, in_logits)


def likeliest(teacher, k):
    """Which tokens have fewer than k that are likelier, (n, V)."""
    return (teacher[:, None, :] > teacher[:, :, None]).sum(-1) < k


def test_known_value():
    """The teacher prefers the outer tokens, on which p = (1/2, 1/4, 1/4) and q = (15, 10, 75)% are as written below."""
    student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.15, 0.1, 0.75]]).log()
    p, q = Categorical(torch.tensor([2 / 3, 1 / 3])), Categorical(torch.tensor([1 / 6, 5 / 6]))
    assert TeacherTopK(2)(see(student, teacher)).loss.item() == pytest.approx(kl_divergence(p, q).item(), rel=1e-6)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_equals_torch_distributions_renormalised_on_both_sides(k):
    student, teacher = draw_logits()
    inside = likeliest(teacher, k)
    assert inside.sum(-1).tolist() == [k] * 6
    p, q = (Categorical(probs=(each.softmax(-1) * inside)[inside].view(6, k)) for each in (student, teacher))
    for term, _ in outcomes(TeacherTopK(k), student, teacher, AUTHORS):
        torch.testing.assert_close(term.loss.detach(), kl_divergence(p, q))
        torch.testing.assert_close(term.value, kl_divergence(p, q))
        assert term.where.tolist() == (AUTHORS == 0).tolist()


def test_class_gives_a_gradient_to_the_loss_alone():
    student, teacher = draw_logits()
    term = TeacherTopK(3)(see(student.requires_grad_(), teacher))
    assert term.loss.requires_grad
    assert not term.value.requires_grad


@pytest.mark.parametrize("k", [9, 10, 1000])
def test_all_tokens_are_the_reverse_kl(k):
    student, teacher = draw_logits()
    for (found, gradient), (expected, slope) in zip(
        outcomes(TeacherTopK(k), student, teacher), outcomes(ReverseKL(), student, teacher), strict=True
    ):
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("k", [2, 5])
def test_gradient_lies_on_the_teachers_tokens_and_adds_up_to_nothing(k):
    student, teacher = draw_logits(2)
    for _, gradient in outcomes(TeacherTopK(k), student, teacher):
        assert gradient[~likeliest(teacher, k)].abs().max() < 1e-15
        assert (gradient[likeliest(teacher, k)] != 0).all()
        assert gradient.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("k", [2, 5, 9])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_closed_form_is_what_autograd_makes_of_the_logits(k, scale):
    (expected, slope), (found, gradient) = outcomes(TeacherTopK(k), *draw_logits(1, scale=scale))
    torch.testing.assert_close(found.loss, expected.loss.detach())
    torch.testing.assert_close(gradient, slope)


def test_against_finite_differences():
    student, teacher = draw_logits(n=3, vocabulary=6)
    assert torch.autograd.gradcheck(lambda x: TeacherTopK(3)(see(x, teacher)).loss, student.requires_grad_())


def test_zero_for_equal_distributions_and_wherever_the_ratios_agree():
    """The student is free to give the other tokens what it likes."""
    student, teacher = draw_logits()
    shifted = torch.where(likeliest(teacher, 3), teacher - 2.5, student)
    for logits in (teacher, shifted):
        for term, gradient in outcomes(TeacherTopK(3), logits, teacher):
            assert term.loss.abs().max() < 1e-12
            assert gradient.abs().max() < 1e-12
    assert (TeacherTopK(3)(see(student, teacher)).loss > 1e-4).all()


@pytest.mark.parametrize("k", [1, 0, -3])
def test_fewer_than_two_tokens_are_refused(k):
    with pytest.raises(ValueError, match=rf"Expected k of at least 2, but got {k}: on one token"):
        TeacherTopK(k)
