"""Tokens of others that are learnt by a divergence, against that divergence on the student's tokens."""

from dataclasses import replace

import pytest
import torch

from helpers import closed_form, make_evidence
from stable_opd import Author, Divergence, Linear, build, components
from stable_opd.divergences import ForwardKL, JensenShannon, ReverseKL, SampledReverseKL, TeacherTopK
from stable_opd.mixtures import (
    GKDMixture,
    GoldenMixture,
    PrefixMixture,
    ReplayMixture,
    TeacherMixture,
    WeightedMixture,
)
from streams import compare, draw_evidence, draw_states

MAKERS = {
    "golden": (GoldenMixture, Author.GOLDEN),
    "teacher": (TeacherMixture, Author.TEACHER),
    "gkd": (GKDMixture, Author.GOLDEN),
    "prefix": (PrefixMixture, Author.GOLDEN),
    "replay": (ReplayMixture, Author.PAST),
}
LOSSES = {"full": ForwardKL, "jensen-shannon": JensenShannon, "topk": lambda: TeacherTopK(k=3), "reverse": ReverseKL}
each_maker = pytest.mark.parametrize(("make", "author"), MAKERS.values(), ids=MAKERS)
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
V, N = 9, 12


def draw(author, seed=0):
    """Evidence of whose tokens every third is the author's, and the logits of the student."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=generator).requires_grad_()
    teacher = torch.randn(N, V, generator=generator).log_softmax(-1)
    authors = torch.tensor([int(author) if place % 3 else int(Author.STUDENT) for place in range(N)])
    tokens = torch.randint(V, (N,), generator=generator)
    behaviour = -2 - torch.rand(N, generator=generator)
    return logits, make_evidence(tokens, logits.log_softmax(-1), teacher, None, authors, behaviour, 0.25)


@each_maker
@each_loss
def test_loss_is_the_divergences_own_on_the_tokens_of_others(make, author, loss):
    logits, evidence = draw(author)
    term = make(weight=0.4, schedule=Linear(2.0, 0.0), loss=loss())(evidence)
    own = loss()(replace(evidence, author=torch.zeros_like(evidence.author)))
    weight = 0.4 * 1.5
    assert term.where.tolist() == (evidence.author == author).tolist()
    assert 0 < term.where.sum() < N
    torch.testing.assert_close(term.loss[term.where], weight * own.loss[term.where])
    torch.testing.assert_close(term.value[term.where], own.value[term.where])
    found, expected = (
        torch.autograd.grad(each.loss[term.where].sum(), logits, retain_graph=True) for each in (term, own)
    )
    torch.testing.assert_close(found[0], weight * expected[0])


@each_maker
@each_loss
def test_closed_form_is_autograd(make, author, loss):
    logits, evidence = draw(author)
    term = make(weight=0.4, schedule=Linear(2.0, 0.0), loss=loss())
    expected = term(evidence)
    detached = replace(evidence, student=make_evidence(evidence.tokens, logits.detach().log_softmax(-1)).student)
    found, gradient = closed_form(term, detached)
    torch.testing.assert_close(found.loss, expected.loss.detach())
    torch.testing.assert_close(found.value, expected.value)
    assert found.where.tolist() == expected.where.tolist()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.loss.sum(), logits)[0], rtol=1e-4, atol=1e-6)


@each_maker
@each_loss
def test_streamed_loss_is_the_plain_one(make, author, loss):
    evidence, shares = draw_evidence()
    authors = torch.tensor([int(author) if place % 3 else 0 for place in range(len(evidence.tokens))])
    evidence = replace(evidence, author=authors)
    compare({"mixture": make(weight=0.4, loss=loss())}, evidence, shares, draw_states(3))


@each_maker
def test_without_a_loss_tokens_of_the_author_alone_are_learnt(make, author):
    _, evidence = draw(author)
    for other in Author:
        authors = torch.full_like(evidence.author, int(other))
        where = make()(replace(evidence, author=authors)).where
        assert where.tolist() == [other == author] * N


def test_what_is_seen_follows_from_the_loss():
    plain, learnt, top = GoldenMixture(), GoldenMixture(loss=ForwardKL()), TeacherMixture(loss=TeacherTopK(k=3))
    assert (plain.support, plain.needs_teacher, plain.positionwise) == ("sampled", False, True)
    assert (learnt.support, learnt.needs_teacher, top.support) == ("full", True, "topk")
    assert GKDMixture().needs_teacher
    assert ReplayMixture().needs_teacher
    assert not ReplayMixture(loss=SampledReverseKL(discount=0.9)).positionwise


class _Gated(Divergence):
    """Reads the whole vocabulary, and still estimates from the written token."""

    support = "full"

    def __init__(self):
        super().__init__()
        self.sampled = SampledReverseKL()

    def forward(self, evidence):
        return self.sampled(evidence)


@pytest.mark.parametrize("make", [GoldenMixture, TeacherMixture, GKDMixture, PrefixMixture])
@pytest.mark.parametrize("loss", [SampledReverseKL(), _Gated()], ids=["sampled", "within another"])
def test_estimate_from_drawn_tokens_is_refused_where_none_were_drawn(make, loss):
    with pytest.raises(ValueError, match=rf"loss of {make.__name__}, but got {type(loss).__name__}, .*ForwardKL"):
        make(loss=loss)
    assert ReplayMixture(loss=loss).loss is loss


@pytest.mark.parametrize("name", components("divergence"))
def test_only_losses_that_do_not_depend_on_what_was_written_are_accepted(name):
    """Whatever is registered: a divergence that is accepted gives the same loss for any other token."""
    loss = build("divergence", name)
    try:
        GoldenMixture(loss=loss)
    except ValueError:
        return
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(N, V, generator=generator).log_softmax(-1) for _ in range(3)]
    tokens = torch.randint(V, (N,), generator=generator)
    first, second = (loss(make_evidence(each, *scores)).loss for each in (tokens, (tokens + 1) % V))
    torch.testing.assert_close(first, second)


def test_baseline_makes_no_divergence_of_the_vocabulary():
    loss = SampledReverseKL()
    loss.support = "full"  # as it is with a baseline
    with pytest.raises(ValueError, match="estimated from tokens"):
        GoldenMixture(loss=loss)


def test_mixture_that_names_no_authors_is_told_so():
    class Forgetful(WeightedMixture):
        """Says nothing of whose tokens it is about."""

        def plan(self, prompts, samples, progress, step):
            raise NotImplementedError

    _, evidence = draw(Author.GOLDEN)
    with pytest.raises(ValueError, match=r"Declare authors = \(Author\.GOLDEN,\)"):
        Forgetful()(evidence)
