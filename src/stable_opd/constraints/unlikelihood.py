"""Making repeated tokens unlikely."""

import math

import torch
from torch import Tensor

from stable_opd.constraints.base import WeightedConstraint
from stable_opd.controllers import Controller
from stable_opd.repetition.ngram import repeated_ngrams
from stable_opd.schedules import Schedule
from stable_opd.types import Author, Evidence, TokenLoss

#: Smallest 1 - p of which the logarithm is taken. In float32, log-probs nearer to 0 are mostly rounding.
CLAMP = 1e-5


def unlikelihood(logprobs: Tensor) -> Tensor:
    """Return -log(1 - p), continued as a straight line in log p where 1 - p is below `CLAMP`.

    With the line, the gradient does not vanish for the tokens that the student is most certain of.

    Args:
        logprobs: Log-probs of tokens, (...).

    Returns:
        Losses, (...), from 0 to about 12.5.
    """
    border = math.log1p(-CLAMP)
    near = logprobs.clamp(max=border)
    # Two forms of one number: each keeps its digits where the other loses them.
    likely = near > -math.log(2)
    logarithm = torch.where(likely, (-near.expm1()).log(), (-near.exp()).log1p())
    # Beyond the border by itself: as a difference to `near` its steep slope would have to cancel below.
    return (1 - CLAMP) / CLAMP * (logprobs - border).relu() - logarithm


class Unlikelihood(WeightedConstraint):
    """Unlikelihood of the tokens that complete an n-gram which the answer had before.

        weight * -log(1 - p(y_t))  where y_t completes a repeated n-gram

    It acts on the loop itself, token by token, and most where the student is certain of going on with it; the other
    tokens of the row are left alone, so the mean over a row grows with the share that is repeated. Below 1 - p = 1e-5
    it goes on in a straight line in log p. Prefer `RepetitionPenalty` for a gradient that is a reward's.

    Source: Welleck et al. 2019 (arXiv 1908.04319), at the level of sequences, with n-grams of 4.

    Args:
        weight: Factor of the term in the objective.
        order: Tokens in an n-gram.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the mean comes to a target; none leaves it alone.
    """

    def __init__(
        self,
        weight: float = 1.0,
        order: int = 4,
        schedule: Schedule | None = None,
        controller: Controller | None = None,
    ) -> None:
        super().__init__(weight, schedule, controller)
        if order < 1:
            raise ValueError(f"Expected order of at least 1, but got {order}. Use 4, or more to spare common phrases.")
        self.order = order

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted unlikelihood of each position; it speaks about the repeated ones."""
        loss = unlikelihood(evidence.student.sampled)
        repeated = repeated_ngrams(evidence.tokens, evidence.row, self.order)
        where = repeated & evidence.written_by(Author.STUDENT)
        return TokenLoss(self.scale(evidence) * loss, loss.detach(), where)
