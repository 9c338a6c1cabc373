"""Schedules: how a weight changes in the course of the training."""

import math
from abc import abstractmethod
from typing import ClassVar

from stable_opd.registry import Component


class Schedule(Component):
    """A factor that depends on the share of the training that is over; it multiplies a component's weight."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the factor at ``progress``, from 0 to 1."""


class Linear(Schedule):
    """From one factor to another in a straight line.

    Args:
        start: Factor at the beginning.
        end: Factor at the end of the training.
    """

    def __init__(self, start: float = 1.0, end: float = 0.0) -> None:
        self.start = start
        self.end = end

    def __call__(self, progress: float) -> float:
        """Return the factor at ``progress``."""
        return self.start + (self.end - self.start) * progress


class Cosine(Schedule):
    """From one factor to another along half a cosine: slow, fast, slow.

    Args:
        start: Factor at the beginning.
        end: Factor at the end of the training.
    """

    def __init__(self, start: float = 1.0, end: float = 0.0) -> None:
        self.start = start
        self.end = end

    def __call__(self, progress: float) -> float:
        """Return the factor at ``progress``."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


def scheduled(weight: float, schedule: Schedule | None, progress: float) -> float:
    """Return ``weight`` times the schedule's factor; no schedule means a constant weight."""
    return weight if schedule is None else weight * schedule(progress)
