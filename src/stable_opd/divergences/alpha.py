"""The alpha-divergence, between both KL divergences."""

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """Return (1 - sum_v q_v^alpha p_v^(1 - alpha)) / (alpha (1 - alpha)).

    Args:
        student: Log-probs log p over the last axis, (..., V).
        teacher: Log-probs log q over the last axis, (..., V).
        alpha: Weight of the teacher in the geometric mean, between 0 and 1.

    Returns:
        Divergence of each position, (...), from 0 to 1 / (alpha (1 - alpha)).
    """
    # The 1 as the weighted mean of both sums: token by token that is no less than the geometric mean, and equal where
    # p = q, so rounding in the sum of the probabilities is not taken for a divergence.
    arithmetic = alpha * teacher.exp() + (1 - alpha) * student.exp()
    # Between minus infinity and anything, the interpolation is not a number.
    geometric = _geometric(student, teacher, alpha).nan_to_num(nan=-torch.inf, neginf=-torch.inf).exp()
    return (arithmetic - geometric).sum(-1) / (alpha * (1 - alpha))


def _geometric(student: Tensor, teacher: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """Return alpha log q + (1 - alpha) log p; in logarithms, because a power of their ratio can overflow."""
    return torch.lerp(student, teacher, alpha, out=out)


class AlphaDivergence(Divergence):
    """Alpha-divergence, exact over the whole vocabulary: from the reverse to the forward KL.

        (1 - sum_v q_v^alpha p_v^(1 - alpha)) / (alpha (1 - alpha))

    Its gradient is that of the token advantage (u^alpha - 1) / alpha with u = q / p. It tends to `ReverseKL` as alpha
    goes to 0 and to `ForwardKL` as alpha goes to 1; at 1/2 it is four times the squared Hellinger distance. It is at
    most 1 / (alpha (1 - alpha)); outside of 0 to 1 it would be infinite as soon as one side rules out a token, so such
    alpha are refused. Rounding grows by the same factor: prefer the KL divergences to an alpha next to a limit, and
    `JensenShannon` where the bound is to be small.

    Source: OPD+ (arXiv 2606.01039) for the advantage; Amari 2009 for the family, with alpha as (1 + his alpha) / 2.

    Args:
        alpha: Weight of the teacher in the geometric mean, above 0 and below 1.
    """

    support: Support = "full"

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(
                f"Expected alpha above 0 and below 1, but got {alpha}. Use ReverseKL for the limit at 0 and ForwardKL "
                "for that at 1; beyond them the divergence can be infinite."
            )
        self.alpha = alpha

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        loss = alpha_divergence(evidence.student.logprobs, evidence.teacher.logprobs, self.alpha)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient, (p_v sum_w g_w - g_v) / alpha with g = q^alpha p^(1-alpha)."""
        student, teacher, alpha = evidence.student, evidence.teacher, self.alpha
        geometric = _geometric(student.logprobs, teacher.logprobs, alpha, out).exp_()
        total, ours = geometric.sum(-1), student.probs.sum(-1)
        loss = (alpha * teacher.probs.sum(-1) + (1 - alpha) * ours - total) / (alpha * (1 - alpha))
        # Divided by the sum of p, which is 1 but for rounding, so that equal distributions give no gradient.
        torch.addcmul(geometric.neg_(), student.probs, (total / ours)[:, None], out=out).div_(alpha)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))
