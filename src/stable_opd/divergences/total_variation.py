"""The total variation distance."""

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.kl import expectation
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1/2 sum_v |p_v - q_v|.

    Args:
        student: Log-probs log p over the last axis, (..., V).
        teacher: Log-probs log q over the last axis, (..., V).

    Returns:
        Distance of each position, (...), from 0 to 1.
    """
    return (student.exp() - teacher.exp()).abs().sum(-1) / 2


class TotalVariation(Divergence):
    """Total variation distance, exact over the whole vocabulary.

        1/2 sum_v |p_v - q_v|, from 0 to 1

    The share of the student's mass that would have to move. It counts probability and not its logarithm, so unlikely
    tokens hardly matter; the gradient asks only which of the two is larger (where both are equal it takes 0), so it
    does not shrink as the student comes close. Prefer `JensenShannon` for a bound with a smooth approach, and
    `ReverseKL` where rare tokens that the teacher rules out do harm.

    Source: Wen et al. 2023 (f-DISTILL, arXiv 2307.15190).
    """

    support: Support = "full"

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the distance of each position."""
        loss = total_variation(evidence.student.logprobs, evidence.teacher.logprobs)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the distance and write its gradient, p_v (s_v - E_p s) / 2 with s the sign of p - q."""
        probs = evidence.student.probs
        gap = torch.sub(probs, evidence.teacher.probs, out=out)
        loss = torch.linalg.vector_norm(gap, ord=1, dim=-1) / 2
        sign = gap.sign_()
        sign.sub_(expectation(probs, sign)[:, None]).mul_(probs).mul_(0.5)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
