"""Sampling from the likeliest tokens."""

from typing import Any

from torch import Tensor

from stable_opd.samplers.base import Sampler
from stable_opd.samplers.temperature import check_temperature, tempered


def likeliest(logits: Tensor, k: int) -> Tensor:
    """Rule out all tokens that are less likely than the k-th likeliest, (B, V) -> (B, V)."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, -1).values[..., -1:], -float("inf"))


class TopK(Sampler):
    """Draw from the k likeliest tokens.

        q(v) ~ p(v) [p(v) >= p of the k-th likeliest]

    Tokens that are exactly as likely as the k-th stay too, as in transformers and vLLM. The number of tokens is the
    same whether the student is sure or not: prefer `TopP` or `MinP`, unless a server's setting is to be matched. The
    distribution drawn from is never taken to be the student's own, since a sampler does not know the vocabulary's size.

    Source: Fan et al. 2018 (arXiv 1805.04833), with k = 10 there; 50 is what `generate` of transformers takes.

    Args:
        k: Tokens that are kept, at least 1.
        temperature: Divides the logits first; below 1 sharpens the distribution, above 1 flattens it.
    """

    def __init__(self, k: int = 50, temperature: float = 1.0) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(
                f"Expected k of at least 1 token, but got {k}. To keep all tokens use Temperature({temperature})."
            )
        self.k = k
        self.temperature = check_temperature(temperature)

    def forward(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Return the logits of the likeliest tokens, (B, V)."""
        return likeliest(tempered(logits, self.temperature), self.k)

    def request(self) -> dict[str, Any]:
        """Return k and the temperature under a server's names for them."""
        return {"top_k": self.k, "temperature": self.temperature}
