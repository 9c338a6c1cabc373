"""Answers that repeat their n-grams."""

import torch
from torch import Tensor

from stable_opd.constraints.base import RowPenalty
from stable_opd.controllers import Controller
from stable_opd.repetition.ngram import repeated_ngrams
from stable_opd.schedules import Schedule
from stable_opd.types import Evidence


def repeated_share(tokens: Tensor, row: Tensor, n: int) -> Tensor:
    """Return 1 - unique n-grams / n-grams of the row of each token; 0 for rows that are shorter than n.

    Args:
        tokens: Tokens of all rows, one row after the other, (n,).
        row: Row of each token, (n,).
        n: Tokens in an n-gram.

    Returns:
        Shares, (n,) of the default precision.
    """
    lengths = row.bincount()
    repeated = torch.zeros_like(lengths).index_add_(0, row, repeated_ngrams(tokens, row, n).long())
    return (repeated / (lengths - n + 1).clamp(min=1))[row]


class RepetitionPenalty(RowPenalty):
    """Penalty on the share of n-grams that an answer repeats, as a policy gradient on its tokens.

        weight * rho_t * (1 - unique n-grams / n-grams),  rho_t = p(y_t) / behaviour(y_t)

    It speaks about every token of the student's in the row, in proportion to the share, so it needs no threshold; but
    short n-grams recur in good text too, which is then penalised a little. Prefer `Unlikelihood`, which speaks about
    the repeated tokens alone and has less variance, unless it is the row as a whole that should become unlikely.

    Source: the repetition rewards of ms-swift and ROLL, with n-grams of 3 and -1 as the largest penalty.

    Args:
        weight: Factor of the term in the objective.
        n: Tokens in an n-gram.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the mean share comes to a target; none leaves it alone.
    """

    def __init__(
        self,
        weight: float = 1.0,
        n: int = 3,
        schedule: Schedule | None = None,
        controller: Controller | None = None,
    ) -> None:
        super().__init__(weight, schedule, controller)
        if n < 1:
            raise ValueError(f"Expected n of at least 1, but got {n}. Use 3, or more to spare common phrases.")
        self.n = n

    def penalty(self, evidence: Evidence) -> Tensor:
        """Return the share of repeated n-grams in the row of each token, (n,)."""
        return repeated_share(evidence.tokens, evidence.row, self.n)
