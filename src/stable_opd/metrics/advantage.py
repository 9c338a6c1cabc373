"""What the teacher makes of repeated and of regular tokens."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stable_opd.metrics.base import ExactMetric


class RepeatedAdvantage(ExactMetric):
    """Share of repeated tokens, and the mean advantage of repeated, of regular and of all tokens.

    The advantage of a token is log q - log p, teacher over student. In a collapse the share rises while repeated tokens
    are punished several times less than regular ones. A mean over no token is nan.

    Source: Luo et al. 2026 (arXiv 2604.08527), the figures on advantages and the share of repeated tokens.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")  # regular, repeated
        self.add_state("counts", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, advantage: Tensor, in_loop: Tensor) -> None:
        """Count tokens.

        Args:
            advantage: log q - log p of each token, (N,).
            in_loop: Whether each token repeats an earlier one, (N,) bool.
        """
        self.sums += torch.stack([advantage[~in_loop].sum(), advantage[in_loop].sum()])
        self.counts += torch.stack([(~in_loop).sum(), in_loop.sum()])

    def compute(self) -> dict[str, Tensor]:
        """Return ``repeated_share``, ``advantage_repeated``, ``advantage_regular`` and ``advantage_mean``."""
        means = self.sums / self.counts
        return {
            "repeated_share": self.counts[1] / self.counts.sum(),
            "advantage_repeated": means[1],
            "advantage_regular": means[0],
            "advantage_mean": self.sums.sum() / self.counts.sum(),
        }


class LogRatioTail(ExactMetric):
    """High quantiles of how far teacher and student are apart on a token, |log q - log p|.

    They grow before a collapse: the 99th percentile is 0.4 to 1 in healthy runs and 2 to 3 in collapsing ones (a public
    single-author study). A quantile over no token is nan.

    Args:
        quantiles: Which quantiles.
        kwargs: As for every torchmetrics metric.
    """

    higher_is_better = False
    full_state_update = False
    gaps: list[Tensor]

    def __init__(self, quantiles: Sequence[float] = (0.95, 0.99), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantiles = tuple(quantiles)
        self.add_state("gaps", [], dist_reduce_fx="cat")

    def update(self, advantage: Tensor) -> None:
        """Collect tokens.

        Args:
            advantage: log q - log p of each token, (N,).
        """
        self.gaps.append(advantage.abs().float())

    def compute(self) -> dict[str, Tensor]:
        """Return ``log_ratio_p95`` and so on: the smallest gap that the given share of the tokens does not exceed."""
        gaps = torch.cat(self.gaps) if isinstance(self.gaps, list) else self.gaps  # one tensor after a synchronisation
        ordered = gaps.sort().values if gaps.numel() else gaps.new_full((1,), torch.nan)
        # Rounded, as 0.07 * 100 is above 7.
        ranks = [max(1, math.ceil(round(quantile * len(ordered), 6))) for quantile in self.quantiles]
        return {
            f"log_ratio_p{100 * each:g}": ordered[rank - 1] for each, rank in zip(self.quantiles, ranks, strict=True)
        }
