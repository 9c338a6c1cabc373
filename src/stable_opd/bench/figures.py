"""One figure from the rows of a metrics.csv."""

import math
from collections.abc import Mapping, Sequence

from stable_opd.bench.spec import Metric
from stable_opd.bench.yamls import SpecError


def values(rows: Sequence[Mapping[str, str]], column: str) -> list[tuple[int, float]]:
    """Return the steps and values that a column has."""
    found = []
    for row in rows:
        cell = row.get(column)
        if cell:
            try:
                found.append((int(row["step"]), float(cell)))
            except ValueError as error:
                raise SpecError(
                    f"Expected numbers in the column {column!r} of metrics.csv, but got {cell[:40]!r} in step "
                    f"{row['step']}. Name another column, or delete the run's folder."
                ) from error
    return found


def figure(rows: Sequence[Mapping[str, str]], metric: Metric) -> float | None:
    """Return the figure of a run; none if it never logged it, infinity if its bound was never exceeded.

    The last value is taken as it is. Elsewhere nan is left out: metrics are nan at a step that had nothing to measure.

    Args:
        rows: Rows of its metrics.csv.
        metric: What is wanted.
    """
    found = values(rows, metric.column)
    if metric.reduce == "last":
        return found[-1][1] if found else None
    found = [(step, value) for step, value in found if not math.isnan(value)]
    if not found:
        return None
    if metric.above is not None:  # the row of a training step is numbered by the steps before it
        return next((float(step) for step, value in found if value > metric.above), math.inf)
    logged = [value for _, value in found]
    if metric.reduce == "mean":
        recent = logged[-metric.window :]
        return math.fsum(recent) / len(recent)
    return max(logged) if metric.reduce == "max" else min(logged)
