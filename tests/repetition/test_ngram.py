from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_rollout
from stable_opd import Finish
from stable_opd.repetition import NGramLoop, NGramShare, PeriodicSuffix, rep_n, repeated_ngrams
from stable_opd.repetition.ngram import frequent_ngrams

ROW = st.lists(st.integers(0, 2), max_size=14)
LOOPING = st.builds(lambda head, block, count: head + block * count, ROW, ROW, st.integers(0, 5))
ROWS = st.lists(st.one_of(ROW, LOOPING), max_size=5)


def ngrams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[start : start + n]) for start in range(len(row) - n + 1)]


def naive_completes(row: list[int], n: int) -> list[bool]:
    """Whether the n-gram that ends at a token is found among those that end before it."""
    found = ngrams(row, n)
    return [end >= n - 1 and found[end - n + 1] in found[: end - n + 1] for end in range(len(row))]


def naive_loop(row: list[int], n: int, min_count: int) -> list[bool]:
    """Mark every occurrence but the first of every n-gram that is frequent enough."""
    marks, seen, count = [False] * len(row), set(), Counter(ngrams(row, n))
    for start, gram in enumerate(ngrams(row, n)):
        if gram in seen and count[gram] >= min_count:
            marks[start : start + n] = [True] * n
        seen.add(gram)
    return marks


def pack(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    row = torch.tensor([number for number, row in enumerate(rows) for _ in row], dtype=torch.long)
    return tokens, row


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, n=st.integers(1, 9), base=st.sampled_from([0, -5, 10**6]), first=st.integers(0, 3))
def test_repeated_ngrams_equal_the_definition(rows, n, base, first):
    """Whatever the tokens are called, and whichever number the first row has."""
    tokens, row = pack(rows)
    expected = [mark for each in rows for mark in naive_completes(each, n)]
    assert repeated_ngrams(base + 7 * tokens, first + 3 * row, n).tolist() == expected


@settings(deadline=None, max_examples=200)
@given(rows=ROWS, n=st.integers(1, 9))
def test_rep_n_equals_the_definition(rows, n):
    expected = [1 - len(set(ngrams(row, n))) / max(len(ngrams(row, n)), 1) if len(row) >= n else 0.0 for row in rows]
    found = rep_n(pack(rows)[0], torch.tensor([len(row) for row in rows], dtype=torch.long), n)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@settings(deadline=None, max_examples=200)
@given(rows=ROWS, n=st.integers(1, 9), min_count=st.integers(1, 5))
def test_frequent_ngrams_equal_the_definition(rows, n, min_count):
    tokens, row = pack(rows)
    starts, number = frequent_ngrams(tokens, row, n, min_count)
    expected, offset = {}, 0
    for which, each in enumerate(rows):
        count = Counter(ngrams(each, n))
        expected |= {
            offset + start: (which, gram) for start, gram in enumerate(ngrams(each, n)) if count[gram] >= min_count
        }
        offset += len(each)
    assert starts.tolist() == list(expected)
    pairs = set(zip(number.tolist(), expected.values(), strict=True))
    assert len(pairs) == len(set(number.tolist())) == len(set(expected.values()))
    assert set(number.tolist()) == set(range(len(pairs)))


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, n=st.integers(1, 7), min_count=st.integers(2, 5))
def test_loop_equals_the_definition(rows, n, min_count):
    found = NGramLoop(n, min_count)(make_rollout(rows))
    expected = [naive_loop(row, n, min_count) for row in rows]
    assert found.in_loop.tolist() == [mark for marks in expected for mark in marks]
    assert found.repetitive.tolist() == [any(marks) for marks in expected]


@settings(deadline=None, max_examples=300)
@given(rows=ROWS, order=st.integers(1, 5), min_repeated=st.sampled_from([0.2, 0.5, 0.7, 1.0]), least=st.integers(0, 9))
def test_share_equals_the_definition(rows, order, min_repeated, least):
    found = NGramShare(order, min_repeated, least)(make_rollout(rows))
    expected = []
    for row in rows:
        repeated, total = sum(naive_completes(row, order)), max(len(ngrams(row, order)), 1)
        expected.append(repeated / total >= min_repeated and len(row) >= least)
    marks = [mark and flag for row, flag in zip(rows, expected, strict=True) for mark in naive_completes(row, order)]
    assert found.repetitive.tolist() == expected
    assert found.in_loop.tolist() == marks


