"""Reverse KL over the teacher's likeliest tokens and one event for all others."""

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.kl import reverse_kl
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def least_remainder(dtype: torch.dtype) -> float:
    """Return what a remainder is raised to: 8 times the rounding of the dtype, 9.5e-7 in float32."""
    return 8 * torch.finfo(dtype).eps


def with_bucket(head: Tensor) -> Tensor:
    """Return the log-probs of some tokens and, as one more event, of all others together.

        log(1 - min(sum_S p, 1 - least)) for the others, and all K + 1 renormalised

    1 - sum_S p is known to rounding alone. Without the `least_remainder`, a head that holds everything would make it
    log 0, or the log of less than that, and what is as small as the rounding would be off by a factor.

    Args:
        head: Log-probs of the tokens in S, (n, K).

    Returns:
        Log-probs of a distribution, (n, K + 1).
    """
    held = head.exp().sum(-1, keepdim=True)
    rest = torch.log1p(-held.clamp(max=1 - least_remainder(head.dtype)))
    return torch.cat([head, rest], -1).log_softmax(-1)


def tail_bucket_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the reverse KL of K + 1 events: some tokens, and all others together.

    Args:
        student: The student's log-probs of the tokens, (n, K).
        teacher: The teacher's log-probs of the same tokens, (n, K).

    Returns:
        Divergence of each position, (n,).
    """
    return reverse_kl(with_bucket(student), with_bucket(teacher))


class TailBucketTopK(Divergence):
    """Reverse KL over the teacher's K likeliest tokens and one bucket that holds the rest on both sides.

        sum_S p_v (log p_v - log q_v) + p_rest (log p_rest - log q_rest),  p_rest = 1 - sum_S p

    Merging events never adds to a divergence, so this is at least 0 and at most `ReverseKL`, which it reaches as k
    grows. Unlike `TeacherTopK` it sees how much the student gives to tokens outside of S, and takes it back; inside of
    the bucket all tokens are treated alike. A remainder below 9.5e-7 counts as that much, so the bucket is pushed down
    by at most 14 nats; prefer `ReverseKL` where the whole vocabulary is at hand.

    Source: KAT (arXiv 2606.09471), which measures by it; as a remedy in arXiv 2605.11182.

    Args:
        k: How many of the teacher's likeliest tokens stand for themselves.
    """

    support: Support = "topk"

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"Expected k of at least 1, but got {k}. With the bucket alone there is nothing to learn.")
        self.k = k

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        tokens, teacher = evidence.teacher.top(self.k)
        loss = tail_bucket_kl(evidence.student.logprobs.gather(-1, tokens), teacher)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient: p_v h_v on S, p_v h_rest elsewhere, h = log p - log q - KL.

        That is what it is where no remainder was raised; where the student's was, the bucket has no gradient.
        """
        tokens, teacher = evidence.teacher.top(self.k)
        head = evidence.student.logprobs.gather(-1, tokens)
        student = with_bucket(head)
        gap, events = student - with_bucket(teacher), student.exp()
        loss = (events * gap).sum(-1)
        slope = events * (gap - loss[:, None])
        # Back from the events to the log-probs of S, by which the bucket is known, and from these to the logits.
        p = head.exp()
        rest = 1 - p.sum(-1, keepdim=True)
        known = rest >= least_remainder(head.dtype)
        in_head = slope[:, :-1] - p * (slope[:, -1:] / rest).where(known, 0)
        torch.mul(evidence.student.probs, -in_head.sum(-1, keepdim=True), out=out).scatter_add_(-1, tokens, in_head)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
