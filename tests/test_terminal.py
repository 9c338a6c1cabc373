"""Terminal policies against the same computation on a vocabulary in which the stop tokens really are one."""

from dataclasses import replace

import pytest
import torch

from helpers import EOS, TOKENIZER, VOCABULARY, make_evidence
from stable_opd import build
from stable_opd.constraints import StopReferenceKL
from stable_opd.divergences import ReverseKL, SampledReverseKL
from stable_opd.samplers.base import draw
from stable_opd.streaming import Part, streamed_loss
from stable_opd.terminal import (
    NEGLIGIBLE,
    Baseline,
    Canonical,
    SemanticClass,
    StopEvent,
    StopRule,
    TeacherMap,
    TerminalIds,
    TwoStop,
)
from stable_opd.types import Scores
from streams import TERMS, N, author_of, draw_evidence, draw_states, leaves_of, make
from streams import VOCABULARY as STREAMED

IDS = TerminalIds(student=(3,), teacher=(3, 17, 0), own=3)
POLICIES = (SemanticClass(), Canonical(), TeacherMap(), TwoStop(), Baseline())
NAMES = [type(policy).__name__ for policy in POLICIES]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Baseline(), StopRule((3,))),
        (TwoStop(), StopRule((3, 5))),
        (SemanticClass(), StopRule((3, 5), StopEvent(3, (5,)), StopEvent(3, (5,)))),
        (TeacherMap(), StopRule((3,), None, StopEvent(3, (5,), rest=NEGLIGIBLE))),
        (Canonical(), StopRule((3,), StopEvent(3, (5,), adds=False), StopEvent(3, (5,)))),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_a_policy_does_with_two_ids(policy, expected):
    assert policy.rule(TerminalIds((3,), (5,), 3)) == expected


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_one_stop_token_for_both_costs_nothing(policy):
    assert policy.rule(TerminalIds((3,), (3,), 3)) == StopRule((3,))


def test_same_ids_of_which_they_may_prefer_different_ones_are_one_class():
    both = StopEvent(1, (4,))
    assert SemanticClass().rule(TerminalIds((1, 4), (4, 1), 1)) == StopRule((1, 4), both, both)
    assert Canonical().rule(TerminalIds((1, 4), (4, 1), 1)) == StopRule((1, 4))


def test_ids_are_those_of_the_shared_vocabulary():
    found = TerminalIds.of([4, EOS], (9, VOCABULARY + 3), TOKENIZER)
    assert found == TerminalIds((4, EOS), (9,), EOS)
    assert (found.foreign, found.union) == ((9,), (4, EOS, 9))
    assert TerminalIds.of([4, EOS], None, TOKENIZER).union == (4, EOS)


# The event by itself, in float64.


