"""Staying near the initial student."""

from torch import Tensor

from stable_opd.constraints.base import Constraint
from stable_opd.divergences.kl import reverse_kl, reverse_kl_and_gradient
from stable_opd.schedules import Schedule, scheduled
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


class ReferenceKL(Constraint):
    """KL from the student to the initial student, exact over the whole vocabulary, at every visited state.

        weight * KL(p || p_0) = weight * sum_v p_v (log p_v - log p_0v)

    No gradient flows through which states are visited.

    Source: Luo et al. 2026 (arXiv 2604.08527), which does not publish its weight. The default is the coefficient of
    neighbouring public recipes for models of billions of parameters; tiny models want 0.01 to 0.1.

    Args:
        weight: The factor beta_KL.
        schedule: Changes the weight in the course of the training; none keeps it constant.
    """

    support: Support = "full"
    needs_reference: bool = True

    def __init__(self, weight: float = 0.005, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.schedule = schedule

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted divergence of each position."""
        divergence = reverse_kl(evidence.student.logprobs, evidence.reference.logprobs)
        weight = scheduled(self.weight, self.schedule, evidence.progress)
        return TokenLoss(weight * divergence, divergence.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the weighted divergence and write its gradient in the logits."""
        divergence = reverse_kl_and_gradient(evidence.student, evidence.reference, out)
        weight = scheduled(self.weight, self.schedule, evidence.progress)
        out.mul_(weight)
        return TokenLoss(weight * divergence, divergence, evidence.written_by(Author.STUDENT))
