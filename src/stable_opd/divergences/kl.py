"""Kullback-Leibler divergences over the whole vocabulary."""

from typing import ClassVar

from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(student || teacher) = sum_v p_v (log p_v - log q_v), in nats.

    Args:
        student: Log-probs log p over the last axis, (..., V).
        teacher: Log-probs log q over the last axis, (..., V).

    Returns:
        Divergence of each position, (...). A token that the student rules out (p = 0) contributes nothing; one that
        only the teacher rules out makes it infinite.
    """
    p = student.exp()
    gap = (student - teacher).masked_fill(p == 0, 0)
    return (p * gap).sum(-1)


class ReverseKL(Divergence):
    """Reverse KL to the teacher, exact over the whole vocabulary.

        KL(p || q) = sum_v p_v (log p_v - log q_v) at every position of the student's own rollouts

    Mode-seeking: the student learns to avoid what the teacher finds unlikely. It is the expectation of
    `SampledReverseKL` over the next token, without that estimator's variance; the sampled form needs only one number
    per position from the teacher, which a server can give.

    Source: Agarwal et al. 2024 (GKD, arXiv 2306.13649); Gu et al. 2024 (MiniLLM, arXiv 2306.08543).
    """

    support: ClassVar[Support] = "full"

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = reverse_kl(evidence.student.logprobs, evidence.teacher.logprobs)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))
