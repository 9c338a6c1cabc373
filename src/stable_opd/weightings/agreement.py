"""What follows a long stretch of agreement does not count."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from stable_opd.look import Look
from stable_opd.weightings.base import Weighting
from stable_opd.weightings.sums import sums_before


def window_means(values: Tensor, row: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each window of consecutive values of a row.

    Args:
        values: Packed values, (n,).
        row: Row of each, in ascending order, (n,).
        window: How many values a window has.

    Returns:
        Where each window starts, in ascending order, and its mean, (m,) each; rows that are too short have none.
    """
    if len(values) < window:
        return row[:0], values[:0].double()
    starts = (row[: len(row) - window + 1] == row[window - 1 :]).nonzero().squeeze(1)
    return starts, values.double().unfold(0, window, 1).mean(-1)[starts]


def smallest_of_rows(values: Tensor, row: Tensor) -> Tensor:
    """Return the smallest value of each row that has some, (m,) twice -> (rows,)."""
    rows, number = row.unique_consecutive(return_inverse=True)
    return values.new_full((len(rows),), torch.inf).scatter_reduce_(0, number, values, "amin")


def cut_after(starts: Tensor, low: Tensor, row: Tensor, patience: int) -> Tensor:
    """Return which values come from the start of the first run of low windows on.

    Args:
        starts: Where each window starts, in ascending order, (m,).
        low: Whether its mean is low, (m,) bool.
        row: Row of each value, in ascending order, (n,).
        patience: How many low windows in a row make a run.

    Returns:
        Whether each value stands in or behind a run of its row, (n,) bool.
    """
    runs, share = window_means(low, row[starts], patience)
    begins = torch.zeros_like(row)
    begins[starts[runs[share == 1]]] = 1
    return sums_before(begins, row) + begins > 0


class AgreementCut(Weighting):
    """What follows a long stretch on which teacher and student agree does not count: the teacher only goes along.

        z_t = mean of KL(p || q) over the tokens t, ..., t + window - 1;  low where z_t < threshold
        threshold = quantile of level 1 - eta of the smallest z of each recent row
        w_s = 0 from the first t on at which z_t, ..., z_{t + patience - 1} are low

    A teacher that reads a derailed answer can often predict how it goes on, so its divergence from the student is small
    and corrects nothing. The threshold follows the training: a share of 1 - eta of the recent rows has a window below
    it, so some rows are cut also where nothing is wrong. Where loops are known by their tokens, the policy ``mask`` for
    loops is the plainer means; `TokenSelection` leaves out single tokens.

    Rows with fewer tokens of the student's than a window have no z; they are not cut and not remembered.

    Source: KAT (arXiv 2606.09471), which stops writing there; here rows are written to their end.

    Args:
        window: Tokens of a window.
        patience: Low windows in a row, each a token further on, that make a cut.
        eta: Share of recent rows whose smallest window is not low, between 0 and 1.
        memory: How many rows are remembered.
        samples: Rows that have to be known before the first cut.
        warm_up: Steps before the first cut.
    """

    needs_scores: bool = True

    def __init__(
        self,
        window: int = 64,
        patience: int = 4,
        eta: float = 0.3,
        memory: int = 4096,
        samples: int = 512,
        warm_up: int = 50,
    ) -> None:
        super().__init__()
        if min(window, patience) < 1 or not 0 < eta < 1:
            raise ValueError(
                "Expected window and patience of at least 1, and eta between 0 and 1, but got "
                f"{window}, {patience} and {eta}. A smaller eta cuts more rows."
            )
        if not 1 <= samples <= memory or warm_up < 0:
            raise ValueError(
                "Expected samples of at least 1 and at most memory, and warm_up of at least 0, but got "
                f"{samples}, {memory} and {warm_up}. No more rows than memory are ever known, so nothing would be cut."
            )
        self.window = window
        self.patience = patience
        self.eta = eta
        self.samples = samples
        self.warm_up = warm_up
        # Not a buffer: that would be rounded with the weights in a precision of bf16-true.
        self.minima: deque[float] = deque(maxlen=memory)
        self.steps = 0

    def threshold(self) -> float | None:
        """Return below which mean a window is low; None as long as too little is known."""
        if self.steps < self.warm_up or len(self.minima) < self.samples:
            return None
        return torch.tensor(self.minima, dtype=torch.float64).quantile(1 - self.eta).item()

    def forward(self, look: Look) -> Tensor:
        """Return 0 for the tokens behind a stretch of agreement, by the rows of earlier steps; remember these."""
        own, threshold = look.own, self.threshold()
        row = look.rollout.row[own]
        starts, means = window_means(look.scores.divergence[own], row, self.window)
        # In order of size, because which process had a row must not decide which one is forgotten first.
        self.minima.extend(look.gather(smallest_of_rows(means, row[starts])).sort().values.tolist())
        self.steps += 1
        weights = torch.ones_like(look.scores.divergence)
        if threshold is not None:
            weights[own] = (~cut_after(starts, means < threshold, row, self.patience)).float()
        return weights

    def get_extra_state(self) -> Any:
        """Return the steps and what is remembered, for checkpoints."""
        return torch.tensor([self.steps, *self.minima], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Go on with the steps and the memory of a checkpoint."""
        steps, *minima = state.tolist()
        self.steps = int(steps)
        self.minima.clear()
        self.minima.extend(minima)
