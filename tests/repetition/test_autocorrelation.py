import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_rollout
from stable_opd import Finish, PeriodicSuffix
from stable_opd.repetition import TokenAutocorrelation, recurring_tail, smallest_period

ROW = st.lists(st.integers(0, 3), max_size=12)
LOOPING = st.builds(
    lambda head, block, count, place: noisy(head + block * count, place),
    ROW,
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(0, 6),
    st.integers(0, 20),
)


def noisy(row: list[int], place: int) -> list[int]:
    """Change one token, if it is there."""
    return [9 if index == place else token for index, token in enumerate(row)]


def naive_period(row: list[int], max_period: int, tail: int, min_share: float) -> int:
    """The first period for which the share is reached, word for word."""
    for period in range(1, max_period + 1):
        last = range(len(row) - tail, len(row))
        equal = sum(place >= period and row[place] == row[place - period] for place in last if place >= 0)
        if len(row) >= tail and equal / tail >= min_share:
            return period
    return 0


def naive_tail(row: list[int], period: int) -> int:
    """Try every length, and take the first of the best."""
    if not period:
        return 0
    equal = [place >= period and row[place] == row[place - period] for place in range(len(row))]
    return max(range(len(row) + 1), key=lambda size: sum(1 if mark else -1 for mark in equal[len(row) - size :]))


def lengths_of(rows):
    return torch.tensor([len(row) for row in rows], dtype=torch.long)


def flat(rows):
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


ROWS = st.lists(st.one_of(ROW, LOOPING), max_size=5)
SHARES = st.sampled_from([0.55, 0.6, 0.7, 0.75, 0.9, 1.0])


@settings(deadline=None, max_examples=400)
@given(rows=ROWS, max_period=st.integers(1, 7), tail=st.integers(1, 20), min_share=SHARES)
def test_period_equals_the_definition(rows, max_period, tail, min_share):
    expected = [naive_period(row, max_period, tail, min_share) for row in rows]
    assert smallest_period(flat(rows), lengths_of(rows), max_period, tail, min_share).tolist() == expected


@settings(deadline=None, max_examples=400)
@given(rows=ROWS, periods=st.lists(st.integers(0, 7), min_size=5, max_size=5))
def test_tail_equals_the_definition(rows, periods):
    periods = periods[: len(rows)]
    expected = [naive_tail(row, period) for row, period in zip(rows, periods, strict=True)]
    assert recurring_tail(flat(rows), lengths_of(rows), torch.tensor(periods, dtype=torch.long)).tolist() == expected


@settings(deadline=None, max_examples=200)
@given(rows=ROWS, max_period=st.integers(1, 7), tail=st.integers(1, 20), min_share=SHARES)
def test_marks_are_the_tails_of_the_flagged_rows(rows, max_period, tail, min_share):
    found = TokenAutocorrelation(max_period, tail, min_share)(make_rollout(rows))
    periods = [naive_period(row, max_period, tail, min_share) for row in rows]
    sizes = [naive_tail(row, period) for row, period in zip(rows, periods, strict=True)]
    marks = [place >= len(row) - size for row, size in zip(rows, sizes, strict=True) for place in range(len(row))]
    assert found.repetitive.tolist() == [period > 0 for period in periods]
    assert found.in_loop.tolist() == marks


@pytest.mark.parametrize(("equal", "tail", "share"), [(55, 100, 0.55), (7, 10, 0.7), (63, 70, 0.9), (29, 50, 0.58)])
def test_share_that_is_met_exactly_is_enough(equal, tail, share):
    row = [*range(1000, 1000 + tail - equal), *[7] * (equal + 1)]
    assert len(row) == tail + 1
    assert smallest_period(torch.tensor(row), torch.tensor([tail + 1]), 1, tail, share).tolist() == [1]
    fewer = [*row[:-1], 8]
    assert smallest_period(torch.tensor(fewer), torch.tensor([tail + 1]), 1, tail, share).tolist() == [0]


def counting(steps: int, length: int, start: int = 0) -> list[int]:
    """A sentence of some words, the last of which is a number."""
    return [word for step in range(start, start + steps) for word in (*range(10, 9 + length), 1000 + step)]


