"""Staying near the initial student."""

import torch
from torch import Tensor

from stable_opd.constraints.base import WeightedConstraint
from stable_opd.controllers import Controller
from stable_opd.divergences.kl import expectation, reverse_kl, reverse_kl_and_gradient
from stable_opd.schedules import Schedule
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


class ReferenceKL(WeightedConstraint):
    """KL from the student to the initial student, exact over the whole vocabulary, at every visited state.

        weight * KL(p || p_0) = weight * sum_v p_v (log p_v - log p_0v)

    No gradient flows through which states are visited. Prefer `ReferenceForwardKL` where the student is to keep what
    the reference finds possible, and `EstimatedReferenceKL` where the whole vocabulary is too much to look at.

    Source: Luo et al. 2026 (arXiv 2604.08527), which does not publish its weight. The default is the coefficient of
    neighbouring public recipes for models of billions of parameters; tiny models want 0.01 to 0.1.

    Args:
        weight: The factor beta_KL.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the KL comes to a target; none leaves it alone.
    """

    support: Support = "full"
    needs_reference: bool = True

    def __init__(
        self, weight: float = 0.005, schedule: Schedule | None = None, controller: Controller | None = None
    ) -> None:
        super().__init__(weight, schedule, controller)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted divergence of each position."""
        divergence = reverse_kl(evidence.student.logprobs, evidence.reference.logprobs)
        weight = self.scale(evidence)
        return TokenLoss(weight * divergence, divergence.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the weighted divergence and write its gradient in the logits."""
        divergence = reverse_kl_and_gradient(evidence.student, evidence.reference, out)
        weight = self.scale(evidence)
        out.mul_(weight)
        return TokenLoss(weight * divergence, divergence, evidence.written_by(Author.STUDENT))


class ReferenceForwardKL(WeightedConstraint):
    """KL from the initial student to the student, exact over the whole vocabulary, at every visited state.

        weight * KL(p_0 || p) = weight * sum_v p_0v (log p_0v - log p_v)

    It grows without bound where the student rules out what the reference finds possible, so it keeps the mass on the
    stop token alive; what the student finds likely and the reference does not costs little. Prefer `ReferenceKL` where
    that is what has to be prevented, and `StopReferenceKL` where only the end of an answer is to be held.

    Source: this is the expected gradient of the estimator k3 (Tang and Munos 2025, arXiv 2506.09477), which public
    recipes of on-policy distillation use with the factor of the default.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the KL comes to a target; none leaves it alone.
    """

    support: Support = "full"
    needs_reference: bool = True

    def __init__(
        self, weight: float = 0.005, schedule: Schedule | None = None, controller: Controller | None = None
    ) -> None:
        super().__init__(weight, schedule, controller)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted divergence of each position."""
        divergence = reverse_kl(evidence.reference.logprobs, evidence.student.logprobs)
        weight = self.scale(evidence)
        return TokenLoss(weight * divergence, divergence.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the weighted divergence and write its gradient in the logits, weight * (p_v - p_0v)."""
        student, reference, weight = evidence.student, evidence.reference, self.scale(evidence)
        divergence = expectation(reference.probs, torch.sub(reference.logprobs, student.logprobs, out=out))
        torch.sub(student.probs, reference.probs, out=out).mul_(weight)
        return TokenLoss(weight * divergence, divergence, evidence.written_by(Author.STUDENT))
