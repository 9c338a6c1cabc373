"""Sampling at a temperature."""

from typing import Any

import torch
from torch import Tensor

from stable_opd.samplers.base import Sampler


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits (B, V) by a temperature; at 0 every token but the likeliest is ruled out."""
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -float("inf")).scatter(-1, best, 0.0)
    return logits if temperature == 1 else logits / temperature


def check_temperature(temperature: float) -> float:
    """Return a temperature that makes sense.

    Raises:
        ValueError: If it is negative.
    """
    if temperature < 0:
        raise ValueError(f"Expected a temperature of at least 0 (0 is greedy decoding), but got {temperature}.")
    return temperature


class Temperature(Sampler):
    """Draw from softmax(logits / temperature); 0 is greedy decoding.

    On-policy distillation assumes that the student's rollouts follow the student itself, which is a temperature of 1.

    Source: the temperature of the Boltzmann distribution (Ackley, Hinton and Sejnowski 1985).

    Args:
        temperature: Below 1 sharpens the distribution, above 1 flattens it.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    @property
    def follows_student(self) -> bool:
        """Whether the temperature changes nothing."""
        return self.temperature == 1

    def forward(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Return the logits divided by the temperature, (B, V)."""
        return tempered(logits, self.temperature)

    def request(self) -> dict[str, Any]:
        """Return the temperature under a server's name for it."""
        return {"temperature": self.temperature}
