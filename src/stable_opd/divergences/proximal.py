"""A target between the student and the teacher, from the sampled tokens."""

import torch
from torch import Tensor

from stable_opd.divergences.base import AdvantageDivergence
from stable_opd.divergences.baselines import AdvantageBaseline
from stable_opd.divergences.transforms import AdvantageTransform


def log_mixture(log_u: Tensor, share: float) -> Tensor:
    """Return log(share u + 1 - share), which is exactly 0 at u = 1 and finite at any finite log u.

    Args:
        log_u: The logarithm of u, any shape.
        share: Weight of u, above 0 and below 1.
    """
    below = torch.log1p(share * log_u.clamp(max=0).expm1())
    above = log_u + torch.log1p((1 - share) * (-log_u.clamp(min=0)).expm1())
    return torch.where(log_u > 0, above, below)


class ProximalTeacher(AdvantageDivergence):
    """Sampled-token reverse KL to a target between student and teacher, so that each step is a short one.

        KL(p || m),  m = share q + (1 - share) sg[p],  A_t = log(share u + 1 - share),  u = q(y_t) / p(y_t)

    The student itself is in the target, so no token is punished by more than -log(1 - share), which is 0.22 at the
    default, whatever the teacher says of it. The smaller share, the gentler. Prefer `SampledReverseKL` where tokens
    that the teacher rules out have to go. In the skewed reverse KL the mixture is differentiated too, here it is not.

    Source: TOP-D (arXiv 2607.04751), which uses a share of 0.1 to 0.3, adds the mean of what follows to each token and
    normalises within groups.

    Args:
        share: Share of the teacher in the target, above 0 and below 1.
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for; 0 is local, 1
            the whole answer.
    """

    def __init__(
        self,
        share: float = 0.2,
        clip: float | None = 0.2,
        dual_clip: float | None = None,
        transform: AdvantageTransform | None = None,
        baseline: AdvantageBaseline | None = None,
        discount: float = 0.0,
    ) -> None:
        super().__init__(clip, dual_clip, transform, baseline, discount)
        if not 0 < share < 1:
            raise ValueError(f"Expected share above 0 and below 1, but got {share}. Use SampledReverseKL for 1.")
        self.share = share

    def advantage(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return log(share u + 1 - share)."""
        return log_mixture(teacher - student, self.share)
