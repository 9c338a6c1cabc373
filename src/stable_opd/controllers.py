"""Controllers: how the weight of a constraint follows the value that the constraint has."""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from stable_opd.registry import Component


class Controller(Component, nn.Module):
    """A factor on a constraint's weight that follows the constraint's value; it is saved with the module.

    Args:
        target: The value to hold, in the units of the constraint (nats for a KL).
    """

    kind: ClassVar[str] = "controller"
    #: Within which the factor stays. Without them it would drift on while the weight makes no difference, and take as
    #: long to come back.
    LIMITS: ClassVar[tuple[float, float]] = (1e-3, 1e3)

    def __init__(self, target: float) -> None:
        super().__init__()
        if not 0 < target < math.inf:
            raise ValueError(f"Expected a target above 0, but got {target}. For a target of 0 use a constant weight.")
        self.target = target
        self.factor = 1.0

    def update(self, value: float, raises_value: bool = False) -> None:
        """Learn of the value of a step, and change the factor for the next.

        Args:
            value: The constraint's value; one that is not finite says nothing and changes nothing.
            raises_value: Whether more weight makes the value larger, as with an entropy.
        """
        if not math.isfinite(value):
            return
        error = value / self.target - 1
        low, high = self.LIMITS
        self.factor = min(max(self.next_factor(-error if raises_value else error), low), high)

    @abstractmethod
    def next_factor(self, error: float) -> float:
        """Return the factor that follows from the present one; it is then brought within the limits.

        Args:
            error: By which share of the target the weight is too small for the value; negative if it is too large.
        """

    def get_extra_state(self) -> Any:
        """Return the factor, for checkpoints."""
        return torch.tensor(self.factor, dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Go on with the factor of a checkpoint."""
        self.factor = float(state)


class Proportional(Controller):
    """Multiply the weight by one plus the clipped relative error, a little in every step.

        factor <- factor * (1 + rate * clamp(value / target - 1, -0.2, 0.2)), within 1e-3 to 1e3

    Bounded in how fast it moves, whatever the value is. `DualAscent` answers a large error at once.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), without limits there. Libraries write the rate as the samples of a
    step over a horizon in samples.

    Args:
        target: The value to hold, in the units of the constraint (nats for a KL).
        rate: How fast the weight moves; 0.1 changes it by at most 2 % in a step.
    """

    CLIP: ClassVar[float] = 0.2

    def __init__(self, target: float = 0.05, rate: float = 0.1) -> None:
        super().__init__(target)
        self.rate = check_rate(rate)
        if self.rate * self.CLIP >= 1:
            raise ValueError(
                f"Expected a rate below {1 / self.CLIP:g}, but got {rate}: one step would take the whole weight away. "
                "Use DualAscent to go faster."
            )

    def next_factor(self, error: float) -> float:
        """Return the factor, moved by the clipped relative error."""
        return self.factor * (1 + self.rate * min(max(error, -self.CLIP), self.CLIP))


class DualAscent(Controller):
    """Ascend the weight as the multiplier of the condition that the value be at most the target.

        factor <- factor * exp(rate * (value / target - 1)), within 1e-3 to 1e3

    The logarithm of the weight follows the integral of the relative error, so it comes to rest only at the target, or
    at a limit: the lower one where the condition holds by itself. A single large value can take it to the upper one;
    `Proportional` is slower and never jumps.

    Source: dual ascent on a KL constraint, as in MPO (Abdolmaleki et al. 2018, arXiv 1806.06920), here in the logarithm
    of the multiplier.

    Args:
        target: The value to hold, in the units of the constraint (nats for a KL).
        rate: How fast the weight moves.
    """

    def __init__(self, target: float = 0.05, rate: float = 0.1) -> None:
        super().__init__(target)
        self.rate = check_rate(rate)

    def next_factor(self, error: float) -> float:
        """Return the factor, moved by the relative error."""
        # The exponential of a large number overflows, and the limits are not far.
        span = math.log(self.LIMITS[1] / self.LIMITS[0])
        return self.factor * math.exp(min(max(self.rate * error, -span), span))


def check_rate(rate: float) -> float:
    """Return a rate that makes sense.

    Raises:
        ValueError: If it is not positive.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"Expected a rate above 0, but got {rate}. Leave the controller out for a constant weight.")
    return rate
