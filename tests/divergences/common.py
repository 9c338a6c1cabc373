"""What the tests of divergences share: logits, evidence, and the checks that each of them has to pass."""

from functools import partial

import pytest
import torch

from helpers import closed_form, make_evidence
from stable_opd import Scores

AUTHORS = torch.tensor([0, 0, 1, 0, 2, 0])
MINUS_INFINITY = -float("inf")


def draw_logits(seed=0, n=6, vocabulary=9, scale=3.0):
    """Logits of student and teacher, (2, n, V) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64) * scale


def see(student, teacher, author=0, behaviour=None):
    """Evidence from the logits of student and teacher, each (n, V); the tokens are 0, 1, 2, ..."""
    tokens = torch.arange(len(student)) % student.shape[1]
    return make_evidence(tokens, student.log_softmax(-1), teacher.log_softmax(-1), author=author, behaviour=behaviour)


def outcomes(term, student, teacher, author=0):
    """Loss and gradient in the logits, by autograd and in closed form."""
    student = student.clone().requires_grad_()
    by_autograd = term(see(student, teacher, author))
    (gradient,) = torch.autograd.grad(by_autograd.loss.sum(), student)
    with torch.no_grad():
        closed, in_logits = closed_form(term, see(student, teacher, author))
    return (by_autograd, gradient), (closed, in_logits)


def logs(*rows):
    """Log-probs from probabilities, (1, V) float64 each."""
    return [torch.tensor([row], dtype=torch.float64).log() for row in rows]


def likeliest(logits, k):
    """Which tokens have fewer than k that are likelier, (n, V)."""
    return (logits[:, None, :] > logits[:, :, None]).sum(-1) < k


def assert_same(found, expected, **tolerance):
    """Two results of `outcomes`: values and gradients agree, whichever way they were computed."""
    for (term, gradient), (other, slope) in zip(found, expected, strict=True):
        torch.testing.assert_close(term.value, other.value, **tolerance)
        torch.testing.assert_close(gradient, slope, **tolerance)


class TopOnly(Scores):
    """A teacher that tells its likeliest tokens and keeps the others to itself."""

    def __init__(self, logits, most):
        super().__init__()
        self.everything, self.most = logits.log_softmax(-1), most

    def top(self, k):
        assert k <= self.most
        logprobs, tokens = self.everything.topk(k, -1)
        return tokens, logprobs


def assert_reads_the_top_alone(term):
    """What a term with ``support = "topk"`` may read of the teacher."""
    assert term.support == "topk"
    student, teacher = draw_logits(7)
    evidence = see(student, teacher)
    expected = term(evidence).loss
    object.__setattr__(evidence, "teacher", TopOnly(teacher, term.k))
    torch.testing.assert_close(term(evidence).loss, expected)
    torch.testing.assert_close(closed_form(term, evidence)[0].loss, expected)


def nothing_where_student_and_teacher_agree(term):
    logits, _ = draw_logits()
    for found, gradient in outcomes(term, logits, logits):
        assert found.value.abs().max() < 1e-13
        assert gradient.abs().max() < 1e-13


def closed_form_is_autograd(term, scale):
    student, teacher = draw_logits(1, scale=scale)
    (expected, slope), (found, gradient) = outcomes(term, student, teacher, AUTHORS)
    torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)
    assert gradient.sum(-1).abs().max() < 1e-12
    assert found.where.tolist() == expected.where.tolist() == (AUTHORS == 0).tolist()


def gradient_is_the_slope(term):
    student, teacher = draw_logits(n=4, vocabulary=6)
    assert torch.autograd.gradcheck(lambda x: term(see(x, teacher)).loss, student.requires_grad_())


def gradient_goes_to_the_loss_alone(term):
    student, teacher = draw_logits()
    found = term(see(student.requires_grad_(), teacher))
    assert found.loss.requires_grad
    assert not found.value.requires_grad


def finite_at_extremes(term, dtype):
    """Up to 1e4 apart, and as good as certain: of the same token, of different ones, or one side alone."""
    student, teacher = draw_logits(3, scale=1e4)
    one_hot = 1e4 * torch.eye(6, 9, dtype=torch.float64)
    pairs = [(student, teacher), (-1e4 * one_hot.sign(), one_hot), (one_hot, one_hot), (one_hot, one_hot.roll(1, 1))]
    pairs += [(one_hot, teacher / 1e4), (student / 1e4, one_hot), (one_hot / 300, one_hot.roll(1, 1) / 300)]
    for ours, theirs in pairs:
        for found, gradient in outcomes(term, ours.to(dtype), theirs.to(dtype)):
            assert found.loss.isfinite().all()
            assert found.value.isfinite().all()
            assert gradient.isfinite().all()


def bfloat16_within_its_tolerance(term):
    """Rounding the log-probs to 8 bits changes the value by at most 3% of it, or 0.03."""
    student, teacher = (logits.log_softmax(-1) for logits in draw_logits(4, scale=1.0))
    tokens = torch.arange(6)
    exact = term(make_evidence(tokens, student, teacher)).value
    rounded = term(make_evidence(tokens, *(each.bfloat16().double() for each in (student, teacher)))).value
    assert (rounded - exact).abs().max() > 0
    assert ((rounded - exact).abs() <= 0.03 * (1 + exact.abs())).all()


CHECKS = {
    "nothing where both agree": nothing_where_student_and_teacher_agree,
    "gradcheck": gradient_is_the_slope,
    "value has no gradient": gradient_goes_to_the_loss_alone,
    "bfloat16": bfloat16_within_its_tolerance,
}
CHECKS |= {f"closed form at {scale}": partial(closed_form_is_autograd, scale=scale) for scale in (0.0, 0.3, 3.0, 30.0)}
CHECKS |= {f"finite in {dtype}": partial(finite_at_extremes, dtype=dtype) for dtype in (torch.float32, torch.float64)}
each_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
