"""The mean of both KL divergences."""

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.kl import expectation, reverse_kl
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return (KL(p || q) + KL(q || p)) / 2, in nats.

    Args:
        student: Log-probs log p over the last axis, (..., V).
        teacher: Log-probs log q over the last axis, (..., V).

    Returns:
        Divergence of each position, (...); infinite where one of the two rules out a token and the other does not.
    """
    return (reverse_kl(student, teacher) + reverse_kl(teacher, student)) / 2


class SymmetricKL(Divergence):
    """Mean of the reverse and the forward KL, exact over the whole vocabulary.

        (KL(p || q) + KL(q || p)) / 2 = 1/2 sum_v (p_v - q_v) (log p_v - log q_v)

    The forward half teaches tokens that the student gives nothing, the reverse half takes back those that the teacher
    gives nothing. It is unbounded on either side, because it is at least half of the larger KL; prefer `JensenShannon`
    for a divergence that is bounded and treats both sides alike too.

    Source: Ko et al. 2024 (DistiLLM, arXiv 2402.03898), among what they compare with; Jeffreys 1946.
    """

    support: Support = "full"

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = symmetric_kl(evidence.student.logprobs, evidence.teacher.logprobs)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient, (p_v (log p_v - log q_v - KL(p || q)) + p_v - q_v) / 2."""
        student, teacher = evidence.student, evidence.teacher
        gap = torch.sub(student.logprobs, teacher.logprobs, out=out)
        reverse, forward = expectation(student.probs, gap), -expectation(teacher.probs, gap)
        gap.sub_((reverse - 1)[:, None]).mul_(student.probs).sub_(teacher.probs).mul_(0.5)
        loss = (reverse + forward) / 2
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
