"""One figure from the rows of a metrics.csv."""

import math
from collections.abc import Mapping, Sequence

from stable_opd.bench.spec import Metric


def values(rows: Sequence[Mapping[str, str]], column: str) -> list[tuple[int, float]]:
    """Return the steps and values that a column has."""
    found = []
    for row in rows:
        cell = row.get(column)
        if cell:
            found.append((int(row["step"]), float(cell)))
    return found


def figure(rows: Sequence[Mapping[str, str]], metric: Metric) -> float | None:
    """Return the figure of a run; none if it never logged it.

    The last value is taken as it is. Elsewhere nan is left out: metrics are nan at a step that had nothing to measure.

    Args:
        rows: Rows of its metrics.csv.
        metric: What is wanted.
    """
    logged = [value for _, value in values(rows, metric.column)]
    if metric.reduce == "last":
        return logged[-1] if logged else None
    logged = [value for value in logged if not math.isnan(value)]
    if not logged:
        return None
    if metric.reduce == "mean":
        recent = logged[-metric.window :]
        return math.fsum(recent) / len(recent)
    return max(logged) if metric.reduce == "max" else min(logged)
