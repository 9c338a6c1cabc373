import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_rollout, naive_repeated
from stable_opd import Finish, PeriodicSuffix
from stable_opd.repetition import repeated_suffix


def right_aligned(rows: list[list[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(1, *map(len, rows))
    return torch.tensor([[fill] * (width - len(row)) + row for row in rows]), torch.tensor([len(row) for row in rows])


ROW = st.lists(st.integers(0, 2), max_size=14)
#: A row that ends in copies of a block, since a random one seldom does.
LOOPING = st.builds(
    lambda head, block, n, rest: head + block * n + block[:rest], ROW, ROW, st.integers(0, 5), st.integers(0, 3)
)


@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(st.one_of(ROW, LOOPING), min_size=1, max_size=4),
    max_period=st.integers(1, 8),
    min_copies=st.integers(2, 4),
    min_tokens=st.integers(0, 10),
    fill=st.sampled_from([-1, 0, 1]),
)
def test_equals_the_naive_quadratic_reference(rows, max_period, min_copies, min_tokens, fill):
    """Whatever stands before a row in the batch, be it a token that would go on with the loop."""
    tokens, lengths = right_aligned(rows, fill)
    expected = [naive_repeated(row, max_period, min_copies, min_tokens) for row in rows]
    assert repeated_suffix(tokens, lengths, max_period, min_copies, min_tokens).tolist() == expected


@pytest.mark.parametrize("fill", [-1, 1, 5])
def test_loop_does_not_go_on_into_what_stands_before_the_row(fill):
    tokens, lengths = right_aligned([[5, 5, 5], [1, 5, 1, 5, 1, 5], [5, 5]], fill)
    assert repeated_suffix(tokens, lengths, max_period=2, min_copies=2, min_tokens=2).tolist() == [2, 4, 1]


BY_HAND = {
    "three copies": ([9, 1, 2, 1, 2, 1, 2], [0, 0, 0, 1, 1, 1, 1]),
    "one token": ([9, 8, 5, 5, 5], [0, 0, 0, 1, 1]),
    "partial last copy": ([1, 2, 3, 1, 2, 3, 1, 2, 3, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
    "two copies are too few": ([1, 2, 3, 1, 2, 3], [0] * 6),
    "loop that was left": ([5, 5, 5, 5, 6], [0] * 5),
    "counter": ([1, 7, 2, 7, 3, 7, 4, 7], [0] * 8),
    "period too long": ([1, 2, 3, 4, 5] * 3, [0] * 15),
    "empty": ([], []),
}


@pytest.mark.parametrize(("row", "marks"), BY_HAND.values(), ids=BY_HAND)
def test_marks_by_hand(row, marks):
    found = PeriodicSuffix(max_period=4, min_copies=3, min_tokens=3)(make_rollout([row]))
    assert found.in_loop.int().tolist() == marks
    assert found.repetitive.tolist() == [any(marks)]


def test_min_tokens_counts_the_first_copy():
    row = [1, 2] * 3
    assert PeriodicSuffix(4, 3, 6)(make_rollout([row])).repetitive.item()
    assert not PeriodicSuffix(4, 3, 7)(make_rollout([row])).repetitive.item()


def test_stop_token_at_the_end_is_not_counted():
    """The row repeats itself and then stops; the stop token is neither a mark nor an obstacle."""
    found = PeriodicSuffix(4, 3, 3)(make_rollout([[5, 5, 5, 0]], finish=[Finish.STOP]))
    assert found.in_loop.tolist() == [False, True, True, False]
    cut = PeriodicSuffix(4, 3, 3)(make_rollout([[5, 5, 5, 0]], finish=[Finish.LENGTH]))
    assert not cut.in_loop.any()


def test_rows_are_judged_one_by_one():
    rows = [[5, 5, 5], [], [5], [1, 2, 3, 4], [0, 0, 1, 2, 1, 2, 1, 2], [9]]
    finish = [Finish.LENGTH, Finish.LENGTH, Finish.STOP, Finish.LENGTH, Finish.LENGTH, Finish.STOP]
    detector = PeriodicSuffix(4, 3, 3)
    together = detector(make_rollout(rows, finish=finish))
    alone = [detector(make_rollout([row], finish=[reason])) for row, reason in zip(rows, finish, strict=True)]
    assert together.in_loop.tolist() == [mark for each in alone for mark in each.in_loop.tolist()]
    assert together.repetitive.tolist() == [True, False, False, False, True, False]


def test_rollout_without_rows():
    found = PeriodicSuffix()(make_rollout([]))
    assert found.in_loop.shape == found.repetitive.shape == (0,)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"max_period": 0}, "max_period of at least 1.* got 0"), ({"min_copies": 1}, "min_copies .*1")],
)
def test_settings_that_make_no_sense_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        PeriodicSuffix(**options)
