"""Medians, spreads and ratios of two contestants that took turns."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import numpy as np

Step = dict[str, float]
Side = list[Step]  # the steps of one contestant within one round


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as a table shows it."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return median(values), low, high


def rate(steps: Sequence[Step], clock: str = "seconds") -> float:
    """Return generated tokens per second of a clock, over all steps together."""
    return sum(step["tokens"] for step in steps) / sum(step[clock] for step in steps)


def typical(steps: Sequence[Step]) -> float:
    """Return the median time of a step."""
    return median(step["seconds"] for step in steps)


def ratio(
    above: Sequence[Side],
    below: Sequence[Side],
    figure: Callable[[Sequence[Step]], float],
    samples: int = 2000,
) -> Interval:
    """Return figure(above) / figure(below) with a bootstrap interval.

    What is drawn again is whole rounds: the two sides of a round ran side by side in time, so whatever slowed the
    machine then slowed both.
    """
    rng = random.Random(0)
    count = len(above)

    def of(rounds: Sequence[int]) -> float:
        return figure([s for r in rounds for s in above[r]]) / figure([s for r in rounds for s in below[r]])

    drawn = sorted(of(rng.choices(range(count), k=count)) for _ in range(samples))
    return Interval(of(range(count)), drawn[int(0.025 * samples)], drawn[int(0.975 * samples) - 1])


def fit(causes: Sequence[Sequence[float]], effects: Sequence[float]) -> tuple[list[float], float]:
    """Fit effect = sum of coefficient * cause by least squares of the relative errors.

    Args:
        causes: The causes of each observation.
        effects: The effect of each observation, positive.

    Returns:
        The coefficients, and the largest relative error that is left.
    """
    relative = np.array(causes, dtype=float) / np.array(effects, dtype=float)[:, None]
    coefficients, *_ = np.linalg.lstsq(relative, np.ones(len(effects)), rcond=None)
    return coefficients.tolist(), float(np.abs(relative @ coefficients - 1).max())


def summary(rounds: Sequence[Side]) -> dict[str, float]:
    """Return what is reported of one contestant in one cell."""
    steps = [step for side in rounds for step in side]
    middle, low, high = spread([1e3 * step["seconds"] for step in steps])
    figures = {"steps": len(steps), "step_ms": middle, "step_ms_q1": low, "step_ms_q3": high}
    if "tokens" in steps[0]:
        figures |= {
            "tokens_per_step": sum(step["tokens"] for step in steps) / len(steps),
            "tokens_per_s": rate(steps),
            "rollout_tokens_per_s": rate(steps, "rollout"),
        }
    if "score" in steps[0]:
        overhead = [step["seconds"] - step["rollout"] - step["score"] - step["update"] for step in steps]
        figures |= {
            "overhead_ms": 1e3 * median(overhead),
            "overhead_share": sum(overhead) / sum(step["seconds"] for step in steps),
        } | {f"{phase}_ms": 1e3 * median(step[phase] for step in steps) for phase in ("rollout", "score", "update")}
    return figures