def logits_of(seed, count=6):
    return 2 * torch.randn(count, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EVENTS = {"added": StopEvent(3, (5, 0)), "ruled out": StopEvent(3, (5, 0), adds=False)}
ALIVE = [1, 2, 3, 4, 6, 7, 8]


def by_hand(name, logits):
    """Probabilities, (n, V), written out; 0 for what does not occur."""
    p = logits.exp()
    if name == "added":
        p = p.clone()
        p[:, 3] = p[:, 3] + p[:, 5] + p[:, 0]
    found = torch.zeros_like(p)
    found[:, ALIVE] = p[:, ALIVE] / p[:, ALIVE].sum(-1, keepdim=True)
    return found


@pytest.mark.parametrize("name", EVENTS)
def test_event_is_scored_and_drawn_with_the_probability_of_its_ids(name):
    logits = logits_of(0)
    before, expected = logits.clone(), by_hand(name, logits)
    torch.testing.assert_close(EVENTS[name].merged(logits).softmax(-1), expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(logits, before)
    read = EVENTS[name].read_(logits.log_softmax(-1))
    torch.testing.assert_close(read.exp(), expected, rtol=1e-12, atol=1e-15)
    assert read.isfinite().all()


@pytest.mark.parametrize("name", EVENTS)
def test_gradient_spreads_as_finite_differences_say(name):
    """Of an arbitrary function of the log-probs that can occur."""
    event, slopes = EVENTS[name], torch.sin(torch.arange(7, dtype=torch.float64))

    def loss(logits):
        logprobs = by_hand(name, logits)[:, ALIVE].log()
        return (logprobs.exp() * logprobs * slopes).sum(-1)

    logits = logits_of(1)
    probs = by_hand(name, logits).requires_grad_()
    logprobs = probs[:, ALIVE].log()
    in_probs = torch.autograd.grad((logprobs.exp() * logprobs * slopes).sum(), probs)[0].detach()
    in_logprobs, p = in_probs * probs.detach(), probs.detach()
    gradient = in_logprobs - p * in_logprobs.sum(-1, keepdim=True)
    spread = event.spread_(gradient, event.within(logits))
    for token in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[token] = 1e-5
        expected = (loss(logits + step) - loss(logits - step)) / 2e-5
        torch.testing.assert_close(spread[:, token], expected, rtol=1e-7, atol=1e-9)


def test_teacher_map_moves_the_mass_and_leaves_a_remainder():
    logprobs = logits_of(2).log_softmax(-1)
    event = TeacherMap().rule(TerminalIds((3,), (5,), 3)).teacher
    read = event.read_(logprobs.clone())
    torch.testing.assert_close(read[:, 3].exp(), logprobs[:, [3, 5]].exp().sum(-1))
    torch.testing.assert_close(read[:, 5].exp(), torch.full((6,), 1e-12, dtype=torch.float64))
    rest = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(read[:, rest], logprobs[:, rest])


def test_event_is_drawn_as_often_as_its_ids():
    """The same uniform numbers, evenly spread: the shares are the probabilities."""
    logits = logits_of(3, 1)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn, logprobs = draw(EVENTS["added"].merged(logits).expand(20_000, 9), uniform)
    expected = logits.softmax(-1)[0, [3, 5, 0]].sum()
    assert (drawn == 3).double().mean().item() == pytest.approx(expected.item(), abs=1e-4)
    torch.testing.assert_close(logprobs[drawn == 3].double(), expected.log().expand(int((drawn == 3).sum())))


# Every term, streamed with an event, against the same term on a smaller vocabulary.

REST = [token for token in range(STREAMED) if token not in (17, 0)]


def smaller(model, adds):
    """Log-probs over the vocabulary without the other ids, (n, V - 2), by operations that autograd knows."""
    logits = model.states @ model.head.weight.T + (0 if model.head.bias is None else model.head.bias)
    if model.head.softcap:
        logits = model.head.softcap * (logits / model.head.softcap).tanh()
    merged = logits[:, [3, 17, 0]].logsumexp(-1) if adds else logits[:, 3]
    return torch.stack([merged if token == 3 else logits[:, token] for token in REST], -1).log_softmax(-1)


def evidence_of(term):
    """Positions whose tokens can occur; a third of them end a row."""
    evidence, shares = draw_evidence(author_of(term))
    tokens = torch.where(torch.arange(N) % 3 == 0, 3, evidence.tokens)
    tokens = torch.where((tokens == 17) | (tokens == 0), 3, tokens)
    return replace(evidence, tokens=tokens, stop=(3, 17, 0)), shares


def compare_with_smaller(term, policy, bias=True, softcap=None):
    """Hold loss, value and gradients of a term against those on the smaller vocabulary."""
    rule, (evidence, shares) = policy.rule(IDS), evidence_of(term)
    teacher, reference = draw_states(1, width=9), draw_states(2)
    ours, our_leaves = leaves_of(draw_states(0, bias=bias, softcap=softcap))
    plain, plain_leaves = leaves_of(draw_states(0, bias=bias, softcap=softcap))
    parts = [Part({"term": term}, evidence, {"term": shares}, replace(teacher, event=rule.teacher), None, True)]
    parts = [replace(parts[0], reference=replace(reference, event=rule.student))]
    found = streamed_loss(replace(ours, event=rule.student), parts)
    found.loss.backward()
    tokens = torch.tensor([REST.index(token) for token in evidence.tokens.tolist()])
    student_adds = isinstance(policy, SemanticClass)
    logprobs = [smaller(plain, student_adds), smaller(teacher, True), smaller(reference, student_adds)]
    seen = replace(evidence, tokens=tokens, stop=(REST.index(3),)).seen(
        slice(None), *(Scores(each.gather(-1, tokens[:, None]).squeeze(-1), each) for each in logprobs)
    )
    result = term(seen)
    expected = (shares * result.where * result.loss.masked_fill(~result.where, 0)).sum()
    if expected.requires_grad:  # a penalty on the weights says nothing here
        expected.backward()
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    value = (shares * result.value.masked_fill(~result.where, 0)).sum()
    torch.testing.assert_close(found.values["term"], value, rtol=1e-5, atol=1e-6)
    for our_leaf, plain_leaf in zip(our_leaves, plain_leaves, strict=True):
        want = torch.zeros_like(plain_leaf) if plain_leaf.grad is None else plain_leaf.grad
        torch.testing.assert_close(our_leaf.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES[:2], ids=NAMES[:2])
@pytest.mark.parametrize(("kind", "name"), TERMS, ids=[name for _, name in TERMS])
def test_every_term_is_that_of_a_vocabulary_with_one_stop_token(kind, name, policy):
    compare_with_smaller(make(kind, name), policy)


@pytest.mark.parametrize("policy", POLICIES[:2], ids=NAMES[:2])
def test_logits_with_a_softcap_and_in_tiles(policy, tile):
    for term in (ReverseKL(), SampledReverseKL(), StopReferenceKL(1.0)):
        compare_with_smaller(term, policy, bias=False, softcap=2.0)


def test_unweighted_log_probs_have_no_gradient_where_nothing_can_occur():
    """A term by autograd that looks at every log-prob alike; its value counts the constants, its gradient does not."""

    class Flat(ReverseKL):
        """Cross-entropy from the uniform distribution."""

        def forward(self, evidence):
            loss = -evidence.student.logprobs.sum(-1)
            return super().forward(evidence)._replace(loss=loss, value=loss.detach())

        def closed_form(self, evidence, out):
            return None

    event, (evidence, shares) = SemanticClass().rule(IDS).student, evidence_of(ReverseKL())
    ours, our_leaves = leaves_of(draw_states(0))
    plain, plain_leaves = leaves_of(draw_states(0))
    part = Part({"term": Flat()}, evidence, {"term": shares}, replace(draw_states(1), event=event))
    streamed_loss(replace(ours, event=event), [part]).loss.backward()
    (shares * -smaller(plain, True).sum(-1)).sum().backward()
    for our_leaf, plain_leaf in zip(our_leaves, plain_leaves, strict=True):
        torch.testing.assert_close(our_leaf.grad, plain_leaf.grad, rtol=1e-4, atol=1e-6)


def test_teacher_map_changes_the_teacher_only():
    term, (evidence, shares) = ReverseKL(), evidence_of(ReverseKL())
    rule, teacher = TeacherMap().rule(IDS), draw_states(1)
    ours, our_leaves = leaves_of(draw_states(0))
    plain, plain_leaves = leaves_of(draw_states(0))
    part = Part({"term": term}, evidence, {"term": shares}, replace(teacher, event=rule.teacher))
    found = streamed_loss(replace(ours, event=rule.student), [part])
    found.loss.backward()
    q = (teacher.states @ teacher.head.weight.T).log_softmax(-1)
    mapped = q.clone()
    mapped[:, 3] = q[:, [3, 17, 0]].logsumexp(-1)
    mapped[:, [17, 0]] = NEGLIGIBLE
    logprobs = (plain.states @ plain.head.weight.T).log_softmax(-1)
    expected = (shares * term(make_evidence(evidence.tokens, logprobs, mapped)).loss).sum()
    expected.backward()
    torch.testing.assert_close(found.loss, expected.detach())
    for our_leaf, plain_leaf in zip(our_leaves, plain_leaves, strict=True):
        torch.testing.assert_close(our_leaf.grad, plain_leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES[:2], ids=NAMES[:2])
@pytest.mark.parametrize("name", ["ReverseKL", "ForwardKL", "JensenShannon", "SampledReverseKL"])
def test_a_teacher_that_is_the_student_teaches_nothing(name, policy):
    term, rule, (evidence, shares) = build("divergence", name), policy.rule(IDS), evidence_of(ReverseKL())
    student, leaves = leaves_of(draw_states(0, bias=True))
    if isinstance(policy, Canonical):  # by which only a student that never writes the teacher's ids agrees with it
        student.head.bias.data[[17, 0]] = -50.0
    twin = replace(student, states=student.states.detach(), head=student.head.detached())
    part = Part({"term": term}, evidence, {"term": shares}, replace(twin, event=rule.teacher))
    found = streamed_loss(replace(student, event=rule.student), [part])
    found.loss.backward()
    assert found.values["term"].abs() < 1e-6
    assert all(leaf.grad.abs().max() < 1e-5 for leaf in leaves)
