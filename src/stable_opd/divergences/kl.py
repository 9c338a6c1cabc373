"""Kullback-Leibler divergences over the whole vocabulary."""

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


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Return sum_v p_v x_v of each position, (n, V) twice -> (n,), without a tensor of (n, V) in between."""
    return torch.bmm(probs[:, None], values[:, :, None])[:, 0, 0]


def reverse_kl_and_gradient(student: Scores, other: Scores, out: Tensor) -> Tensor:
    """Return `reverse_kl` to the other and write its gradient in the student's logits, p_v (log p_v - log q_v - KL).

    Args:
        student: The student's scores of n positions.
        other: Those of the model it is held against.
        out: Memory for the gradient, (n, V).

    Returns:
        Divergence of each position, (n,).
    """
    gap = torch.sub(student.logprobs, other.logprobs, out=out)
    divergence = expectation(student.probs, gap)
    gap.sub_(divergence[:, None]).mul_(student.probs)
    return divergence


class ReverseKL(Divergence):
    """Reverse KL to the teacher, exact over the whole vocabulary.

        KL(p || q) = sum_v p_v (log p_v - log q_v) at every position of the student's own rollouts

    Mode-seeking: the student learns to avoid what the teacher finds unlikely. It is the expectation of
    `SampledReverseKL` over the next token, without that estimator's variance; the sampled form needs only one number
    per position from the teacher, which a server can give.

    Source: Agarwal et al. 2024 (GKD, arXiv 2306.13649); Gu et al. 2024 (MiniLLM, arXiv 2306.08543).
    """

    support: Support = "full"

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = reverse_kl(evidence.student.logprobs, evidence.teacher.logprobs)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient in the logits."""
        loss = reverse_kl_and_gradient(evidence.student, evidence.teacher, out)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))


class ForwardKL(Divergence):
    """Forward KL from the teacher, exact over the whole vocabulary.

        KL(q || p) = sum_v q_v (log q_v - log p_v) at every position of the student's own rollouts

    Mass-covering: the student is asked to spread over all that the teacher finds likely, also where it would rather
    not go. Prefer `ReverseKL` for a student that is much smaller than its teacher.

    Source: Agarwal et al. 2024 (GKD, arXiv 2306.13649).
    """

    support: Support = "full"

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = reverse_kl(evidence.teacher.logprobs, evidence.student.logprobs)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient in the logits, p_v - q_v."""
        student, teacher = evidence.student, evidence.teacher
        loss = expectation(teacher.probs, torch.sub(teacher.logprobs, student.logprobs, out=out))
        torch.sub(student.probs, teacher.probs, out=out)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
