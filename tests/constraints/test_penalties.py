"""Penalties on whole rows: what they are, and that their gradient is that of the expected penalty."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from helpers import make_evidence
from stable_opd.constraints import LengthPenalty, RepetitionPenalty
from stable_opd.constraints.length import overlong
from stable_opd.constraints.repetition import repeated_share

LAST = 4  # tokens of the longest row
STOP = 2


def rows():
    """Every row of at most `LAST` tokens out of three, of which one stops."""
    going = [list(row) for length in range(LAST + 1) for row in product((0, 1), repeat=length)]
    return [row + [STOP] * (len(row) < LAST) for row in going]


def evidence_of(texts, logits, behaviour=None):
    """Evidence on rows under a student with logits for each position and last token, (LAST, 4, 3)."""
    logprobs = logits.log_softmax(-1)
    tokens = torch.tensor([token for text in texts for token in text])
    row = torch.tensor([number for number, text in enumerate(texts) for _ in text])
    position = torch.tensor([place for text in texts for place in range(len(text))])
    last = torch.tensor([before for text in texts for before in [3, *text[:-1]]])
    seen = make_evidence(tokens, logprobs[position, last])
    drawn = seen.student.sampled.detach() if behaviour is None else behaviour
    return replace(seen, row=row, position=position, behaviour_logprobs=drawn)


def share_by_counting(row, n):
    grams = [tuple(row[start : start + n]) for start in range(len(row) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


PENALTIES = {
    "length": (LengthPenalty(0.7, budget=4, buffer=2), lambda row: min(max((len(row) - 2) / 2, 0), 1)),
    "repetition": (RepetitionPenalty(0.7, n=2), lambda row: share_by_counting(row, 2)),
    "single tokens": (RepetitionPenalty(0.7, n=1), lambda row: share_by_counting(row, 1)),
}


@pytest.mark.parametrize(("term", "penalty"), PENALTIES.values(), ids=PENALTIES.keys())
def test_expected_gradient_is_that_of_the_expected_penalty(term, penalty):
    """By enumeration: rows are drawn from the student, and each contributes the sum over its tokens."""
    logits = torch.randn(LAST, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    texts = rows()
    seen = evidence_of(texts, logits)
    total = torch.zeros(len(texts), dtype=torch.float64).index_add(0, seen.row, seen.student.sampled).exp()
    assert total.sum().item() == pytest.approx(1)
    expected = 0.7 * sum(chance * penalty(text) for chance, text in zip(total, texts, strict=True))
    (slope,) = torch.autograd.grad(expected, logits, retain_graph=True)
    loss = (total.detach()[seen.row] * term(seen).loss).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert slope.abs().max() > 1e-2
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("term", "penalty"), PENALTIES.values(), ids=PENALTIES.keys())
def test_every_token_bears_the_penalty_of_its_row_times_its_ratio(term, penalty):
    texts = rows()
    logits = torch.zeros(LAST, 4, 3, dtype=torch.float64)
    count = sum(map(len, texts))
    behaviour = -torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = term(evidence_of(texts, logits, behaviour))
    value = torch.tensor([penalty(text) for text in texts for _ in text], dtype=torch.float64)
    torch.testing.assert_close(found.value, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.loss, 0.7 * value * torch.exp(-behaviour) / 3, rtol=1e-6, atol=0)


def test_soft_overlong_penalty():
    lengths = torch.tensor([1, 80, 81, 90, 100, 120])
    torch.testing.assert_close(overlong(lengths, 100, 20), torch.tensor([0, 0, 0.05, 0.5, 1, 1]))


def test_buffer_is_a_fifth_of_the_budget():
    assert LengthPenalty().budget == 512
    assert LengthPenalty(budget=100).buffer == 20
    assert LengthPenalty(budget=3).buffer == 1
    assert LengthPenalty(budget=100, buffer=7).buffer == 7


def test_budget_is_the_default_of_the_rollout():
    from stable_opd.options import RolloutOptions

    assert LengthPenalty().budget == RolloutOptions().max_new_tokens


def test_tokens_of_a_prefix_count_in_the_length_and_bear_nothing():
    seen = evidence_of([[0, 0, 1, 1]], torch.zeros(LAST, 4, 3))
    found = LengthPenalty(1.0, 4, 2)(replace(seen, author=torch.tensor([1, 1, 0, 0])))
    assert found.value.tolist() == [1, 1, 1, 1]
    assert found.where.tolist() == [False, False, True, True]


def test_repeated_share_counts_each_row_by_itself():
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, (length,), generator=generator).tolist() for length in (1, 2, 3, 9, 20)]
    tokens = torch.tensor([token for text in texts for token in text])
    row = torch.tensor([number for number, text in enumerate(texts) for _ in text])
    for n in (1, 2, 3, 5):
        expected = torch.tensor([share_by_counting(text, n) for text in texts for _ in text])
        torch.testing.assert_close(repeated_share(tokens, row, n), expected)


def test_huge_ratio_is_bounded():
    """A token that whoever drew it found next to impossible."""
    seen = evidence_of([[0, 0, 0, 0]], torch.zeros(LAST, 4, 3), torch.full((4,), -1e4))
    assert LengthPenalty(1.0, 4, 2)(seen).loss.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthPenalty(budget=0), "budget of at least 1, but got 0.*max_new_tokens"),
        (lambda: LengthPenalty(budget=10, buffer=0), "buffer from 1 to the budget of 10, but got 0"),
        (lambda: LengthPenalty(budget=10, buffer=11), "buffer from 1 to the budget of 10, but got 11"),
        (lambda: RepetitionPenalty(n=0), "n of at least 1, but got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cls", [LengthPenalty, RepetitionPenalty])
def test_follows_rows(cls):
    """Otherwise it would be called on tiles, in which a row is not whole."""
    assert cls.support == "sampled"
    assert not cls.positionwise
    assert not cls.needs_teacher
    assert not cls.needs_reference