def test_loop_with_a_counter_is_found_where_exact_copies_are_not():
    head = list(range(2000, 2100))
    rollout = make_rollout([head + counting(40, 12)])
    found = TokenAutocorrelation()(rollout)
    assert found.repetitive.tolist() == [True]
    assert found.in_loop.tolist() == [False] * 112 + [True] * (39 * 12)  # the second sentence and on
    assert not PeriodicSuffix()(rollout).repetitive.any()


@pytest.mark.parametrize(("length", "found"), [(10, True), (9, False)])
def test_default_bears_one_changing_token_in_ten(length, found):
    rollout = make_rollout([counting(100, length)[-640:]])
    assert TokenAutocorrelation(tail=10 * length)(rollout).repetitive.tolist() == [found]


def test_loop_of_a_few_tokens_and_a_counter_needs_a_smaller_share():
    rollout = make_rollout([counting(200, 3)])
    assert TokenAutocorrelation(min_share=0.9)(rollout).repetitive.tolist() == [False]
    assert TokenAutocorrelation(min_share=0.6)(rollout).repetitive.tolist() == [True]


@pytest.mark.parametrize("period", [1, 3, 50, 128])
def test_exact_loop_is_marked_as_by_the_suffix(period):
    rollout = make_rollout([[*range(3000, 3100), *[*range(period)] * (500 // period)]])
    expected = PeriodicSuffix()(rollout)
    found = TokenAutocorrelation()(rollout)
    assert found.repetitive.tolist() == expected.repetitive.tolist() == [True]
    assert found.in_loop.tolist() == expected.in_loop.tolist()


def test_suffix_needs_fewer_tokens():
    rollout = make_rollout([[*range(3000, 3300), *[5] * 48]])
    assert PeriodicSuffix()(rollout).repetitive.tolist() == [True]
    assert TokenAutocorrelation()(rollout).repetitive.tolist() == [False]


def test_period_that_is_too_long_is_not_looked_for():
    rollout = make_rollout([[*range(129)] * 6, [*range(128)] * 6])
    assert TokenAutocorrelation()(rollout).repetitive.tolist() == [False, True]


def test_smallest_of_several_periods_decides():
    """Copies of a block recur with twice its length, too, and that would leave out a copy more."""
    row = [1, 2, 3] * 20
    assert smallest_period(torch.tensor(row), torch.tensor([60]), 8, 30, 0.9).tolist() == [3]
    assert TokenAutocorrelation(8, 30)(make_rollout([row])).in_loop.sum().item() == 57


def test_tail_goes_over_a_slip_and_stops_at_other_text():
    loop = [1, 2, 3, 4] * 10
    row = [*range(50, 80), *loop, 99, 98, *loop, *loop]
    found = TokenAutocorrelation(8, 40)(make_rollout([row]))
    assert found.in_loop.tolist() == [False] * 34 + [True] * (len(row) - 34)
    apart = [*loop, *range(50, 100), *loop, *loop]
    assert TokenAutocorrelation(8, 40)(make_rollout([apart])).in_loop.int().tolist() == [0] * 94 + [1] * 76


def test_loop_that_was_left_is_not_found():
    assert not TokenAutocorrelation(8, 40)(make_rollout([[5] * 200 + list(range(40))])).repetitive.any()


def test_answers_shorter_than_the_tail_are_never_repetitive():
    found = TokenAutocorrelation()(make_rollout([[5] * 255, [5] * 256]))
    assert found.repetitive.tolist() == [False, True]
    assert TokenAutocorrelation(tail=48)(make_rollout([[5] * 48])).repetitive.tolist() == [True]


def test_stop_token_at_the_end_is_not_counted():
    row = [*[5] * 20, 0]
    found = TokenAutocorrelation(4, 20)(make_rollout([row, row[:-1]], finish=[Finish.STOP, Finish.STOP]))
    assert found.repetitive.tolist() == [True, False]
    assert found.in_loop.tolist() == [False] + [True] * 19 + [False] * 21


def test_text_without_loops_is_not_flagged_by_default():
    chances = 1 / torch.arange(1, 5001, dtype=torch.float64)
    rows = [
        torch.multinomial(chances, 4000, True, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in range(3)
    ]
    assert not TokenAutocorrelation()(make_rollout(rows)).repetitive.any()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_period": 0}, "max_period and tail of at least 1 .*got 0, 256 and 0.9"),
        ({"tail": 0}, "got 128, 0 and"),
        ({"min_share": 0.5}, "min_share above 0.5 .*NGramShare"),
        ({"min_share": 1.1}, "at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        TokenAutocorrelation(**options)
