"""Nucleus sampling."""

from typing import Any

from torch import Tensor

from stable_opd.samplers.base import Sampler
from stable_opd.samplers.temperature import check_temperature, tempered


def nucleus(logits: Tensor, p: float) -> Tensor:
    """Rule out all but the smallest set of likeliest tokens whose probabilities reach ``p``, (B, V) -> (B, V)."""
    if p == 1:
        return logits  # rounding of the cumulative sum must not cut the tail off
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the likeliest token has nothing before it, so it always stays
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -float("inf"))


class TopP(Sampler):
    """Draw from the smallest set of likeliest tokens whose probabilities reach p.

    The distribution drawn from is then not the student's own; the importance ratio of the advantage-shaped divergences
    corrects for the tokens that are drawn, but tokens outside the nucleus are never visited.

    Source: Holtzman et al. 2020 (arXiv 1904.09751).

    Args:
        p: Probability that the set must reach, above 0 and at most 1.
        temperature: Divides the logits first; below 1 sharpens the distribution, above 1 flattens it.
    """

    def __init__(self, p: float = 0.9, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise ValueError(f"Expected p above 0 and at most 1, but got {p}.")
        self.p = p
        self.temperature = check_temperature(temperature)

    @property
    def follows_student(self) -> bool:
        """Whether no token is ruled out, and the temperature changes nothing."""
        return self.p == 1 and self.temperature == 1

    def forward(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Return the logits of the nucleus, (B, V)."""
        return nucleus(tempered(logits, self.temperature), self.p)

    def request(self) -> dict[str, Any]:
        """Return p and the temperature under a server's names for them."""
        return {"top_p": self.p, "temperature": self.temperature}
