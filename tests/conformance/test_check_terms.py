"""Each check of a loss term finds what it is there for: a term that is wrong in one way fails it."""

import re

import pytest
import torch

from conformance.wrong import fails, failures, own, surprise, term
from stable_opd import (
    Constraint,
    ReverseKL,
    TokenLoss,
)
from stable_opd.testing import check_component


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda e: TokenLoss(surprise(e).mean(), surprise(e).detach(), own(e)), r"`loss` .* got \(\)"),
        (lambda e: TokenLoss(surprise(e), surprise(e).detach()[:1], own(e)), r"`value` .* got \(1,\)"),
        (lambda e: TokenLoss(surprise(e), surprise(e).detach(), own(e).float()), "`where` to be bool"),
        (lambda e: TokenLoss(surprise(e), surprise(e), own(e)), "`value` without a gradient"),
        (lambda e: surprise(e), "Expected a TokenLoss"),
        (lambda e: TokenLoss(surprise(e) / 0, surprise(e).detach(), own(e)), "finite `loss`"),
        (lambda e: TokenLoss(surprise(e) / len(e.tokens[e.tokens.argmax() :]), surprise(e).detach(), own(e)), "argmax"),
    ],
    ids=["mean", "value of another shape", "float mask", "value with a graph", "tensor", "infinite", "no positions"],
)
def test_shapes(found, match):
    assert re.search(match, failures(term(found))["shapes"])


@pytest.mark.parametrize(
    ("reads", "declared", "match"),
    [
        (lambda e: e.teacher.logprobs, {}, 'support = "full"'),
        (lambda e: e.student.logprobs, {"positionwise": True}, 'support = "full"'),
        (lambda e: e.reference.sampled, {}, "needs_reference = True"),
        (lambda e: e.teacher.logprobs, {"support": "topk"}, 'support of "topk"'),
        (lambda e: e.teacher.probs, {"support": "topk"}, 'support of "topk"'),
        (lambda e: e.teacher.sampled, {"needs_teacher": False}, "needs_teacher = True"),
    ],
)
def test_reading_what_was_not_declared(reads, declared, match):
    def found(evidence):
        reads(evidence)
        return TokenLoss(-evidence.student.sampled, -evidence.student.sampled.detach(), own(evidence))

    assert re.search(match, failures(term(found, Constraint, **{"needs_teacher": True} | declared))["shapes"])


def test_a_top_k_term_may_read_the_top():
    def found(evidence):
        tokens, teacher = evidence.teacher.top(4)
        loss = (evidence.student.logprobs.gather(-1, tokens) - teacher).square().sum(-1) + surprise(evidence)
        return TokenLoss(loss, loss.detach(), own(evidence))

    check_component(term(found, support="topk"))


def test_gradient():
    def detached(evidence):
        return TokenLoss(surprise(evidence).detach(), surprise(evidence).detach(), own(evidence))

    fails(term(detached), "gradient", "but got one without")

    def into_the_teacher(evidence):
        teacher = evidence.teacher.sampled
        loss = (evidence.student.sampled - (teacher if teacher.requires_grad else teacher.requires_grad_())).square()
        return TokenLoss(loss, loss.detach(), own(evidence))

    fails(term(into_the_teacher), "gradient", r"one in `teacher\.sampled`")

    def in_place(evidence):
        gap = evidence.teacher.sampled.sub_(evidence.student.sampled.detach())
        loss = -gap * (evidence.student.sampled - evidence.behaviour_logprobs).clamp(max=9).exp()
        return TokenLoss(loss, -gap.clone(), own(evidence))

    assert "another `teacher.sampled`" in failures(term(in_place))["gradient"]


def cumulative(evidence):
    """Follows each row from token to token."""
    gap = surprise(evidence)
    before = gap.cumsum(0) - gap
    first = torch.searchsorted(evidence.row, evidence.row)
    return before - before[first] + gap


def test_rows():
    def normalised(evidence):
        loss = surprise(evidence) / (1 + surprise(evidence).detach().sum())
        return TokenLoss(loss, surprise(evidence).detach(), own(evidence))

    fails(term(normalised), "rows", "cut by memory")


@pytest.mark.parametrize("declared", [{"support": "full"}, {"positionwise": True}], ids=["full", "positionwise"])
def test_tiles(declared):
    def found(evidence):
        return TokenLoss(cumulative(evidence), cumulative(evidence).detach(), own(evidence))

    check_component(term(found))
    fails(term(found, **declared), "tiles", "tiles of 1 positions.*positionwise = False")


@pytest.mark.parametrize("wrong", ["loss", "value", "gradient", "where", "rest"])
def test_closed_form(wrong):
    class Wrong(ReverseKL):
        def closed_form(self, evidence, out):
            found = super().closed_form(evidence, out)
            if wrong == "gradient":
                out.mul_(1.001)
            elif wrong == "rest":
                out[~found.where] = torch.nan
            else:
                field = getattr(found, wrong)
                found = found._replace(**{wrong: ~field if field.dtype == torch.bool else field * 1.001})
            return found

    assert re.search("finite" if wrong == "rest" else f"another {wrong}", failures(Wrong)["closed form"])


@pytest.mark.parametrize(
    "found",
    [lambda e: -(e.student.sampled.exp()).log() + e.teacher.sampled.exp().log(), lambda e: (surprise(e)).exp() - 1],
    ids=["logarithm of a probability", "exponential"],
)
def test_extremes(found):
    def forward(evidence):
        return TokenLoss(found(evidence), found(evidence).detach(), own(evidence))

    wrong = failures(term(forward, Constraint, needs_teacher=True))
    assert "logits of +-1e4" in wrong["extremes"]


def test_rounding():
    def found(evidence):
        value = (99 * evidence.student.sampled.detach()).sin()
        return TokenLoss(surprise(evidence), 9 * value, own(evidence))

    fails(term(found, Constraint, needs_teacher=True), "rounding", "rounded to bfloat16")


def test_agreement():
    def with_entropy(evidence):
        p, q = evidence.student.logprobs, evidence.teacher.logprobs
        loss = (p.exp() * (0.9 * p - q)).sum(-1)
        value = (p.exp() * (p - q)).sum(-1).detach()
        return TokenLoss(loss, value, own(evidence))

    fails(term(with_entropy, support="full"), "agreement", "no gradient on average")
    check_component(term(with_entropy, support="full"), skip=["agreement"])

    def shifted(evidence):
        return TokenLoss(surprise(evidence) + 1, surprise(evidence).detach() + 1, own(evidence))

    fails(term(shifted), "agreement", "value of 0")
