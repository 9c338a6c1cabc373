"""What bounds an advantage before it is used, entry by entry."""

import math
from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from stable_opd.registry import Component


class AdvantageTransform(Component):
    """A function of the advantage of each token; one that keeps its sign keeps which tokens are promoted.

    None of them depends on the other tokens of a batch: subtracting a batch's mean can turn the sign of an advantage.
    """

    kind: ClassVar[str] = "transform"

    @abstractmethod
    def __call__(self, advantage: Tensor) -> Tensor:
        """Return the transformed advantages, of the same shape; each depends on its own entry alone."""


class ClipAdvantage(AdvantageTransform):
    """Clip the advantage on both sides.

        max(-limit, min(A, limit))

    Plain, and without effect on what is inside of the limits. Prefer `TanhAdvantage` where the order of large
    advantages matters, and `LowerClip` where only the punished tokens are the trouble.

    Source: Wang et al. 2026 (PowerOPD, arXiv 2606.17199), among what they compare with; a limit of 1 did best there.

    Args:
        limit: The largest advantage in size.
    """

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = _positive("limit", limit)

    def __call__(self, advantage: Tensor) -> Tensor:
        """Return the clipped advantages."""
        return advantage.clamp(-self.limit, self.limit)


class LowerClip(AdvantageTransform):
    """Clip the advantage from below only, so that no single token is punished without bound.

        max(A, log(share) / (1 - share)),  which is -1.72 at a share of 0.3

    Made for log q - log p, which has no lower bound where the teacher rules a token out, while the student hardly ever
    draws what has a large positive one. Prefer `ClipAdvantage` to bound both sides.

    Source: Ko et al. 2026 (REOPOLD, arXiv 2603.11137).

    Args:
        share: Sets the bound, above 0 and below 1; the smaller, the lower it is.
    """

    def __init__(self, share: float = 0.3) -> None:
        if not 0 < share < 1:
            raise ValueError(f"Expected a share above 0 and below 1, but got {share}. Leave the transform out for 0.")
        self.share = share

    def __call__(self, advantage: Tensor) -> Tensor:
        """Return the advantages, raised to the bound where they are below."""
        return advantage.clamp(min=math.log(self.share) / (1 - self.share))


class TanhAdvantage(AdvantageTransform):
    """Squash the advantage into (-1, 1), smoothly.

        tanh(A / scale)

    It keeps sign and order and has no kink. Near 0 it is A / scale, so the gradient of most tokens shrinks by that
    factor and the learning rate should follow. `ClipAdvantage` leaves small advantages as they are.

    Source: Wang et al. 2026 (PowerOPD, arXiv 2606.17199), among what they compare with.

    Args:
        scale: The advantage that becomes tanh(1) = 0.76.
    """

    def __init__(self, scale: float = 5.0) -> None:
        self.scale = _positive("scale", scale)

    def __call__(self, advantage: Tensor) -> Tensor:
        """Return the squashed advantages."""
        return (advantage / self.scale).tanh()


class SoftLog(AdvantageTransform):
    """Compress large advantages to their logarithm.

        sign(A) log(1 + |A|)

    It has no bound, but what is ten times as large counts little more; small advantages stay as they are. Prefer
    `ClipAdvantage` or `TanhAdvantage` for a bound.

    Source: the study of two modes of length exploitation (arXiv 2607.13399).
    """

    def __call__(self, advantage: Tensor) -> Tensor:
        """Return the compressed advantages."""
        return advantage.sign() * advantage.abs().log1p()


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"Expected a {name} above 0, but got {value}. Leave the transform out to change nothing.")
    return value
