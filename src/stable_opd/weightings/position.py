"""Early tokens count more."""

import torch
from torch import Tensor

from stable_opd.look import Look
from stable_opd.weightings.base import Weighting
from stable_opd.weightings.sums import sums_before


def early_weights(gap: Tensor, row: Tensor, largest: float) -> Tensor:
    """Return weights that fall from ``largest`` towards 1 as the gaps of a row are used up.

    Args:
        gap: |log q - log p| of each token, 0 where it does not count, (N,).
        row: Row of each token, in ascending order, (N,).
        largest: Weight of the first token of each row.

    Returns:
        Weights, (N,) float32.
    """
    total = gap.new_zeros(int(row.max()) + 1 if len(row) else 0, dtype=torch.float64).index_add_(0, row, gap.double())
    share = sums_before(gap, row) / total[row].clamp(min=torch.finfo(torch.float32).tiny)
    return (1 + (largest - 1) * (1 - share.clamp(0, 1))).float()


class PositionWeight(Weighting):
    """Early tokens count more, because what comes later follows from them.

        w_t = 1 + (largest - 1) * (1 - F_{t-1}),  F_t = sum_{s <= t} |A_s| / sum_s |A_s|,  A = log q - log p

    The clock of a row is how much teacher and student disagreed so far, and not the number of tokens: a long stretch on
    which they agree costs no weight. `PrefixHorizon` cuts instead of fading. No weight is below 1, so all of them
    together raise the divergence against the constraints, by a factor between 1 and ``largest``.

    Source: IW-OPD (arXiv 2606.22600).

    Args:
        largest: Weight of the first token, at least 1.
    """

    needs_scores: bool = True

    def __init__(self, largest: float = 1.5) -> None:
        super().__init__()
        if not 1 <= largest < float("inf"):
            raise ValueError(
                f"Expected largest of at least 1, but got {largest}. Late tokens have weight 1; use PrefixHorizon to "
                "leave some out."
            )
        self.largest = largest

    def forward(self, look: Look) -> Tensor:
        """Return the weight of each token."""
        gap = (look.scores.teacher - look.scores.student).abs()  # 0 where the student did not write
        return early_weights(gap, look.rollout.row, self.largest)
