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

    def __init__(self, target: float) -> None:
        super().__init__()
        if target <= 0:
            raise ValueError(f"Expected a target above 0, but got {target}. For a target of 0 use a constant weight.")
        self.target = target
        self.factor = 1.0

    def update(self, value: float) -> None:
        """Learn of the value of a step, and change the factor for the next."""
        if math.isfinite(value):
            self.factor = self.next_factor(value)

    @abstractmethod
    def next_factor(self, value: float) -> float:
        """Return the factor that follows from the present one and the value of a step."""

    def get_extra_state(self) -> Any:
        """Return the factor, for checkpoints."""
        return torch.tensor(self.factor, dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Go on with the factor of a checkpoint."""
        self.factor = float(state)


class Proportional(Controller):
    """Multiply the weight by one plus the clipped relative error, a little in every step.

        factor <- factor * (1 + rate * clamp(value / target - 1, -0.2, 0.2))

    Bounded in how fast it moves, whatever the value is. `DualAscent` answers a large error at once.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), where rate is samples per step over a horizon in samples.

    Args:
        target: The value to hold, in the units of the constraint (nats for a KL).
        rate: How fast the weight moves; 0.1 changes it by at most 2 % in a step.
    """

    def __init__(self, target: float = 0.05, rate: float = 0.1) -> None:
        super().__init__(target)
        self.rate = check_rate(rate)

    def next_factor(self, value: float) -> float:
        """Return the factor, moved by the clipped relative error."""
        error = min(max(value / self.target - 1, -0.2), 0.2)
        return self.factor * (1 + self.rate * error)


class DualAscent(Controller):
    """Ascend the weight as the multiplier of the condition that the value be at most the target.

        factor <- clamp(factor * exp(rate * (value / target - 1)), 1e-3, 1e3)

    The logarithm of the weight follows the integral of the relative error, so it comes to rest only at the target, or
    at the lower limit where the condition holds by itself. `Proportional` is slower and never jumps.

    Source: dual ascent on a KL constraint, as in MPO (Abdolmaleki et al. 2018, arXiv 1806.06920).

    Args:
        target: The value to hold, in the units of the constraint (nats for a KL).
        rate: How fast the weight moves.
    """

    LIMITS: ClassVar[tuple[float, float]] = (1e-3, 1e3)

    def __init__(self, target: float = 0.05, rate: float = 0.1) -> None:
        super().__init__(target)
        self.rate = check_rate(rate)

    def next_factor(self, value: float) -> float:
        """Return the factor, moved by the relative error."""
        low, high = self.LIMITS
        logarithm = math.log(self.factor) + self.rate * (value / self.target - 1)
        return math.exp(min(max(logarithm, math.log(low)), math.log(high)))


def check_rate(rate: float) -> float:
    """Return a rate that makes sense.

    Raises:
        ValueError: If it is not positive.
    """
    if rate <= 0:
        raise ValueError(f"Expected a rate above 0, but got {rate}. Leave the controller out for a constant weight.")
    return rate
