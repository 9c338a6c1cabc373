"""KL divergences to a mixture of teacher and student."""

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.jensen_shannon import mixture_logprobs
from stable_opd.divergences.kl import expectation, reverse_kl
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def skew_reverse_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """Return KL(p || (1 - skew) q + skew p), in nats.

    Args:
        student: Log-probs log p over the last axis, (..., V).
        teacher: Log-probs log q over the last axis, (..., V).
        skew: Share of the student in the mixture, between 0 and 1.

    Returns:
        Divergence of each position, (...); at most log(1 / skew).
    """
    return reverse_kl(student, mixture_logprobs(student, teacher, 1 - skew))


def skew_forward_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """Return KL(q || skew q + (1 - skew) p), in nats.

    Args:
        student: Log-probs log p over the last axis, (..., V).
        teacher: Log-probs log q over the last axis, (..., V).
        skew: Share of the teacher in the mixture, between 0 and 1.

    Returns:
        Divergence of each position, (...); at most log(1 / skew).
    """
    return reverse_kl(teacher, mixture_logprobs(student, teacher, skew))


def _checked(skew: float, limit: str) -> float:
    if not 0 < skew < 1:
        raise ValueError(
            f"Expected skew above 0 and below 1, but got {skew}. Use {limit} for the limit at 0; at 1 nothing is left "
            "to learn."
        )
    return skew


class SkewReverseKL(Divergence):
    """Reverse KL to a mixture of the teacher with a little of the student.

        KL(p || m),  m = (1 - skew) q + skew p

    The gradient flows through both p. Mode-seeking as `ReverseKL`, to which it tends as skew goes to 0, but at most
    log(1 / skew), so a token that the teacher rules out cannot dominate a batch. Prefer `ReverseKL` where such tokens
    are what the student has to unlearn: the bound weakens their gradient too.

    Source: Ko et al. 2024 (DistiLLM, arXiv 2402.03898).

    Args:
        skew: Share of the student in the mixture, above 0 and below 1.
    """

    support: Support = "full"

    def __init__(self, skew: float = 0.1) -> None:
        super().__init__()
        self.skew = _checked(skew, "ReverseKL")

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = skew_reverse_kl(evidence.student.logprobs, evidence.teacher.logprobs, self.skew)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient, p_v (h_v - E_p h) with h = log p - log m - skew p / m."""
        student, teacher = evidence.student, evidence.teacher
        mixture = mixture_logprobs(student.logprobs, teacher.logprobs, 1 - self.skew)
        slope = torch.sub(student.logprobs, mixture, out=out)
        loss = expectation(student.probs, slope)
        slope.sub_(torch.exp(slope, out=mixture), alpha=self.skew)
        slope.sub_(expectation(student.probs, slope)[:, None]).mul_(student.probs)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))


class SkewForwardKL(Divergence):
    """Forward KL from the teacher to a mixture of the student with a little of the teacher.

        KL(q || m),  m = skew q + (1 - skew) p

    Mass-covering as `ForwardKL`, to which it tends as skew goes to 0, but at most log(1 / skew) where the student
    gives the teacher's tokens next to nothing; there its gradient fades. Prefer `ForwardKL` for a student that has yet
    to learn the teacher's tokens, and `SkewReverseKL` for one that is to avoid what the teacher finds unlikely.

    Source: Ko et al. 2024 (DistiLLM, arXiv 2402.03898).

    Args:
        skew: Share of the teacher in the mixture, above 0 and below 1.
    """

    support: Support = "full"

    def __init__(self, skew: float = 0.1) -> None:
        super().__init__()
        self.skew = _checked(skew, "ForwardKL")

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = skew_forward_kl(evidence.student.logprobs, evidence.teacher.logprobs, self.skew)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient, p_v sum_w q_w r_w - q_v r_v with r = (1 - skew) p / m."""
        student, teacher = evidence.student, evidence.teacher
        mixture = mixture_logprobs(student.logprobs, teacher.logprobs, self.skew)
        loss = expectation(teacher.probs, torch.sub(teacher.logprobs, mixture, out=out))
        # r is the student's share of the mixture: it lies between 0 and 1 whatever the logits are.
        pull = torch.sub(student.logprobs, mixture, out=out).exp_().mul_(teacher.probs).mul_(1 - self.skew)
        total = pull.sum(-1)
        torch.addcmul(pull.neg_(), student.probs, total[:, None], out=out)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
