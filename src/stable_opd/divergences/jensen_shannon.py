"""The generalised Jensen-Shannon divergence."""

import math

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.kl import expectation, reverse_kl
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def mixture_logprobs(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the log-probs of m = beta q + (1 - beta) p, (..., V)."""
    return torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p, in nats.

    Args:
        student: Log-probs log p over the last axis, (..., V).
        teacher: Log-probs log q over the last axis, (..., V).
        beta: Share of the teacher in the mixture, between 0 and 1.

    Returns:
        Divergence of each position, (...); at most the entropy of (beta, 1 - beta).
    """
    mixture = mixture_logprobs(student, teacher, beta)
    return beta * reverse_kl(teacher, mixture) + (1 - beta) * reverse_kl(student, mixture)


class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence, exact over the whole vocabulary.

        beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

    Bounded, unlike both KL divergences, so no single position can dominate a batch; between them in what it favours.
    Divided by beta it tends to `ForwardKL` as beta goes to 0, and divided by 1 - beta to `ReverseKL` as it goes to 1.

    Source: Agarwal et al. 2024 (GKD, arXiv 2306.13649); beta as in TRL.

    Args:
        beta: Share of the teacher in the mixture, above 0 and below 1.
    """

    support: Support = "full"

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        if not 0 < beta < 1:
            raise ValueError(
                f"Expected beta above 0 and below 1, but got {beta}. Use ForwardKL for the limit at 0 and ReverseKL "
                "for that at 1."
            )
        self.beta = beta

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = jensen_shannon(evidence.student.logprobs, evidence.teacher.logprobs, self.beta)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient, (1 - beta) p_v (log p_v - log m_v - KL(p || m))."""
        student, teacher = evidence.student, evidence.teacher
        mixture = mixture_logprobs(student.logprobs, teacher.logprobs, self.beta)
        of_teacher = expectation(teacher.probs, torch.sub(teacher.logprobs, mixture, out=out))
        gap = torch.sub(student.logprobs, mixture, out=out)
        of_student = expectation(student.probs, gap)
        gap.sub_(of_student[:, None]).mul_(student.probs).mul_(1 - self.beta)
        loss = self.beta * of_teacher + (1 - self.beta) * of_student
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
