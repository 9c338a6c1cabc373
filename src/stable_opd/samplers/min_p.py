"""Sampling from the tokens that are not much less likely than the likeliest."""

import math
from typing import Any

from torch import Tensor

from stable_opd.samplers.base import Sampler
from stable_opd.samplers.temperature import check_temperature, tempered


def near_likeliest(logits: Tensor, min_p: float) -> Tensor:
    """Rule out tokens of less than ``min_p`` times the probability of the likeliest, (B, V) -> (B, V)."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -float("inf"))


class MinP(Sampler):
    """Draw from the tokens that are at least min_p times as likely as the likeliest.

        q(v) ~ p(v) [p(v) >= min_p * max p]

    Where the student is sure few tokens stay, where it is not many do, and no long tail of unlikely tokens is kept to
    fill up a sum: prefer it to `TopP` at temperatures above 1. Tokens that are ruled out are never visited, and the
    distribution drawn from is not the student's own unless min_p is 0 and the temperature 1.

    Source: Nguyen et al. 2024 (arXiv 2407.01082).

    Args:
        min_p: Share of the likeliest token's probability that a token must have, from 0 (keeps all) to 1.
        temperature: Divides the logits first; below 1 sharpens the distribution, above 1 flattens it.
    """

    def __init__(self, min_p: float = 0.05, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 <= min_p <= 1:
            raise ValueError(f"Expected min_p of at least 0 (keeps all tokens) and at most 1, but got {min_p}.")
        self.min_p = min_p
        self.temperature = check_temperature(temperature)

    @property
    def follows_student(self) -> bool:
        """Whether no token is ruled out, and the temperature changes nothing."""
        return self.min_p == 0 and self.temperature == 1

    def forward(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Return the logits of the tokens that are kept, (B, V)."""
        return near_likeliest(tempered(logits, self.temperature), self.min_p)

    def request(self) -> dict[str, Any]:
        """Return min_p and the temperature under a server's names for them."""
        return {"min_p": self.min_p, "temperature": self.temperature}
