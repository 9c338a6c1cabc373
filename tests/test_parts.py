"""Parts of one micro-batch, and which way through the tiles each term takes."""

from dataclasses import replace

import pytest
import torch

from stable_opd import Author, Constraint, Divergence, TokenLoss, build
from stable_opd.models import Head
from stable_opd.scoring import HiddenStates
from stable_opd.streaming import Part, streamed_loss
from streams import TERMS, N, author_of, compare, draw_evidence, draw_states, leaves_of, make, stream

SAMPLED = [(kind, name) for kind, name in TERMS if make(kind, name).support == "sampled"]
POSITIONWISE = [(kind, name) for kind, name in SAMPLED if make(kind, name).positionwise]


def sizes_of_calls(monkeypatch, term):
    """How many positions the term is shown, call by call."""
    sizes, forward = [], term.forward

    def counting(evidence):
        sizes.append(len(evidence.tokens))
        return forward(evidence)

    monkeypatch.setattr(term, "forward", counting)
    return sizes


def outcome(term, evidence, shares):
    student, leaves = leaves_of(draw_states(0, bias=True))
    result = stream({"term": term}, evidence, shares, student, draw_states(1), draw_states(2))
    result.loss.backward()
    return [result.loss.detach(), result.values["term"], *(leaf.grad for leaf in leaves)]


def test_sampled_terms_that_are_shipped_look_at_positions_by_themselves():
    """Otherwise the test below would look at nothing."""
    assert {"SampledReverseKL", "GoldenMixture"} <= {name for _, name in POSITIONWISE}


@pytest.mark.parametrize(("kind", "name"), POSITIONWISE, ids=[name for _, name in POSITIONWISE])
def test_positionwise_term_equals_itself_on_whole_rows(kind, name, tile, monkeypatch):
    in_tiles, whole = make(kind, name), make(kind, name)
    evidence, shares = draw_evidence(author_of(whole))
    whole.positionwise = False
    sizes, whole_sizes = sizes_of_calls(monkeypatch, in_tiles), sizes_of_calls(monkeypatch, whole)
    for found, expected in zip(outcome(in_tiles, evidence, shares), outcome(whole, evidence, shares), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert sizes == [min(tile, N - start) for start in range(0, N, tile)]
    assert whole_sizes == [N]


def test_terms_of_all_ways_add_up(tile):
    """A closed form, autograd over the vocabulary, over the written tokens, and over whole rows, in one pass."""

    class Follow(Divergence):
        """Cumulative sums along the batch."""

        def forward(self, evidence):
            loss = (evidence.student.sampled - evidence.teacher.sampled).cumsum(0).sin()
            return TokenLoss(loss, loss.detach(), torch.ones_like(evidence.in_loop))

    class Entropy(Constraint):
        """Rewards entropy."""

        support = "full"

        def forward(self, evidence):
            entropy = -(evidence.student.logprobs.exp() * evidence.student.logprobs).sum(-1)
            return TokenLoss(-0.4 * entropy, entropy.detach(), evidence.position > 2)

    evidence, shares = draw_evidence()
    terms = {"rows": Follow(), "entropy": Entropy(), "kl": build("divergence", "ReverseKL")}
    terms |= {"sampled": build("divergence", "SampledReverseKL"), "anchor": build("constraint", "ReferenceKL")}
    together = compare(terms, evidence, shares, draw_states(0, bias=True, softcap=4.0))
    alone = [compare({"t": term}, evidence, shares, draw_states(0, bias=True, softcap=4.0)) for term in terms.values()]
    for leaf, *parts in zip(together, *alone, strict=True):
        assert all(part.grad.abs().max() > 1e-4 for part in parts)
        torch.testing.assert_close(leaf.grad, sum(part.grad for part in parts), rtol=1e-4, atol=1e-6)


def slice_of(states, where):
    return HiddenStates(states.states[where], states.head)


def two_parts():
    """N positions of the student, with teacher and reference, and 14 golden ones without."""

    class Rising(Divergence):
        """Follows rows, and looks at the teacher."""

        def forward(self, evidence):
            loss = (evidence.student.sampled - evidence.teacher.sampled).cumsum(0) ** 2
            return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    own, own_shares = draw_evidence()
    golden, golden_shares = draw_evidence(Author.GOLDEN, seed=6, count=14)
    own_terms = {name: make(kind, name) for kind, name in TERMS if kind != "mixture"} | {"rising": Rising()}
    first = Part(
        own_terms, own, dict.fromkeys(own_terms, own_shares), draw_states(1, width=9), draw_states(2), diagnose=True
    )
    return first, Part({"mixture": build("mixture", "GoldenMixture", weight=0.7)}, golden, {"mixture": golden_shares})


@pytest.mark.parametrize("swapped", [False, True], ids=["student first", "golden first"])
def test_two_parts_in_one_call_are_two_calls(swapped, tile):
    parts = two_parts()[:: -1 if swapped else 1]
    everything = draw_states(0, bias=True, softcap=5.0, count=N + 14)
    student, leaves = leaves_of(everything)
    result = streamed_loss(student, parts)
    result.loss.backward()
    start, losses, expected = 0, {}, [torch.zeros_like(leaf) for leaf in leaves]
    for part in parts:
        place = slice(start, start := start + len(part))
        alone, alone_leaves = leaves_of(slice_of(everything, place))
        single = streamed_loss(alone, [part])
        single.loss.backward()
        losses |= single.losses
        expected[0][place] = alone_leaves[0].grad
        for total, leaf in zip(expected[1:], alone_leaves[1:], strict=True):
            total += leaf.grad
        if part.diagnose:
            torch.testing.assert_close(result.diagnostics["student"], single.diagnostics["student"])
            torch.testing.assert_close(result.diagnostics["overlap"], single.diagnostics["overlap"])
    assert start == N + 14
    assert result.losses.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(result.losses[name], loss)
    torch.testing.assert_close(result.loss.detach(), sum(losses.values()))
    for leaf, want in zip(leaves, expected, strict=True):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-6)


def test_one_term_in_two_parts_is_the_term_on_both(tile):
    evidence, shares = draw_evidence(Author.GOLDEN)
    term = {"m": build("mixture", "GoldenMixture")}
    places = slice(0, 9), slice(9, N)
    scores = evidence.student, evidence.teacher, evidence.reference
    parts = [Part(term, evidence.seen(place, *scores), {"m": shares[place]}) for place in places]
    student, leaves = leaves_of(draw_states(0))
    result = streamed_loss(student, parts)
    result.loss.backward()
    whole, whole_leaves = leaves_of(draw_states(0))
    expected = stream(term, evidence, shares, whole)
    expected.loss.backward()
    torch.testing.assert_close(result.losses["m"], expected.losses["m"])
    torch.testing.assert_close(result.values["m"], expected.values["m"])
    for leaf, want in zip(leaves, whole_leaves, strict=True):
        torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-4, atol=1e-6)


def test_part_without_terms_adds_nothing():
    first, _ = two_parts()
    _, silent = two_parts()
    student, leaves = leaves_of(draw_states(0, count=N + 14))
    streamed_loss(student, [first, replace(silent, terms={})]).loss.backward()
    assert leaves[0].grad[N:].abs().max() == 0
    assert (leaves[0].grad[:N].abs().sum(1) > 0).all()


def test_no_positions_at_all_give_a_zero_with_a_graph():
    head = draw_states(0).head
    student, leaves = leaves_of(HiddenStates(torch.zeros(0, 12), Head(head.weight)))
    loss = streamed_loss(student, []).loss
    loss.backward()
    assert loss.item() == 0
    assert leaves[1].grad.abs().max() == 0
