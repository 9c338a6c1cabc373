"""Keeping the student from becoming certain."""

import torch
from torch import Tensor

from stable_opd.constraints.base import WeightedConstraint
from stable_opd.controllers import Controller
from stable_opd.divergences.kl import expectation
from stable_opd.schedules import Schedule
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def entropy(logprobs: Tensor) -> Tensor:
    """Return -sum_v p_v log p_v in nats, (..., V) -> (...); a token with p = 0 contributes nothing."""
    p = logprobs.exp()
    return -(p * logprobs.masked_fill(p == 0, 0)).sum(-1)


class EntropyFloor(WeightedConstraint):
    """Raise the student's entropy where it is below a floor, exact over the whole vocabulary.

        weight * max(0, floor - H(p))

    Position by position, so it does not ask the uncertain ones to make up for the certain ones. A floor of log V or
    more is below no entropy: then it is the entropy bonus -weight * H(p) but for a constant. Many tokens are rightly
    certain, so prefer a small weight, or `ReferenceKL`, which knows where the initial student was. The value is the
    entropy itself, which a controller holds from below.

    Source: Skywork-OR1 (arXiv 2505.22312), an entropy bonus that acts while the entropy is below a target of 0.2. There
    the mean over the batch is compared, and the factor adapted.

    Args:
        weight: Factor of the term in the objective.
        floor: Entropy in nats from which on nothing is asked.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the mean entropy comes to a target; none leaves it alone.
    """

    support: Support = "full"
    raises_value: bool = True

    def __init__(
        self,
        weight: float = 0.001,
        floor: float = 0.2,
        schedule: Schedule | None = None,
        controller: Controller | None = None,
    ) -> None:
        super().__init__(weight, schedule, controller)
        if not floor > 0:
            raise ValueError(f"Expected a floor above 0, but got {floor}. No entropy is below 0: use a weight of 0.")
        self.floor = floor

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted shortfall of each position; the value is the entropy."""
        value = entropy(evidence.student.logprobs)
        loss = self.scale(evidence) * (self.floor - value).relu()
        return TokenLoss(loss, value.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the weighted shortfall and write its gradient, weight * p_v (log p_v + H) below the floor."""
        student, weight = evidence.student, self.scale(evidence)
        value = -expectation(student.probs, student.logprobs)
        below = weight * (value < self.floor).to(value.dtype)
        torch.add(student.logprobs, value[:, None], out=out).mul_(student.probs).mul_(below[:, None])
        return TokenLoss(weight * (self.floor - value).relu(), value, evidence.written_by(Author.STUDENT))
