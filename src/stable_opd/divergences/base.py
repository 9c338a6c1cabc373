"""The contract of a divergence: what pulls the student to the teacher.

A complete plug-in:

    from stable_opd import Author, Divergence, Evidence, TokenLoss

    class ForwardKL(Divergence):
        \"\"\"Forward KL over the whole vocabulary.\"\"\"

        support = "full"

        def forward(self, evidence: Evidence) -> TokenLoss:
            p, q = evidence.student.logprobs, evidence.teacher.logprobs
            loss = (q.exp() * (q - p)).sum(-1)
            return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from stable_opd.terms import LossTerm
from stable_opd.types import Author, Evidence, TokenLoss


class Divergence(LossTerm):
    """What pulls the student to the teacher; it is called on the rows that the student wrote."""

    kind: ClassVar[str] = "divergence"
    needs_teacher: bool = True
    weighted: bool = True


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return the clipped policy-gradient loss of PPO and GRPO, per position.

        -min(rho * A, clamp(rho, 1 - clip, 1 + clip) * A),  rho = exp(log_ratio)

    Args:
        log_ratio: Log-prob of the token under the student minus that under whoever drew it, (n,).
        advantage: Advantage A of the token, (n,), without gradient.
        clip: Half-width of the interval in which the ratio may move.

    Returns:
        Losses, (n,).
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class AdvantageDivergence(Divergence):
    """A divergence that is given as an advantage per token and descended by the clipped policy gradient.

    Args:
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut.
    """

    def __init__(self, clip: float = 0.2) -> None:
        super().__init__()
        self.clip = clip

    @abstractmethod
    def advantage(self, evidence: Evidence) -> Tensor:
        """Return the advantage of each written token, (n,); its gradient is not used."""

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the clipped surrogate; the value is minus the advantage."""
        advantage = self.advantage(evidence).detach()
        log_ratio = evidence.student.sampled - evidence.behaviour_logprobs
        loss = clipped_surrogate(log_ratio, advantage, self.clip)
        return TokenLoss(loss, -advantage, evidence.written_by(Author.STUDENT))
