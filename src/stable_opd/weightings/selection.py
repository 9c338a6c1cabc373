"""Only the tokens with the most to learn from count."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stable_opd.look import Look
from stable_opd.weightings.base import Weighting


def normalised(values: Tensor, everywhere: Tensor) -> Tensor:
    """Return values on a scale on which the smallest of all processes is 0 and the largest is 1; 0 if they are equal.

    Args:
        values: Values of this process, (n,).
        everywhere: Values of all processes, (m,), m at least 1.
    """
    low, high = everywhere.min(), everywhere.max()
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


def selected(entropy: Tensor, divergence: Tensor, share: float, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Return which tokens have the highest scores.

    Args:
        entropy: Entropy of the student at each token, (n,).
        divergence: Divergence at each token, (n,).
        share: Which share of the tokens of all processes.
        gather: Puts the values of all processes one after the other, (n,) -> (m,).

    Returns:
        The tokens of this process that are selected, (n,) bool.
    """
    entropies, divergences = gather(entropy), gather(divergence)
    if len(entropies) == 0:
        return torch.zeros_like(entropy, dtype=torch.bool)

    def score(entropy: Tensor, divergence: Tensor) -> Tensor:
        h, d = normalised(entropy, entropies), normalised(divergence, divergences)
        return 1 - (1 - h) * (1 - d)  # exactly 1 at the top of either scale, where h + d - h * d is only near it

    kept = max(1, math.ceil(round(share * len(entropies), 6)))  # rounded, as 0.07 * 100 is above 7
    threshold = score(entropies, divergences).kthvalue(len(entropies) - kept + 1).values
    return score(entropy, divergence) >= threshold


class TokenSelection(Weighting):
    """Only the tokens count at which the student is uncertain or far from the teacher.

        s = h + d - h * d,  h = scale(entropy of p),  d = scale(KL(p || q)),  scale(x) = (x - min x) / (max x - min x)

    with the smallest and the largest of the whole batch. The tokens with the highest s count, a ``share`` of all that
    the student wrote; those that tie with the last of them count too, so the choice depends on nothing but the scores.
    Where the student is certain and the teacher agrees, as often in the middle of a loop, a token is among the first to
    be left out; `AgreementCut` leaves out all that follows as well. One token that is far off makes all others look
    alike, because the scale is that of the most extreme ones.

    Source: TIP (arXiv 2604.14084), which finds that half of the tokens suffice.

    Args:
        share: Share of the student's tokens that count, above 0 and up to 1.
    """

    needs_scores: bool = True

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(
                f"Expected share above 0 and at most 1, but got {share}. It is a share of the student's tokens: for "
                "half of them write 0.5."
            )
        self.share = share

    def forward(self, look: Look) -> Tensor:
        """Return 1 for the tokens that are selected."""
        own, scores = look.own, look.scores
        weights = torch.zeros_like(scores.entropy)
        weights[own] = selected(scores.entropy[own], scores.divergence[own], self.share, look.gather).float()
        return weights
