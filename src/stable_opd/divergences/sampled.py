"""Reverse KL estimated from the sampled tokens."""

from torch import Tensor

from stable_opd.divergences.base import AdvantageDivergence
from stable_opd.types import Evidence


class SampledReverseKL(AdvantageDivergence):
    """Sampled-token reverse KL as a token advantage in the clipped surrogate: the objective of the Stable-OPD paper.

        A_t = log q(y_t) - log p(y_t),  loss_t = -min(rho_t A_t, clamp(rho_t, 1 - clip, 1 + clip) A_t)

    with rho_t the ratio of the student to whoever drew the token. At rho = 1 its expected gradient is that of
    `ReverseKL` at the visited states. No return-to-go, no discount, no normalisation of the advantages.

    Source: Luo et al. 2026 (arXiv 2604.08527, eqs 3 to 6). Prefer `ReverseKL` where the teacher is at hand: the same
    gradient without the variance of the sampled token.

    Args:
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut.
    """

    positionwise: bool = True

    def advantage(self, evidence: Evidence) -> Tensor:
        """Return log q - log p of the written tokens, (n,)."""
        return evidence.teacher.sampled - evidence.student.sampled
