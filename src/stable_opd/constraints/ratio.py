"""Staying near whoever drew the tokens."""

from torch import Tensor

from stable_opd.constraints.base import WeightedConstraint
from stable_opd.controllers import Controller
from stable_opd.schedules import Schedule
from stable_opd.types import Author, Evidence, TokenLoss


def half_square(log_ratio: Tensor) -> Tensor:
    """Return (log rho)^2 / 2, whose slope is log rho, (n,)."""
    return log_ratio.square() / 2


class RatioPenalty(WeightedConstraint):
    """Half the squared logarithm of the policy ratio, on the written tokens: a soft trust region.

        weight * (log rho_t)^2 / 2,  rho_t = p(y_t) / behaviour(y_t)

    With tokens that the behaviour drew, its expected gradient near rho = 1 is that of KL(behaviour || p). It is 0 at
    the first update on rows that the student has just drawn at temperature 1, and speaks as soon as rows are older or
    drawn otherwise. A sampler that cuts the tail makes rho smaller than 1 for the same weights, and this term would
    then push up what was drawn. Prefer `ReferenceKL` to bound how far the student goes from where it started.

    Source: prime-rl, which adds 1e-3 (log rho)^2; with the half that is a weight of 2e-3.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the penalty comes to a target; none leaves it alone.
    """

    positionwise: bool = True

    def __init__(
        self, weight: float = 0.002, schedule: Schedule | None = None, controller: Controller | None = None
    ) -> None:
        super().__init__(weight, schedule, controller)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted penalty of each position."""
        penalty = half_square(evidence.student.sampled - evidence.behaviour_logprobs)
        return TokenLoss(self.scale(evidence) * penalty, penalty.detach(), evidence.written_by(Author.STUDENT))
