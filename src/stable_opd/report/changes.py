"""Where a signal leaves its quiet phase: pure functions of arrays."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

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
        return max(self.absolute, self.relative * abs(level), np.finfo(float).tiny)


def find_change(steps: Array, values: Array, effect: Effect) -> Change | None:
    """Find the first lasting change of a signal.

    The first `QUIET` measurements give a level m and a standard deviation s, taken as no less than an eighth of the
    effect. There is a change once the mean of `LASTING` measurements is away from m by the effect and by `CLEAR`
    times s. It began where the cumulative sum that leads there, S = max(0, S + (x - m) / s - SLACK), left zero for the
    last time (Page 1954). Measurements that are not finite are left out.

    Args:
        steps: Step of each measurement, ascending, (n,).
        values: The signal, (n,).
        effect: The smallest departure that matters.

    Returns:
        The change; None if there is none, or too little was measured.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) < QUIET + LASTING:
        return None
    level = float(values[:QUIET].mean())
    least = effect.size(level)
    noise = max(float(values[:QUIET].std(ddof=1)), least / 8)
    sign = 1.0 if effect.direction == "rise" else -1.0
    away = sign * (values - level)
    # No window reaches into the quiet phase: entry i ends with measurement QUIET + LASTING - 1 + i.
    lasting = np.convolve(away[QUIET:], np.full(LASTING, 1 / LASTING), "valid")
    enough = lasting >= max(least, CLEAR * noise)
    if not enough.any():
        return None
    sure = QUIET + LASTING - 1 + int(enough.argmax())
    start = _left_zero(away[QUIET : sure + 1] / noise - SLACK) + QUIET
    return Change(int(steps[start]), int(steps[sure]), level, level + sign * float(lasting.max()))


def _left_zero(increments: Array) -> int:
    """Return where the cumulative sum that may not fall below zero left it for the last time."""
    total, start = 0.0, 0
    for place, each in enumerate(increments.tolist()):
        if total <= 0:
            start = place
        total = max(0.0, total + each)
    return start


def departure(values: Array) -> Array:
    """Return how far a signal is above its quiet level, in quiet standard deviations; nan if it was too short."""
    quiet = values[np.isfinite(values)][:QUIET]
    if len(quiet) < QUIET:
        return np.full_like(values, np.nan)
    # A constant quiet phase has no noise; a thousandth of the level keeps the ratio finite.
    noise = max(float(quiet.std(ddof=1)), abs(float(quiet.mean())) / 1000, np.finfo(float).tiny)
    found: Array = (values - quiet.mean()) / noise
    return found


def together(one: Array, other: Array) -> Array:
    """Return a signal that is high only where both are, in quiet standard deviations: the lesser departure."""
    found: Array = np.minimum(departure(one), departure(other))
    return found


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
