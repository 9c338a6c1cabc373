"""Where a signal leaves its quiet phase: one rule, fed one measurement at a time."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Measurements at the beginning of a run that say what is usual.
QUIET = 10
#: Measurements in a row whose mean must be away from the quiet level: one spike is no change.
LASTING = 5
#: Departures below this many quiet standard deviations do not add up. Less than 1.5, and errors of a level that was
#: measured ten times make a start come out too early; more, and it comes out late on a slow way up.
SLACK = 1.5
#: The mean of `LASTING` measurements must be away by this many quiet standard deviations, however large the effect.
CLEAR = 3.0

_TINY = float(np.finfo(float).tiny)


class Change(NamedTuple):
    """A lasting departure from the quiet level.

    Attributes:
        start: Step at which the departure began.
        sure: Step at which it had lasted long enough to be told from noise.
        before: Quiet level.
        after: The farthest that the mean of `LASTING` measurements got from it.
    """

    start: int
    sure: int
    before: float
    after: float


@dataclass(frozen=True)
class Effect:
    """The smallest departure that matters.

    Attributes:
        direction: Whether the signal must rise or fall.
        absolute: In units of the signal.
        relative: As a share of the size of the quiet level; the larger of the two counts.
    """

    direction: Literal["rise", "fall"]
    absolute: float = 0.0
    relative: float = 0.0

    def size(self, level: float) -> float:
        """Return the smallest departure from a level."""
        return max(self.absolute, self.relative * abs(level), _TINY)


class Detector:
    """Finds the lasting changes of a signal, one measurement at a time.

    The first `QUIET` measurements give a level m and a standard deviation s, taken as no less than an eighth of the
    effect. The signal is away while the mean of the last `LASTING` measurements, none of them of the quiet phase, is
    away from m by the effect and by `CLEAR` times s. It left where the cumulative sum that leads there,
    S = max(0, S + (x - m) / s - SLACK), left zero for the last time (Page 1954).

    Args:
        effect: The smallest departure that matters.

    Attributes:
        away: Whether the signal is away now.
        start: Step at which the present departure began; it means something while the signal is away.
        change: The first change; None if there is none yet.
    """

    def __init__(self, effect: Effect) -> None:
        self.effect = effect
        self.away, self.start = False, 0
        self.change: Change | None = None
        self._quiet: list[float] = []
        self._recent: deque[float] = deque(maxlen=LASTING)
        self._sum = 0.0
        self._prepare()

    @property
    def level(self) -> float:
        """The quiet level; nan before it is known."""
        return self._level

    @property
    def mean(self) -> float:
        """Mean of the last `LASTING` measurements; that of the quiet phase until there are so many."""
        full = len(self._recent) == LASTING
        return self._level + self._sign * sum(self._recent) / LASTING if full else self._level

    def observe(self, step: int, value: float) -> None:
        """Take in a measurement; one that is not finite is left out."""
        if not np.isfinite(value):
            return
        if len(self._quiet) < QUIET:
            self._quiet.append(float(value))
            self._prepare()
            return
        departure = self._sign * (float(value) - self._level)
        if self._sum <= 0:
            self.start = step
        self._sum = max(0.0, self._sum + departure / self._noise - SLACK)
        self._recent.append(departure)
        lasting = sum(self._recent) / LASTING if len(self._recent) == LASTING else -np.inf
        was, self.away = self.away, lasting >= self._least
        if was and not self.away:
            self._sum = 0.0  # back: what adds up from here on belongs to another departure
        if self.change is None and self.away:
            self.change = Change(self.start, step, self._level, self.mean)
        elif self.change is not None and lasting > self._sign * (self.change.after - self._level):
            self.change = self.change._replace(after=self.mean)

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and lists of them, for checkpoints."""
        state = {"quiet": list(self._quiet), "recent": list(self._recent), "sum": self._sum}
        return state | {"away": self.away, "start": self.start, "change": list(self.change or ())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._quiet, self._sum = list(state["quiet"]), state["sum"]
        self._recent = deque(state["recent"], maxlen=LASTING)
        self.away, self.start = state["away"], state["start"]
        self.change = Change(*state["change"]) if state["change"] else None
        self._prepare()

    def _prepare(self) -> None:
        """Work out what follows from the quiet phase, if it is over."""
        self._sign = 1.0 if self.effect.direction == "rise" else -1.0
        if len(self._quiet) < QUIET:
            self._level = self._noise = self._least = np.nan
            return
        self._level, deviation = _mean_and_deviation(self._quiet)
        least = self.effect.size(self._level)
        self._noise = max(deviation, least / 8)
        self._least = max(least, CLEAR * self._noise)


class Departures:
    """How far several signals are above their quiet levels, in quiet standard deviations: the least of them.

    It is high only where all are. The first `QUIET` values come when the quiet phase is over.

    Args:
        count: How many signals there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._quiet: list[list[float]] = []

    def observe(self, step: int, values: Sequence[float]) -> list[tuple[int, float]]:
        """Take in a measurement of all; return the steps and values that are known by it.

        A measurement in which one is not finite is left out.
        """
        if not np.isfinite(values).all():
            return []
        if len(self._quiet) == QUIET:
            return [(step, self._least(values))]
        self._quiet.append([float(step), *map(float, values)])
        if len(self._quiet) < QUIET:
            return []
        return [(int(at), self._least(each)) for at, *each in self._quiet]

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and lists of them, for checkpoints."""
        return {"quiet": [list(each) for each in self._quiet]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._quiet = [list(each) for each in state["quiet"]]

    def _least(self, values: Sequence[float]) -> float:
        found = []
        for place, value in enumerate(values):
            level, deviation = _mean_and_deviation([each[1 + place] for each in self._quiet])
            # A constant quiet phase has no noise; a thousandth of the level keeps the ratio finite.
            found.append((float(value) - level) / max(deviation, abs(level) / 1000, _TINY))
        return min(found)


def find_change(steps: Array, values: Array, effect: Effect) -> Change | None:
    """Find the first lasting change of a signal that has been measured to its end.

    Args:
        steps: Step of each measurement, ascending, (n,).
        values: The signal, (n,).
        effect: The smallest departure that matters.

    Returns:
        The change; None if there is none, or too little was measured.
    """
    detector = Detector(effect)
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        detector.observe(int(step), value)
    return detector.change


def first_reaching(steps: Array, values: Array, bound: float) -> int | None:
    """Return the first step from which on `LASTING` measurements have a mean above a bound; None if there is none.

    The step is that of the first of them which is itself above the bound.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    width = min(LASTING, len(values))
    if width == 0:
        return None
    above = np.convolve(values, np.full(width, 1 / width), "valid") > bound
    if not above.any():
        return None
    start = int(above.argmax())
    return int(steps[start + int((values[start : start + width] > bound).argmax())])


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation of a sample."""
    return float(np.mean(values)), float(np.std(values, ddof=1))
