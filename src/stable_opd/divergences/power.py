"""The difference of powers of the probabilities, from the sampled tokens."""

from torch import Tensor

from stable_opd.divergences.base import AdvantageDivergence
from stable_opd.divergences.baselines import AdvantageBaseline
from stable_opd.divergences.transforms import AdvantageTransform


class PowerAdvantage(AdvantageDivergence):
    """Difference of powers of both probabilities as a token advantage, from -1 to 1 without clipping.

        A_t = q(y_t)^power - p(y_t)^power

    It has the sign of log q - log p, but is small where both models find the token unlikely, so rare tokens make no
    outliers; the larger power, the more it is only about tokens that one of the two is sure of. Where the states are
    taken as given it descends, per position, the power divergence

        sum_v [ (p_v^(power + 1) + power q_v^(power + 1)) / (power + 1) - p_v q_v^power ]

    which is half the squared distance at power = 1. The reported value, minus the advantage, does not estimate it.
    Prefer `SampledReverseKL` with `ClipAdvantage` where rare tokens have to be learnt.

    Source: Wang et al. 2026 (PowerOPD, arXiv 2606.17199); the divergence is that of Basu et al. 1998.

    Args:
        power: The power, above 0.
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the advantages of the row's later tokens, per token, a token gets too; 0 is local.
    """

    def __init__(
        self,
        power: float = 5.0,
        clip: float | None = 0.2,
        dual_clip: float | None = None,
        transform: AdvantageTransform | None = None,
        baseline: AdvantageBaseline | None = None,
        discount: float = 0.0,
    ) -> None:
        super().__init__(clip, dual_clip, transform, baseline, discount)
        if not power > 0:
            raise ValueError(f"Expected power above 0, but got {power}. Use SampledReverseKL for the limit at 0.")
        self.power = power

    def advantage(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return q^power - p^power."""
        return (self.power * teacher).exp() - (self.power * student).exp()
