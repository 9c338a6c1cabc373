"""The contract of a repetition detector: which tokens sit inside a loop.

A complete plug-in:

    from stable_opd import Repetition, RepetitionDetector, Rollout

    class EndsLikeItBegan(RepetitionDetector):
        \"\"\"Flag rows whose last token is their first.\"\"\"

        def forward(self, rollout: Rollout) -> Repetition:
            ends = rollout.lengths.cumsum(0) - 1
            first = rollout.completion[ends - rollout.lengths + 1]
            repetitive = rollout.completion[ends] == first
            return Repetition(repetitive[rollout.row], repetitive)
"""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from stable_opd.registry import Component
from stable_opd.types import Finish, Repetition, Rollout


class RepetitionDetector(Component, nn.Module):
    """Which tokens sit inside a loop, and which rows count as repetitive."""

    kind: ClassVar[str] = "repetition"

    @abstractmethod
    def forward(self, rollout: Rollout) -> Repetition:
        """Return a mark per completion token and a flag per row; it reads tokens or texts."""


def answer_lengths(rollout: Rollout) -> Tensor:
    """Return the tokens of each row without the stop token at its end, (B,)."""
    return (rollout.lengths - (rollout.finish == Finish.STOP).long()).clamp(min=0)
