"""Staying near the initial student, from the written tokens alone."""

from typing import Literal, get_args

from stable_opd.constraints.base import WeightedConstraint
from stable_opd.controllers import Controller
from stable_opd.divergences.estimators import estimator as named
from stable_opd.schedules import Schedule
from stable_opd.types import Author, Evidence, TokenLoss

Estimator = Literal["k2", "k3pp", "k4"]


class EstimatedReferenceKL(WeightedConstraint):
    """KL from the student to the initial student, estimated from the written tokens.

        weight * k(y_t), whose expected gradient over y_t ~ p is that of weight * KL(p || p_0)

    One number per position is all that is needed of the reference. All three estimators have the same gradient on
    tokens that the student has just drawn and differ in the value: k3pp is unbiased and never negative, k4 unbiased and
    noisy, k2 biased. k1 has no gradient in expectation, and k3 that of `ReferenceForwardKL`. Prefer `ReferenceKL`: the
    same gradient without the variance of the sampled token.

    Source: EMA-PG (arXiv 2602.04417) for k3pp and k4; Tang and Munos 2025 (arXiv 2506.09477) for k2, and for what is
    wrong with k1 and k3.

    Args:
        weight: Factor of the term in the objective.
        estimator: Which one: ``k2``, ``k3pp`` or ``k4``.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the KL comes to a target; none leaves it alone.
    """

    needs_reference: bool = True
    positionwise: bool = True

    def __init__(
        self,
        weight: float = 0.005,
        estimator: Estimator = "k3pp",
        schedule: Schedule | None = None,
        controller: Controller | None = None,
    ) -> None:
        super().__init__(weight, schedule, controller)
        self.estimate = named(estimator)
        if estimator not in get_args(Estimator):
            raise ValueError(
                f"Expected an estimator out of {get_args(Estimator)}, but got {estimator!r}, whose gradient is not "
                "that of the reverse KL. Use ReferenceForwardKL for the forward KL."
            )

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted estimate of each position."""
        loss, value = self.estimate(evidence.student.sampled, evidence.reference.sampled, evidence.behaviour_logprobs)
        return TokenLoss(self.scale(evidence) * loss, value.detach(), evidence.written_by(Author.STUDENT))