def test_large_tokens_in_many_rows_stay_apart():
    """The pairs behind a long n-gram must not overflow: as many tokens and rows as there will ever be."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(300_000, (64, 1, 20), generator=generator)
    tokens = block.expand(64, 100, 20).reshape(-1)
    row = torch.arange(64).repeat_interleave(2000) + 10**6
    assert repeated_ngrams(tokens, row, 30).view(64, 2000).sum(1).tolist() == [2000 - 29 - 20] * 64
    alone = torch.arange(64 * 2000) % 2000 + 290_000  # the same in all rows, and nothing twice in one
    assert not repeated_ngrams(alone, row, 1).any()


def test_negative_numbers_are_tokens_like_others():
    assert not repeated_ngrams(torch.tensor([0, -1]), torch.tensor([0, 1]), 1).any()
    assert repeated_ngrams(torch.tensor([-1, -1]), torch.tensor([0, 0]), 1).tolist() == [False, True]


LOOP = [3, 1, 4, 1, 5]


def test_loop_needs_the_count_and_not_one_less():
    row = LOOP * 8
    assert NGramLoop(5, 8)(make_rollout([row])).repetitive.tolist() == [True]
    assert NGramLoop(5, 8)(make_rollout([row[:-1]])).repetitive.tolist() == [False]


@pytest.mark.parametrize("period", [1, 2, 7, 31])
def test_loop_needs_as_many_tokens_as_documented(period):
    needed = period * 19 + 30
    row = (list(range(period)) * needed)[:needed]
    found = NGramLoop()(make_rollout([row, row[:-1]]))
    assert found.repetitive.tolist() == [True, False]


def test_loop_that_was_left_again_is_found():
    row = [9, 8, *LOOP * 8, *range(20, 60)]
    found = NGramLoop(5, 4)(make_rollout([row]))
    assert found.in_loop.tolist() == [False] * 7 + [True] * 35 + [False] * 40
    assert not PeriodicSuffix(min_tokens=10)(make_rollout([row])).repetitive.any()


def test_sentence_that_comes_back_between_others_is_found():
    row = [token for step in range(6) for token in (*LOOP, 100 + step, 200 + step)]
    found = NGramLoop(5, 6)(make_rollout([row]))
    assert found.in_loop.tolist() == ([False] * 7 + ([True] * 5 + [False] * 2) * 5)


def test_exact_loop_is_marked_as_by_the_suffix():
    row = [*range(50, 90), *[3, 1, 4] * 40]
    expected = PeriodicSuffix()(make_rollout([row]))
    assert expected.in_loop.sum() == 117
    assert NGramLoop()(make_rollout([row])).in_loop.tolist() == expected.in_loop.tolist()


def text_without_loops(count: int, seed: int = 0) -> list[int]:
    """Word frequencies as in a language (Zipf's law)."""
    chances = 1 / torch.arange(1, 5001, dtype=torch.float64)
    return torch.multinomial(chances, count, True, generator=torch.Generator().manual_seed(seed)).tolist()


def test_text_without_loops_is_not_flagged_by_default():
    rollout = make_rollout([text_without_loops(4000, seed) for seed in range(3)])
    for detector in (NGramLoop(), NGramShare()):
        found = detector(rollout)
        assert not found.repetitive.any()
        assert not found.in_loop.any()


def test_share_of_an_answer_is_at_least_about_that_of_its_loop():
    row = text_without_loops(1000) + LOOP * 200
    share = rep_n(torch.tensor(row), torch.tensor([2000]), 4).item()
    assert 0.495 < share < 0.53


def test_share_marks_nothing_in_rows_that_are_not_flagged():
    mild, strong = [*LOOP, *range(10, 60), *LOOP], LOOP * 12
    found = NGramShare()(make_rollout([mild, strong]))
    assert found.repetitive.tolist() == [False, True]
    assert found.in_loop.tolist() == [False] * 60 + [False] * 8 + [True] * 52


def test_counters_that_are_far_apart_do_not_hide_a_loop_from_the_share():
    row = [token for step in range(40) for token in (*range(18), 100 + step, 200 + step)]
    assert NGramShare()(make_rollout([row])).repetitive.tolist() == [True]


def test_short_answers_are_not_judged_by_the_share():
    found = NGramShare()(make_rollout([[5] * 47, [5] * 48, [5] * 48], finish=[Finish.LENGTH] * 2 + [Finish.STOP]))
    assert found.repetitive.tolist() == [False, True, False]


@pytest.mark.parametrize("detector", [NGramLoop(2, 2), NGramShare(2, 0.4, 1)], ids=["loop", "share"])
def test_stop_token_at_the_end_is_not_counted(detector):
    """Here the stop token would complete the bigram that repeats."""
    row = [1, 0, 7, 1, 0]
    stopped = detector(make_rollout([row, row], finish=[Finish.STOP, Finish.LENGTH]))
    cut = detector(make_rollout([row[:-1]]))
    assert stopped.in_loop.tolist()[:5] == [*cut.in_loop.tolist(), False] == [False] * 5
    assert NGramLoop(2, 2)(make_rollout([row])).repetitive.tolist() == [True]


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: NGramLoop(n=0), "n of at least 1 .*got 0 and 20"),
        (lambda: NGramLoop(min_count=1), "min_count of at least 2.*got 30 and 1"),
        (lambda: NGramShare(order=0), "order of at least 1.*got 0"),
        (lambda: NGramShare(min_repeated=0.0), r"min_repeated above 0 .*0\.0"),
        (lambda: NGramShare(min_repeated=1.1), r"at most 1.*1\.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build, what):
    with pytest.raises(ValueError, match=what):
        build()
