"""Repetition as n-grams that recur anywhere in an answer."""

import torch
from torch import Tensor

from stable_opd.repetition.base import RepetitionDetector, answer_lengths
from stable_opd.types import Repetition, Rollout


def frequent_ngrams(tokens: Tensor, row: Tensor, n: int, min_count: int) -> tuple[Tensor, Tensor]:
    """Find the n-grams that occur at least ``min_count`` times in one row, without hashing.

    Longer n-grams are made of two shorter ones that overlap or touch, which are known by numbers already; those that
    are too rare are dropped on the way, since no longer one can be more frequent.

    Args:
        tokens: Tokens of all rows, one row after the other, (n,).
        row: Row of each token, (n,).
        n: Tokens in an n-gram, at least 1.
        min_count: Occurrences that are enough.

    Returns:
        Where the occurrences start, ascending, and a number that equal n-grams of one row share, from 0, (starts,).
    """
    if not len(tokens):
        return tokens.new_zeros(0), tokens.new_zeros(0)
    token = tokens - tokens.min()
    starts = torch.arange(len(tokens), device=tokens.device)
    starts, number = _keep_frequent(starts, row * (token.max() + 1) + token, min_count)
    size = 1
    while size < n and len(starts):
        shift = min(size, n - size)
        number_at = tokens.new_full((len(tokens) + shift,), -1)  # nothing frequent starts behind the last token
        number_at[starts] = number
        second = number_at[starts + shift]
        # A number tells its row, too; so the two belong to one row if the same row is found where they start.
        whole = (second >= 0) & (row[starts] == row[(starts + shift).clamp(max=len(row) - 1)])
        pair = number[whole] * len(tokens) + second[whole]
        starts, number = _keep_frequent(starts[whole], pair, min_count)
        size += shift
    return starts, number


def _keep_frequent(starts: Tensor, key: Tensor, min_count: int) -> tuple[Tensor, Tensor]:
    """Drop the keys that occur too seldom, and number the others from 0."""
    _, number, count = key.unique(return_inverse=True, return_counts=True)
    frequent = count >= min_count
    kept = frequent[number]
    return starts[kept], (frequent.cumsum(0) - 1)[number[kept]]


def later_occurrences(starts: Tensor, number: Tensor) -> Tensor:
    """Return the starts of all occurrences but the first of each n-gram, given those of `frequent_ngrams`."""
    first = torch.full_like(starts, torch.iinfo(starts.dtype).max).scatter_reduce(0, number, starts, "amin")
    return starts[starts > first[number]]


def repeated_ngrams(tokens: Tensor, row: Tensor, n: int) -> Tensor:
    """Mark each token that completes an n-gram which occurred earlier in its row; the two may overlap.

    Args:
        tokens: Tokens of all rows, one row after the other, (n,).
        row: Row of each token, (n,); the tokens of a row stand together.
        n: Tokens in an n-gram, at least 1.

    Returns:
        The marks, (n,) bool.
    """
    marks = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    marks[later_occurrences(*frequent_ngrams(tokens, row, n, 2)) + n - 1] = True
    return marks


def rep_n(tokens: Tensor, lengths: Tensor, n: int) -> Tensor:
    """Return the share of each row's n-grams that occurred before in it; 0.0 for rows that are shorter than n.

    Args:
        tokens: Tokens of all rows, one row after the other, (N,).
        lengths: Tokens of each row, (B,).
        n: Tokens in an n-gram, at least 1.

    Returns:
        1 - unique n-grams / n-grams, (B,) float32.
    """
    row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return _share_of_marks(repeated_ngrams(tokens, row, n), row, lengths, n)


def _share_of_marks(marks: Tensor, row: Tensor, lengths: Tensor, n: int) -> Tensor:
    repeated = torch.zeros_like(lengths).index_add(0, row, marks.long())
    return repeated / (lengths - n + 1).clamp(min=1)


