"""What a term says of its gradient in closed form, against autograd and finite differences in float64."""

import copy
import inspect

import pytest
import torch

from helpers import closed_form, make_evidence
from stable_opd import Author, Divergence, TokenLoss, build, components
from stable_opd.terms import LossTerm
from streams import TERMS, N, author_of, draw_evidence, draw_states, leaves_of, make, stream

CLOSED = [(kind, name) for kind, name in TERMS if components(kind)[name].closed_form is not LossTerm.closed_form]
each_closed_form = pytest.mark.parametrize(("kind", "name"), CLOSED, ids=[name for _, name in CLOSED])


def speaking(kind, name):
    """A term whose gradient is known in closed form; that of a mixture is its divergence's."""
    return (
        make(kind, name, loss=build("divergence", "ReverseKL"))
        if "loss" in parameters(kind, name)
        else make(kind, name)
    )


def parameters(kind, name):
    return inspect.signature(components(kind)[name]).parameters


def draw_logits(seed, scale=2.0, count=6, vocabulary=41):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, count, vocabulary, generator=generator, dtype=torch.float64)


def seen(logits, author=Author.STUDENT, progress=0.5):
    """Evidence on positions from the logits of student, teacher and reference, each (n, V)."""
    tokens = torch.arange(len(logits[0])) % logits[0].shape[1]
    return make_evidence(tokens, *(each.log_softmax(-1) for each in logits), author=author, progress=progress)


def generic(term):
    """The same term, without its closed form."""
    other = copy.deepcopy(term)
    other.closed_form = lambda evidence, out: None
    return other


def test_terms_over_the_whole_vocabulary_have_closed_forms():
    """Otherwise the tests of this file would look at nothing."""
    assert {"ReverseKL", "ReferenceKL"} <= {name for _, name in CLOSED}


@each_closed_form
@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, 20.0])
def test_closed_form_agrees_with_forward_and_its_autograd(kind, name, scale):
    term, (student, teacher, reference) = speaking(kind, name), draw_logits(0, scale)
    author = torch.tensor([int(Author.STUDENT), int(author_of(term)) or int(Author.GOLDEN)]).repeat(3)
    student.requires_grad_()
    expected = term(seen((student, teacher, reference), author))
    (gradient,) = torch.autograd.grad(expected.loss.sum(), student)
    with torch.no_grad():
        found, in_logits = closed_form(term, seen((student, teacher, reference), author))
    torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=1e-12)
    assert found.where.tolist() == expected.where.tolist()
    torch.testing.assert_close(in_logits, gradient, rtol=1e-9, atol=1e-12)


@each_closed_form
def test_closed_form_is_the_slope_of_forward_by_finite_differences(kind, name):
    term, (student, teacher, reference) = speaking(kind, name), draw_logits(1, count=3)
    author = author_of(term)
    with torch.no_grad():
        _, in_logits = closed_form(term, seen((student, teacher, reference), author))
    step, slopes = 1e-6, torch.zeros_like(student)
    for token in range(student.shape[1]):
        shift = step * torch.eye(student.shape[1], dtype=torch.float64)[token]
        up, down = (term(seen((student + sign * shift, teacher, reference), author)).loss for sign in (1, -1))
        slopes[:, token] = (up - down) / (2 * step)
    assert slopes.norm() > 1e-3
    torch.testing.assert_close(in_logits, slopes, rtol=1e-5, atol=1e-8)


@each_closed_form
def test_gradient_in_closed_form_lies_in_memory_of_its_own(kind, name):
    """It is scaled in place, and other terms read the same scores."""
    term, logits = speaking(kind, name), draw_logits(2)
    evidence, untouched = seen(logits), seen(logits)
    _, in_logits = closed_form(term, evidence)
    in_logits.fill_(float("nan"))
    for model in ("student", "teacher", "reference"):
        ours, before = getattr(evidence, model), getattr(untouched, model)
        for found, expected in ((ours.logprobs, before.logprobs), (ours.probs, before.probs)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_closed_form
@pytest.mark.parametrize("train_head", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no softcap", "softcap"])
def test_streamed_loss_is_the_same_by_autograd(kind, name, train_head, softcap, tile):
    """Nothing but rounding says which way was taken, whatever head the student has."""
    term, outcomes = speaking(kind, name), []
    evidence, shares = draw_evidence(author_of(term))
    for each in (term, generic(term)):
        student, leaves = leaves_of(draw_states(0, bias=True, softcap=softcap), train_head)
        result = stream({"term": each}, evidence, shares, student, draw_states(1), draw_states(2))
        result.loss.backward()
        outcomes.append([result.loss.detach(), result.values["term"], *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*outcomes, strict=True):
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_closed_form_does_not_matter_where_the_term_does_not_speak(tile):
    class Picky(Divergence):
        """Cross-entropy with token 3 at every third position, and large numbers elsewhere."""

        support = "full"

        def forward(self, evidence):
            raise NotImplementedError

        def closed_form(self, evidence, out):
            where = evidence.position % 3 == 0
            loss = (-evidence.student.logprobs[:, 3]).where(where, 1e6)
            out.copy_(evidence.student.probs)
            out[:, 3] -= 1
            out[~where] = 1e6
            return TokenLoss(loss, loss, where)

    evidence, shares = draw_evidence()
    student, leaves = leaves_of(draw_states(0))
    plain, plain_leaves = leaves_of(draw_states(0))
    result = stream({"term": Picky()}, evidence, shares, student, draw_states(1))
    result.loss.backward()
    spoken = torch.arange(N) % 3 == 0
    expected = -(shares * (plain.states @ plain.head.weight.T).log_softmax(-1)[:, 3])[spoken].sum()
    expected.backward()
    torch.testing.assert_close(result.loss, expected.detach())
    torch.testing.assert_close(result.values["term"], expected.detach())
    for leaf, plain_leaf in zip(leaves, plain_leaves, strict=True):
        torch.testing.assert_close(leaf.grad, plain_leaf.grad, rtol=1e-4, atol=1e-6)
