"""The contract of a constraint: what keeps the student stable.

A complete plug-in:

    from stable_opd import Author, Constraint, Evidence, TokenLoss

    class EntropyBonus(Constraint):
        \"\"\"Reward entropy, so that the student keeps exploring.\"\"\"

        support = "full"

        def forward(self, evidence: Evidence) -> TokenLoss:
            logprobs = evidence.student.logprobs
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            return TokenLoss(-0.001 * entropy, entropy.detach(), evidence.written_by(Author.STUDENT))
"""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from stable_opd.controllers import Controller
from stable_opd.schedules import Schedule, scheduled
from stable_opd.terms import LossTerm
from stable_opd.types import Author, Evidence, TokenLoss


class Constraint(LossTerm):
    """What keeps the student stable; it is called on the rows that the student wrote."""

    kind: ClassVar[str] = "constraint"

    def adapt(self, value: Tensor) -> None:
        """Learn of the term's mean value in the batch just trained on, once per optimizer step; does nothing here.

        Args:
            value: Mean over the student's tokens in the global batch (0 where the term does not speak), a scalar, the
                same on every process; nan if the student had no token in this step.
        """

    def pull(self, student: nn.Module, reference: nn.Module | None, progress: float) -> tuple[Tensor, Tensor] | None:
        """Add the gradient of a penalty on the weights themselves, once per optimizer step; does nothing here.

        The term's `strength` is to be applied here, as there are no tokens that could have a share in it.

        Args:
            student: The model that learns; its parameters hold the gradients of all terms.
            reference: The initial student, for constraints that declare ``keeps_reference``.
            progress: Share of the training that is over, from 0 to 1.

        Returns:
            The penalty as it is minimised, and its value without the weight, scalars; None if there is none.
        """
        return None


class WeightedConstraint(Constraint):
    """A constraint whose weight may follow a schedule, and the value that it has.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the value comes to a target; none leaves it alone.
    """

    #: Whether more weight makes the value larger, as that of an entropy; a controller has to know.
    raises_value: bool = False

    def __init__(self, weight: float, schedule: Schedule | None = None, controller: Controller | None = None) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"Expected a weight of at least 0, but got {weight}. Use 0 to only watch the value.")
        self.weight = weight
        self.schedule = schedule
        self.controller = controller

    def scale(self, evidence: Evidence) -> float:
        """Return the weight as it is now."""
        return self.scale_at(evidence.progress)

    def scale_at(self, progress: float) -> float:
        """Return the weight as it is when a share of the training is over."""
        factor = 1.0 if self.controller is None else self.controller.factor
        return scheduled(self.weight, self.schedule, progress) * factor

    def adapt(self, value: Tensor) -> None:
        """Let the controller learn of the value."""
        if self.controller is not None:
            self.controller.update(float(value), self.raises_value)


class RowPenalty(WeightedConstraint):
    """A penalty on each row as a whole, descended by the policy gradient.

        loss_t = weight * rho_t * penalty(row),  rho_t = p(y_t) / behaviour(y_t)

    Where the student itself wrote (rho = 1), the expected gradient of the sum over a row is that of the expected
    penalty. No baseline is subtracted: the penalty should be 0 for rows that are as they ought to be.
    """

    @abstractmethod
    def penalty(self, evidence: Evidence) -> Tensor:
        """Return the penalty of each row at each of its tokens, (n,), without gradient."""

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted surrogate; the value is the penalty."""
        penalty = self.penalty(evidence).to(evidence.student.sampled.dtype)
        ratio = log_ratio(evidence).exp()
        return TokenLoss(self.scale(evidence) * ratio * penalty, penalty, evidence.written_by(Author.STUDENT))


#: Largest logarithm of a ratio of which the exponential is taken; beyond it the number would mean nothing.
LARGEST_LOG_RATIO = 20.0


def log_ratio(evidence: Evidence) -> Tensor:
    """Return log p - log behaviour of the written tokens, (n,), at most `LARGEST_LOG_RATIO`."""
    return (evidence.student.sampled - evidence.behaviour_logprobs).clamp(max=LARGEST_LOG_RATIO)
