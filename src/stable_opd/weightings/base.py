"""The contract of a weighting: how much each token of the student's counts.

A complete plug-in:

    import torch
    from torch import Tensor

    from stable_opd import Look, Weighting

    class SkipFirst(Weighting):
        \"\"\"Learn nothing from the first token of an answer.\"\"\"

        def forward(self, look: Look) -> Tensor:
            return (look.rollout.position > 0).float()
"""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from stable_opd.look import Look
from stable_opd.registry import Component


class Weighting(Component, nn.Module):
    """How much each token of the student's counts in the divergence; several are multiplied."""

    kind: ClassVar[str] = "weighting"
    #: It reads `Look.scores`, for which the student reads the rollout once more, without a gradient.
    needs_scores: bool = False

    @abstractmethod
    def forward(self, look: Look) -> Tensor:
        """Return the weight of each completion token, at least 0, (N,); a weight of 0 takes it out of the mean."""
