"""Shares of rows: truncated, repetitive."""

from typing import Any

import torch
from torch import Tensor

from stable_opd.metrics.base import ExactMetric


class _Rate(ExactMetric):
    """Share of rows with a flag; nan before the first row."""

    higher_is_better = False
    full_state_update = False
    flagged: Tensor
    rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("flagged", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros(()), dist_reduce_fx="sum")

    def _count(self, flags: Tensor) -> None:
        self.flagged += flags.sum()
        self.rows += flags.numel()

    def compute(self) -> Tensor:
        """Return the share, a scalar."""
        return self.flagged / self.rows


class TruncationRate(_Rate):
    """Share of answers that ran out of their token budget without a stop token.

    Source: Luo et al. 2026 (arXiv 2604.08527), section on metrics.
    """

    def update(self, truncated: Tensor) -> None:
        """Count rows.

        Args:
            truncated: Whether each answer was cut, (B,) bool.
        """
        self._count(truncated)


class RepetitionRate(_Rate):
    """Share of answers that a repetition detector flags.

    Source: Luo et al. 2026 (arXiv 2604.08527), section on metrics.
    """

    def update(self, repetitive: Tensor) -> None:
        """Count rows.

        Args:
            repetitive: Whether each answer was flagged, (B,) bool.
        """
        self._count(repetitive)
