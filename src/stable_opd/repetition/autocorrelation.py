"""Repetition at the end of an answer that is not exact."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_opd.packing import ragged_arange
from stable_opd.repetition.base import RepetitionDetector, answer_lengths
from stable_opd.types import Repetition, Rollout


def smallest_period(tokens: Tensor, lengths: Tensor, max_period: int, tail: int, min_share: float) -> Tensor:
    """Return the smallest period in which the last tokens of each row recur, (B,); 0 where there is none.

    Args:
        tokens: Tokens of all rows, one row after the other, (N,).
        lengths: Tokens of each row, (B,).
        max_period: Longest period looked for.
        tail: Tokens at the end that are looked at; shorter rows have no period.
        min_share: Share of them that must equal the token one period before. One that has none before it does not.
    """
    if not len(tokens):
        return torch.zeros_like(lengths)
    width = max_period + tail
    back = torch.arange(width, 0, -1, device=tokens.device)  # how far before the row's end
    place = (lengths.cumsum(0)[:, None] - back).clamp(min=0)
    aligned = tokens[place].masked_fill(back > lengths[:, None], -1)
    shifted = aligned.unfold(1, tail, 1)  # (B, max_period + 1, tail): the tail moved back by max_period, ..., 1, 0
    equal = (shifted[:, :-1] == shifted[:, -1:]).sum(-1).flip(1)
    found = (equal / tail >= min_share) & (lengths >= tail)[:, None]
    return torch.where(found.any(1), found.byte().argmax(1) + 1, 0)


def recurring_tail(tokens: Tensor, lengths: Tensor, period: Tensor) -> Tensor:
    """Return how many tokens at the end of each row mostly equal the token one period before them, (B,).

    It is the length for which equal tokens exceed different ones by most, and the shortest of several. So every piece
    at the beginning of the tail has more equal tokens than different ones, and no piece that stands before it does.

    Args:
        tokens: Tokens of all rows, one row after the other, (N,).
        lengths: Tokens of each row, (B,).
        period: Period of each row, (B,); 0 gives 0.
    """
    if not len(tokens):
        return torch.zeros_like(lengths)
    row = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths)
    position, behind = ragged_arange(lengths), period[row]
    index = torch.arange(len(tokens), device=tokens.device)
    equal = (tokens == tokens[(index - behind).clamp(min=0)]) & (position >= behind) & (behind > 0)
    balance = F.pad((2 * equal.long() - 1).cumsum(0), (1, 0))
    gained = balance[lengths.cumsum(0)][row] - balance[:-1]  # from each token to the end of its row
    most = torch.zeros_like(lengths).scatter_reduce(0, row, gained, "amax")  # nothing at all gains 0
    size = lengths[row] - position
    best = torch.where(gained == most[row], size, size.new_tensor(torch.iinfo(torch.long).max))
    shortest = torch.full_like(lengths, torch.iinfo(torch.long).max).scatter_reduce(0, row, best, "amin")
    return torch.where(most > 0, shortest, 0)


class TokenAutocorrelation(RepetitionDetector):
    """The answer ends in a loop that may have a counter in it: most tokens equal the one a period before.

        repetitive(o) = for some p <= max_period: mean over the last `tail` tokens of [o[t] = o[t - p]] >= min_share

    "So we try step 41 next. So we try step 42 next." is found if the tokens that change are at most a tenth; a loop
    of a few tokens and a counter needs a smaller share. The marks cover the tail of the answer that recurs with the
    smallest such p, counters included: it goes back from the end as far as more tokens recur than do not. In a loop of
    exact copies that is the second copy and all later ones, as in `PeriodicSuffix`, which is to be preferred for those:
    it needs fewer tokens. An answer that is shorter than the tail is never repetitive, so small token budgets need a
    smaller one. A stop token at the end is not counted as part of the answer.

    Source: the autocorrelation of a categorical series, which is how often it agrees with itself shifted by p.

    Args:
        max_period: Longest period looked for, in tokens.
        tail: Tokens at the end of the answer that are looked at.
        min_share: Share of them that must equal the token a period before, above 0.5. One that has no token a period
            before it does not.
    """

    def __init__(self, max_period: int = 128, tail: int = 256, min_share: float = 0.9) -> None:
        super().__init__()
        if max_period < 1 or tail < 1 or not 0.5 < min_share <= 1:
            raise ValueError(
                "Expected max_period and tail of at least 1 and min_share above 0.5 and at most 1, "
                f"but got {max_period}, {tail} and {min_share}. For looser repetition use NGramShare."
            )
        self.max_period = max_period
        self.tail = tail
        self.min_share = min_share

    def forward(self, rollout: Rollout) -> Repetition:
        """Return the marks of the looping tails, and a flag for each row that has one."""
        lengths = answer_lengths(rollout)
        inside = rollout.position < lengths[rollout.row]
        tokens = rollout.completion[inside]
        period = smallest_period(tokens, lengths, self.max_period, self.tail, self.min_share)
        looping = recurring_tail(tokens, lengths, period)
        in_loop = inside & (rollout.position >= (lengths - looping)[rollout.row])
        return Repetition(in_loop, period > 0)
