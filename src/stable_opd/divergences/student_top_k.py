"""Reverse KL over the student's likeliest tokens."""

from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.kl import reverse_kl
from stable_opd.divergences.top_k import checked_k, restricted, reverse_kl_and_gradient_on
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def student_top_k_kl(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Return KL(p' || q') with both sides renormalised on the student's K likeliest tokens, in nats.

    Args:
        student: Log-probs log p, (n, V).
        teacher: Log-probs log q, (n, V).
        k: How many tokens; all V if k is larger.

    Returns:
        Divergence of each position, (n,).
    """
    tokens = student.topk(min(k, student.shape[-1]), -1).indices
    return reverse_kl(restricted(student, tokens), restricted(teacher, tokens))


class StudentTopK(Divergence):
    """Reverse KL over the student's K likeliest tokens, with student and teacher renormalised on them.

        KL(p' || q'),  p' = p / sum_S p,  q' = q / sum_S q,  S the student's K likeliest tokens

    It ranks what the student would say anyway: which tokens are in S has no gradient, and a token that only the teacher
    likes is never learnt. Prefer `TeacherTopK` for a student that has to take up new tokens, and `ReverseKL` where
    the time allows it.

    Source: vOPD (arXiv 2605.07865), where it is a baseline.

    Args:
        k: How many of the student's likeliest tokens.
    """

    support: Support = "full"  # of the teacher too, whose likeliest tokens are others

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        self.k = checked_k(k)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = student_top_k_kl(evidence.student.logprobs, evidence.teacher.logprobs, self.k)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient in the logits."""
        tokens, student = evidence.student.top(self.k)
        teacher = restricted(evidence.teacher.logprobs, tokens)
        loss = reverse_kl_and_gradient_on(tokens, student.log_softmax(-1), teacher, out)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
