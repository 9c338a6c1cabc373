"""Kullback-Leibler divergences over the whole vocabulary."""

from typing import ClassVar

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, Scores, TokenLoss


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


def reverse_kl_and_gradient(student: Scores, other: Scores) -> tuple[Tensor, Tensor]:
    """Return `reverse_kl` to the other and its gradient in the student's logits, p_v (log p_v - log q_v - KL).

    Returns:
        Divergence of each position (n,), and gradient (n, V).
    """
    gap = student.logprobs - other.logprobs
    divergence = torch.linalg.vecdot(student.probs, gap)
    return divergence, gap.sub_(divergence[:, None]).mul_(student.probs)


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

    def closed_form(self, evidence: Evidence) -> tuple[TokenLoss, Tensor]:
        """Return the divergence and its gradient in the logits."""
        loss, gradient = reverse_kl_and_gradient(evidence.student, evidence.teacher)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT)), gradient


class ForwardKL(Divergence):
    """Forward KL from the teacher, exact over the whole vocabulary.

        KL(q || p) = sum_v q_v (log q_v - log p_v) at every position of the student's own rollouts

    Mass-covering: the student is asked to spread over all that the teacher finds likely, also where it would rather
    not go. Prefer `ReverseKL` for a student that is much smaller than its teacher.

    Source: Agarwal et al. 2024 (GKD, arXiv 2306.13649).
    """

    support: ClassVar[Support] = "full"

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = reverse_kl(evidence.teacher.logprobs, evidence.student.logprobs)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence) -> tuple[TokenLoss, Tensor]:
        """Return the divergence and its gradient in the logits, p_v - q_v."""
        student, teacher = evidence.student, evidence.teacher
        loss = torch.linalg.vecdot(teacher.probs, teacher.logprobs - student.logprobs)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT)), student.probs - teacher.probs
