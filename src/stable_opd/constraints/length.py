"""Answers that come near the token budget."""

from torch import Tensor

from stable_opd.constraints.base import RowPenalty
from stable_opd.controllers import Controller
from stable_opd.schedules import Schedule
from stable_opd.types import Evidence


def overlong(lengths: Tensor, budget: int, buffer: int) -> Tensor:
    """Return how far rows have gone into the last part of the budget, from 0 to 1.

    Args:
        lengths: Tokens of each row, (...).
        budget: Length from which on the result is 1.
        buffer: Tokens before the budget at which it begins to rise.

    Returns:
        Shares, (...) of the default precision.
    """
    return ((lengths - (budget - buffer)) / buffer).clamp(0, 1)


class LengthPenalty(RowPenalty):
    """Penalty on answers that come near the token budget, as a policy gradient on their tokens.

        weight * rho_t * clamp((length - (budget - buffer)) / buffer, 0, 1),  rho_t = p(y_t) / behaviour(y_t)

    It speaks about every token of the student's in a row that is too long, also about the good ones: without a
    baseline its variance is large, and the mean over the row divides it by the length. Rows within the budget feel
    nothing. Tokens that somebody else wrote before the student count in the length. Prefer `StopReferenceKL` for a
    student that has forgotten to stop, and `RepetitionPenalty` where rows are long because they loop.

    Source: DAPO (arXiv 2503.14476), the soft overlong punishment, with a buffer of 4096 of 20480 tokens and 1 as the
    largest penalty.

    Args:
        weight: Factor of the term in the objective.
        budget: Length from which on the penalty is largest; that of the default of ``rollout.max_new_tokens``, and to
            be set with it: a longer one is never reached.
        buffer: Tokens before the budget at which the penalty begins; none takes a fifth of it.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the mean penalty comes to a target; none leaves it alone.
    """

    def __init__(
        self,
        weight: float = 1.0,
        budget: int = 512,
        buffer: int | None = None,
        schedule: Schedule | None = None,
        controller: Controller | None = None,
    ) -> None:
        super().__init__(weight, schedule, controller)
        if budget < 1:
            raise ValueError(f"Expected a budget of at least 1, but got {budget}. Use that of rollout.max_new_tokens.")
        buffer = max(1, budget // 5) if buffer is None else buffer
        if not 1 <= buffer <= budget:
            raise ValueError(
                f"Expected a buffer from 1 to the budget of {budget}, but got {buffer}. Use 1 to penalise nothing but "
                "rows that fill the budget."
            )
        self.budget = budget
        self.buffer = buffer

    def penalty(self, evidence: Evidence) -> Tensor:
        """Return the penalty of the row of each token, (n,)."""
        return overlong(evidence.row.bincount()[evidence.row], self.budget, self.buffer)
