"""Reverse KL with an exact head and a sampled tail."""

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, Scores, TokenLoss


def head_tail_kl(head: Tensor, gap: Tensor, ratio: Tensor, tail_gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the value of an estimate of KL(p || q), exact on S and sampled outside of it.

        value = sum_S p_v L_v + rho L_y,  loss = value + (1 - sum_S p_v - rho),  L = log p - log q

    rho is p(y) / mu(y) if the written token y, drawn from mu, lies outside of S, and 0 otherwise. The expectation of
    rho is 1 - sum_S p, so the bracket adds nothing to the expectation. It is there for the slope: differentiating
    L itself gives p_v and rho once more, which cancel over the whole vocabulary, but not over a part of it; the bracket
    takes them back, and what is left vanishes draw by draw where p = q.

    Args:
        head: Probabilities p_v on S, (n, K).
        gap: Log-ratios L_v on S, (n, K).
        ratio: The importance ratio rho, (n,).
        tail_gap: Log-ratio L_y of the written token, (n,).

    Returns:
        Loss and value of each position, (n,) each, both without bias.
    """
    value = (head * gap).sum(-1) + ratio * tail_gap
    return value + (1 - head.sum(-1) - ratio), value


class HeadTailKL(Divergence):
    """Reverse KL, exact on the student's K likeliest tokens and estimated from the written token outside of them.

        sum_S p_v (log p_v - log q_v) + 1[y not in S] rho (log p_y - log q_y),  rho = p_y / mu_y

    with S the student's K likeliest tokens, y the written token and mu whoever drew it. Value and gradient are those of
    `ReverseKL` in expectation for every k: k = 0 is the sampled estimate and k >= V exact. Only the tail needs rho,
    since the head does not depend on the draw. The log-ratios have no gradient of their own; their slopes sum to
    nothing over the vocabulary, but would not over a part of it. Prefer `ReverseKL` where the teacher's whole
    distribution is at hand anyway: there it has no variance at all.

    Source: EMA-PG (arXiv 2602.04417). A token drawn by a sampler that can never draw some of the tail leaves a bias.

    Args:
        k: How many of the student's likeliest tokens are summed over.
    """

    support: Support = "full"  # of the teacher too, whose likeliest tokens are others

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        if k < 0:
            raise ValueError(f"Expected k of at least 0, but got {k}. Use 0 for the sampled estimate alone.")
        self.k = k

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the loss of each position; its number and the value differ by what is 0 in expectation."""
        tokens, head, gap = _on_head(evidence.student, evidence.teacher, self.k)
        loss, value = head_tail_kl(head, gap, *_on_tail(evidence, tokens))
        return TokenLoss(loss, value.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the loss and write its gradient, c_v - p_v sum_w c_w with c = p L on S and rho L at the token."""
        tokens, head, gap = _on_head(evidence.student, evidence.teacher, self.k)
        ratio, tail_gap = _on_tail(evidence, tokens)
        loss, value = head_tail_kl(head, gap, ratio, tail_gap)
        # The value is the sum of all c.
        torch.mul(evidence.student.probs, -value[:, None], out=out).scatter_add_(-1, tokens, head * gap)
        out.scatter_add_(-1, evidence.tokens[:, None], (ratio * tail_gap)[:, None])
        return TokenLoss(loss, value, evidence.written_by(Author.STUDENT))


def _on_head(student: Scores, teacher: Scores, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's likeliest tokens, their probabilities p and log p - log q, (n, K) each."""
    tokens, logprobs = student.top(k)
    head = logprobs.exp()
    return tokens, head, (logprobs - teacher.logprobs.gather(-1, tokens)).masked_fill(head == 0, 0)


def _on_tail(evidence: Evidence, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return rho, which is 0 for written tokens that are among those chosen, (n, K), and log p - log q, (n,) each."""
    student = evidence.student.sampled
    inside = (chosen == evidence.tokens[:, None]).any(-1)
    ratio = (student - evidence.behaviour_logprobs).masked_fill(inside, -torch.inf).exp()
    return ratio, student - evidence.teacher.sampled
