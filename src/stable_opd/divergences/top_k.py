"""Divergences over the teacher's likeliest tokens."""

from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.kl import reverse_kl
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def restricted(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probs among some tokens only, renormalised, (n, V) and (n, K) -> (n, K)."""
    return logprobs.gather(-1, tokens).log_softmax(-1)


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

    support: Support = "full"

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        if k < 2:
            raise ValueError(f"Expected k of at least 2, but got {k}: on one token there is nothing to learn.")
        self.k = k

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        tokens = self._tokens(evidence)
        teacher = restricted(evidence.teacher.logprobs, tokens)
        loss = reverse_kl(restricted(evidence.student.logprobs, tokens), teacher)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient in the logits, p'_v (log p'_v - log q'_v - KL) on S."""
        tokens = self._tokens(evidence)
        student = restricted(evidence.student.logprobs, tokens)
        gap = student - restricted(evidence.teacher.logprobs, tokens)
        p = student.exp()
        loss = (p * gap).sum(-1)
        out.zero_().scatter_(-1, tokens, p * (gap - loss[:, None]))
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))

    def _tokens(self, evidence: Evidence) -> Tensor:
        logprobs = evidence.teacher.logprobs
        return logprobs.topk(min(self.k, logprobs.shape[-1]), -1).indices
