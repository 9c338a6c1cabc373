"""Length of answers, and its inflation."""

from typing import Any

import torch
from torch import Tensor

from stable_opd.metrics.base import ExactMetric


class ResponseLength(ExactMetric):
    """Mean, 95th percentile and maximum of the length of answers, in tokens; exact, from a histogram.

    Args:
        max_length: The longest answer that can occur, that is the token budget.
        kwargs: As for every torchmetrics metric.
    """

    full_state_update = False
    histogram: Tensor

    def __init__(self, max_length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_length = max_length
        self.add_state("histogram", torch.zeros(max_length + 1), dist_reduce_fx="sum")

    def update(self, lengths: Tensor) -> None:
        """Count answers.

        Args:
            lengths: Tokens of each answer, the stop token included, (B,).

        Raises:
            ValueError: If an answer is longer than ``max_length``.
        """
        if lengths.numel() and int(lengths.max()) > self.max_length:
            raise ValueError(
                f"Expected answers of at most max_length={self.max_length} tokens, but got one of {int(lengths.max())}."
            )
        self.histogram += torch.bincount(lengths, minlength=self.max_length + 1)

    def compute(self) -> dict[str, Tensor]:
        """Return ``length_mean``, ``length_p95`` (the smallest length that 95 % do not exceed) and ``length_max``."""
        count = self.histogram.sum()
        lengths = torch.arange(len(self.histogram), device=self.histogram.device, dtype=torch.float32)
        reached = self.histogram.cumsum(0) >= 0.95 * count
        nan = torch.full((), torch.nan, device=self.histogram.device)
        return {
            "length_mean": (self.histogram * lengths).sum() / count,
            "length_p95": lengths[reached][0] if count else nan,
            "length_max": lengths[self.histogram > 0][-1] if count else nan,
        }


class LengthInflation(ExactMetric):
    """How many times longer the latest answers are than those of the first steps.

    Each update is one step. Unlike most metrics it speaks about the course of a run: its state is saved in checkpoints,
    and calling it returns the figure of the run so far, not that of the batch by itself.

    Args:
        baseline_steps: How many of the first updates are the yardstick.
        kwargs: As for every torchmetrics metric.
    """

    higher_is_better = False
    full_state_update = True
    baseline_tokens: Tensor
    baseline_rows: Tensor
    latest_tokens: Tensor
    latest_rows: Tensor
    steps: Tensor

    def __init__(self, baseline_steps: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.baseline_steps = baseline_steps
        for name in ("baseline_tokens", "baseline_rows", "latest_tokens", "latest_rows"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum", persistent=True)
        self.add_state("steps", torch.zeros(()), dist_reduce_fx="max", persistent=True)

    def forward(self, lengths: Tensor) -> Tensor:
        """Count one step and return the inflation of the run so far, a scalar."""
        self.update(lengths)
        value: Tensor = self.compute()
        return value

    def update(self, lengths: Tensor) -> None:
        """Count one step.

        Args:
            lengths: Tokens of each answer, the stop token included, (B,).
        """
        self.latest_tokens = lengths.sum().float()
        self.latest_rows = torch.full_like(self.latest_tokens, lengths.numel())
        if self.steps < self.baseline_steps:
            self.baseline_tokens = self.baseline_tokens + self.latest_tokens
            self.baseline_rows = self.baseline_rows + self.latest_rows
        self.steps = self.steps + 1

    def compute(self) -> Tensor:
        """Return the mean length of the latest step over that of the first ones, a scalar."""
        return (self.latest_tokens / self.latest_rows) / (self.baseline_tokens / self.baseline_rows)
