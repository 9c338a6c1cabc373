"""Schedules: how a weight changes in the course of the training."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from stable_opd.registry import Component


class Schedule(Component, nn.Module):
    """A factor that depends on the share of the training that is over; it multiplies a component's weight."""

    kind: ClassVar[str] = "schedule"
    #: `observe` is called after every step; what is logged has to be brought from the device for it.
    observes: bool = False

    @abstractmethod
    def forward(self, progress: float) -> float:
        """Return the factor at ``progress``, from 0 to 1."""

    def observe(self, figures: Mapping[str, float]) -> None:
        """Learn of the figures ``train/...`` of a step, the same on every process; does nothing here."""


class Linear(Schedule):
    """From one factor to another in a straight line.

    Source: the linear decay that is common for learning rates. Prefer `Cosine` to stay near both ends for longer.

    Args:
        start: Factor at the beginning.
        end: Factor at the end of the training.
    """

    def __init__(self, start: float = 1.0, end: float = 0.0) -> None:
        super().__init__()
        self.start = start
        self.end = end

    def forward(self, progress: float) -> float:
        """Return the factor at ``progress``."""
        return self.start + (self.end - self.start) * progress


class Cosine(Schedule):
    """From one factor to another along half a cosine: slow, fast, slow.

    Source: Loshchilov and Hutter 2017 (SGDR, arXiv 1608.03983), for learning rates.

    Args:
        start: Factor at the beginning.
        end: Factor at the end of the training.
    """

    def __init__(self, start: float = 1.0, end: float = 0.0) -> None:
        super().__init__()
        self.start = start
        self.end = end

    def forward(self, progress: float) -> float:
        """Return the factor at ``progress``."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


class Step(Schedule):
    """From one factor to another at once.

    Source: of this project. The loss jumps with it; prefer `Linear` where that is not wanted.

    Args:
        at: Share of the training after which the factor changes.
        start: Factor before.
        end: Factor from then on.
    """

    def __init__(self, at: float = 0.5, start: float = 1.0, end: float = 0.0) -> None:
        super().__init__()
        if not 0 <= at <= 1:
            raise ValueError(f"Expected at between 0 and 1, but got {at}: it is a share of the training.")
        self.at = at
        self.start = start
        self.end = end

    def forward(self, progress: float) -> float:
        """Return the factor at ``progress``."""
        return self.start if progress < self.at else self.end


class OnMetric(Schedule):
    """Raise the factor while a logged metric is too high, and let it come back when it is not.

    After ``patience`` steps in a row in which the metric is at least ``above``, the factor is multiplied by
    ``raise_by``, and again after as many more; while the metric is below, it falls back towards 1.

        factor <- min(factor * raise_by, largest)    or    1 + (factor - 1) * (1 - relax)

    A metric that is not a number (a mean over no token) says nothing and changes nothing. Prefer a controller where the
    constraint's own value is to be held.

    Source: public guard rails of on-policy distillation, which double the weights when 5 % of the answers repeat
    themselves in two evaluations in a row.

    Args:
        metric: Name under which the figure is logged for each step, such as ``train/repetition_rate``.
        above: Value from which on it is too high.
        patience: Steps in a row that it takes.
        raise_by: What the factor is multiplied by, above 1.
        largest: Factor that is never exceeded.
        relax: Share of the way back to 1 that is gone in every step in which the metric is low, from 0 to 1.
    """

    observes: bool = True

    def __init__(
        self,
        metric: str = "train/repetition_rate",
        above: float = 0.05,
        patience: int = 2,
        raise_by: float = 2.0,
        largest: float = 16.0,
        relax: float = 0.01,
    ) -> None:
        super().__init__()
        if patience < 1 or raise_by <= 1 or largest < raise_by or not 0 <= relax <= 1:
            raise ValueError(
                "Expected patience of at least 1, raise_by above 1, largest of at least raise_by, and relax between 0 "
                f"and 1, but got {patience}, {raise_by}, {largest} and {relax}."
            )
        self.metric = metric
        self.above = above
        self.patience = patience
        self.raise_by = raise_by
        self.largest = largest
        self.relax = relax
        self.factor, self.seen = 1.0, 0

    def forward(self, progress: float) -> float:
        """Return the factor, which does not depend on ``progress``."""
        return self.factor

    def observe(self, figures: Mapping[str, float]) -> None:
        """Change the factor for the next step.

        Raises:
            ValueError: If the student wrote in this step, and nothing is logged under the name of the metric.
        """
        if self.metric not in figures:
            if "train/truncation_rate" not in figures:
                return  # a step without rows of the student's
            known = ", ".join(sorted(figures))
            raise ValueError(
                f"Expected a metric that is logged in every step, but got {self.metric!r}. Known: {known}."
            )
        if math.isnan(figures[self.metric]):
            return
        self.seen = self.seen + 1 if figures[self.metric] >= self.above else 0
        if self.seen and self.seen % self.patience == 0:
            self.factor = min(self.factor * self.raise_by, self.largest)
        elif self.seen == 0:
            self.factor = 1 + (self.factor - 1) * (1 - self.relax)

    def get_extra_state(self) -> Any:
        """Return factor and count, for checkpoints."""
        return torch.tensor([self.factor, self.seen], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Go on with the factor and the count of a checkpoint."""
        self.factor, self.seen = float(state[0]), int(state[1])


def scheduled(weight: float, schedule: Schedule | None, progress: float) -> float:
    """Return ``weight`` times the schedule's factor; no schedule means a constant weight."""
    return weight if schedule is None else weight * float(schedule(progress))