class NGramLoop(RepetitionDetector):
    """Some n-gram occurs many times; the marks cover all occurrences but the first.

        repetitive(o) = max over g of #{t : o[t : t + n] = g} >= min_count

    Only n-grams that reach the count are marked. The copies need not touch each other or the end of the answer, so
    this finds a loop that was left again and a sentence that comes back between others; `PeriodicSuffix` asks for exact
    copies at the end. Long n-grams rarely recur by chance, but a loop of period p needs p * (min_count - 1) + n tokens
    to be found. A stop token at the end is not counted as part of the answer.

    Source: arXiv 2512.12895 (n = 30, at least 20 occurrences).

    Args:
        n: Tokens in an n-gram.
        min_count: Occurrences in one answer that make a loop.
    """

    def __init__(self, n: int = 30, min_count: int = 20) -> None:
        super().__init__()
        if n < 1 or min_count < 2:
            raise ValueError(
                f"Expected n of at least 1 and min_count of at least 2, but got {n} and {min_count}. A first "
                "occurrence repeats nothing."
            )
        self.n = n
        self.min_count = min_count

    def forward(self, rollout: Rollout) -> Repetition:
        """Return the marks of the repeated tokens, and a flag for each row that has some."""
        inside = rollout.position < answer_lengths(rollout)[rollout.row]
        row = rollout.row[inside]
        again = later_occurrences(*frequent_ngrams(rollout.completion[inside], row, self.n, self.min_count))
        # +1 where an occurrence begins and -1 behind its end: the sum so far is how many cover a token.
        borders = row.new_zeros(len(row) + 1)
        borders.index_add_(0, again, torch.ones_like(again)).index_add_(0, again + self.n, -torch.ones_like(again))
        in_loop = torch.zeros_like(inside).masked_scatter(inside, borders[:-1].cumsum(0) > 0)
        repetitive = torch.zeros(len(rollout), dtype=torch.bool, device=inside.device)
        repetitive[row[again]] = True
        return Repetition(in_loop, repetitive)


class NGramShare(RepetitionDetector):
    """A large share of the answer's short n-grams occurred in it before (rep-n); the marks are their last tokens.

        rep(o) = 1 - unique n-grams of o / n-grams of o >= min_repeated,  n = order

    An answer whose last part is a loop has about the share of that part, or more. The default is high, because long
    texts on one subject come back to their own phrases. For the same reason there are marks in flagged rows only:
    elsewhere a phrase that comes back is no loop.
    Counters that are far apart do not hide a loop from it. `NGramLoop` and `PeriodicSuffix` find loops that are a small
    part of a long answer. A stop token at the end is not counted as part of the answer.

    Source: Welleck et al. 2019 (arXiv 1908.04319), seq-rep-4.

    Args:
        order: Tokens in an n-gram.
        min_repeated: Share of the n-grams from which an answer is repetitive.
        min_length: Shortest answer that is judged, in tokens; in a short one a few chance hits are a large share.
    """

    def __init__(self, order: int = 4, min_repeated: float = 0.6, min_length: int = 48) -> None:
        super().__init__()
        if order < 1 or not 0 < min_repeated <= 1:
            raise ValueError(
                "Expected order of at least 1 and min_repeated above 0 and at most 1, "
                f"but got {order} and {min_repeated}."
            )
        self.order = order
        self.min_repeated = min_repeated
        self.min_length = min_length

    def forward(self, rollout: Rollout) -> Repetition:
        """Return the marks of the tokens that complete a repeated n-gram, and the flags of the rows."""
        lengths = answer_lengths(rollout)
        inside = rollout.position < lengths[rollout.row]
        row = rollout.row[inside]
        marks = repeated_ngrams(rollout.completion[inside], row, self.order)
        share = _share_of_marks(marks, row, lengths, self.order)
        repetitive = (share >= self.min_repeated) & (lengths >= self.min_length)
        in_loop = torch.zeros_like(inside).masked_scatter(inside, marks & repetitive[row])
        return Repetition(in_loop, repetitive)
