"""Divergences over the teacher's likeliest tokens."""

from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.kl import reverse_kl
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def restricted(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probs among some tokens only, renormalised, (n, V) and (n, K) -> (n, K)."""
    return logprobs.gather(-1, tokens).log_softmax(-1)


def checked_k(k: int) -> int:
    """Return how many tokens a divergence renormalises on, if that leaves something to learn."""
    if k < 2:
        raise ValueError(f"Expected k of at least 2, but got {k}: on one token there is nothing to learn.")
    return k


def reverse_kl_and_gradient_on(tokens: Tensor, student: Tensor, teacher: Tensor, out: Tensor) -> Tensor:
    """Return KL(p' || q') among some tokens and write its gradient in the logits, p'_v (log p'_v - log q'_v - KL).

    Args:
        tokens: The tokens of each position, (n, K).
        student: Log-probs log p' among them, renormalised, (n, K).
        teacher: Log-probs log q' among them, renormalised, (n, K).
        out: Memory for the gradient, (n, V); 0 at all other tokens.

    Returns:
        Divergence of each position, (n,).
    """
    gap, p = student - teacher, student.exp()
    divergence = (p * gap).sum(-1)
    out.zero_().scatter_(-1, tokens, p * (gap - divergence[:, None]))
    return divergence


class TeacherTopK(Divergence):
    """Reverse KL over the teacher's K likeliest tokens, with student and teacher renormalised on them.

        KL(p' || q'),  p' = p / sum_S p,  q' = q / sum_S q,  S the teacher's K likeliest tokens

    It leaves the student free outside of S. Renormalising both sides matters: without it the gradient promotes a token
    only where the teacher gives it more than e times the student's probability (arXiv 2605.11182), and training
    collapses. Prefer `ReverseKL` where the whole vocabulary is at hand.

    Source: local support matching (arXiv 2603.25562).

    Args:
        k: How many of the teacher's likeliest tokens.
    """

    support: Support = "topk"

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        self.k = checked_k(k)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        tokens, teacher = evidence.teacher.top(self.k)
        loss = reverse_kl(restricted(evidence.student.logprobs, tokens), teacher.log_softmax(-1))
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient in the logits."""
        tokens, teacher = evidence.teacher.top(self.k)
        student = restricted(evidence.student.logprobs, tokens)
        loss = reverse_kl_and_gradient_on(tokens, student, teacher.log_softmax(-1), out)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))


class TeacherTopKForwardKL(Divergence):
    """Forward KL over the teacher's K likeliest tokens, with student and teacher renormalised on them.

        KL(q' || p'),  p' = p / sum_S p,  q' = q / sum_S q,  S the teacher's K likeliest tokens

    Mass-covering among what the teacher finds likely, and silent about the rest: all that the student gives to tokens
    outside of S is left where it is. Prefer `TeacherTopK` for a student that cannot follow the teacher everywhere, and
    `ForwardKL` where the whole vocabulary is at hand.

    Source: Jin et al. 2026 (EOPD, arXiv 2603.07079), where it is the term of uncertain teachers (`EntropyAware`).

    Args:
        k: How many of the teacher's likeliest tokens.
    """

    support: Support = "topk"

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        self.k = checked_k(k)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        tokens, teacher = evidence.teacher.top(self.k)
        loss = reverse_kl(teacher.log_softmax(-1), restricted(evidence.student.logprobs, tokens))
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient in the logits, p'_v - q'_v on S."""
        tokens, teacher = evidence.teacher.top(self.k)
        student, teacher = restricted(evidence.student.logprobs, tokens), teacher.log_softmax(-1)
        q = teacher.exp()
        loss = (q * (teacher - student)).sum(-1)
        out.zero_().scatter_(-1, tokens, student.exp() - q)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
