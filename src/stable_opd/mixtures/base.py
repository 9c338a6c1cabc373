"""The contract of a mixture: whose text the student learns from.

`plan` says who writes each row; `forward` is the loss of the tokens that the student did not write. A mixture may also
give the teacher a say in every token of the student's rows (`blends`), and add rows of its own to the rollout
(`revise`). `GoldenMixture` is the pattern to follow.
"""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from stable_opd.terms import LossTerm
from stable_opd.types import Plan, Prompts, Rollout


class Mixture(LossTerm):
    """Whose text the student learns from; its loss is called on the tokens that the student did not write."""

    kind: ClassVar[str] = "mixture"
    #: Every prompt has to have a golden solution.
    needs_golden: bool = False
    #: The teacher writes, so it has to be in this process.
    needs_writing_teacher: bool = False
    #: `blend` is called for every token of the student's rows.
    blends: bool = False

    @abstractmethod
    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Say who writes which row.

        Args:
            prompts: The batch.
            samples: Rollouts per prompt that the user asked for.
            progress: Share of the training that is over, from 0 to 1.
            step: Optimizer steps taken so far; random choices are keyed by it (`randomness.key`).

        Returns:
            One entry per row, in the order in which the rows are to stand.
        """

    def blend(self, student: Tensor, teacher: Tensor, progress: float) -> Tensor:
        """Return the logits to draw a token of the student's rows from.

        Args:
            student: Logits of the student, after the sampler, (B, V).
            teacher: Logits of the teacher, (B, V).
            progress: Share of the training that is over, from 0 to 1.
        """
        raise NotImplementedError(f"{type(self).__name__} declares blends = True, but does not define `blend`.")

    def revise(self, rollout: Rollout, step: int) -> Rollout:
        """Return the rollout to learn from: the one that was written, perhaps with rows of the author ``PAST``.

        Args:
            rollout: What was written in this step.
            step: Optimizer steps taken so far.
        """
        return rollout
