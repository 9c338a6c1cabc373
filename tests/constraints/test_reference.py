import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from helpers import make_evidence
from stable_opd import Author, Linear, ReferenceKL


def evidence(progress=0.0, author=Author.STUDENT, same=False):
    generator = torch.Generator().manual_seed(0)
    student, reference = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    student.requires_grad_()
    return make_evidence(
        torch.tensor([0, 1, 2, 3]),
        student,
        reference=student.detach() if same else reference,
        author=author,
        progress=progress,
    )


def test_loss_is_the_weighted_divergence_from_the_reference_and_the_value_is_unweighted():
    seen = evidence()
    term = ReferenceKL(weight=0.3)(seen)
    expected = kl_divergence(
        Categorical(logits=seen.student.logprobs.detach()), Categorical(logits=seen.reference.logprobs)
    )
    torch.testing.assert_close(term.loss.detach(), 0.3 * expected)
    torch.testing.assert_close(term.value, expected)
    assert not term.value.requires_grad


def test_reference_equal_to_the_student_gives_zero_loss_and_zero_gradient():
    seen = evidence(same=True)
    logits = seen.student.logprobs
    term = ReferenceKL(weight=0.3)(seen)
    assert term.loss.abs().max() == 0
    assert term.value.abs().max() == 0
    # d KL / d log p_v = p_v here, which is orthogonal to every change that keeps p normalised.
    (gradient,) = torch.autograd.grad(term.loss.sum(), logits)
    p = logits.detach().exp()
    torch.testing.assert_close(gradient - p * gradient.sum(-1, keepdim=True), torch.zeros_like(p), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 0.3), (0.5, 0.15), (1.0, 0.0)])
def test_schedule_multiplies_the_weight_and_not_the_value(progress, weight):
    term = ReferenceKL(0.3, Linear(1.0, 0.0))(evidence(progress))
    torch.testing.assert_close(term.loss.detach(), weight * term.value)
    assert (term.value > 0).all()


def test_speaks_about_the_students_tokens_only():
    where = ReferenceKL()(evidence(author=torch.tensor([0, 1, 2, 0]))).where
    assert where.tolist() == [True, False, False, True]


def test_declares_that_it_needs_the_reference_and_not_the_teacher():
    """Otherwise the initial student would not be kept, or a teacher would be asked for nothing."""
    assert ReferenceKL.needs_reference
    assert not ReferenceKL.needs_teacher
    assert ReferenceKL.support == "full"
