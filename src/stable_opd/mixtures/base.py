"""The contract of a mixture: whose text the student learns from.

`plan` says who writes each row; `forward` is the loss of the rows that the student did not write. `GoldenMixture` is
the pattern to follow.
"""

from abc import abstractmethod
from typing import ClassVar

from stable_opd.terms import LossTerm
from stable_opd.types import Plan, Prompts


class Mixture(LossTerm):
    """Whose text the student learns from; its loss is called on the rows that the student did not write."""

    kind: ClassVar[str] = "mixture"
    needs_golden: bool = False

    @abstractmethod
    def plan(self, prompts: Prompts, samples: int, progress: float) -> Plan:
        """Say who writes which row.

        Args:
            prompts: The batch.
            samples: Rollouts per prompt that the user asked for.
            progress: Share of the training that is over, from 0 to 1.

        Returns:
            One entry per row, in the order in which the rows are to stand.
        """
