"""Pictures of the results; they need the extra `plot`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stable_opd.bench.expand import Run
from stable_opd.bench.figures import values
from stable_opd.bench.folder import is_finished, metric_rows
from stable_opd.bench.results import Cell, Result, cells, combination
from stable_opd.bench.spec import Plot, Spec

#: More curves than this cannot be told apart by their colours.
_CURVES = 10

WITHOUT_PLOT = (
    'Expected matplotlib for the pictures, but got none. Install it by `pip install "stable-opd[plot]"` and run '
    "`stable-opd bench` with --collect; the tables are written."
)


def draw(spec: Spec, runs: Sequence[Run], results: Sequence[Result], out: Path) -> list[str]:
    """Draw what can be drawn, and return the names of the files.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    found = []
    if len(spec.axes) == 2:
        _heat_map(Figure, spec, results).savefig(out / "heatmap.png", dpi=130)
        found.append("heatmap.png")
    finished = [run for run in runs if is_finished(run)]
    for name, plot in (spec.plots or _all_metrics(spec, finished)).items():
        shown = [run for run in finished if shows(plot, run)]
        if shown:
            _curves(Figure, plot, shown, len(spec.seeds)).savefig(out / f"{name}.png", dpi=130)
            found.append(f"{name}.png")
    return found


def _all_metrics(spec: Spec, runs: Sequence[Run]) -> dict[str, Plot]:
    """Return the picture of a spec that names none: every column, if its curves can be told apart."""
    if spec.command != "fit" or len({run.combination for run in runs}) > _CURVES:
        return {}
    columns = dict.fromkeys(each.column for each in spec.metrics.values())
    return {"curves": Plot({column: {"": column} for column in columns})}


def shows(plot: Plot, run: Run) -> bool:
    """Return whether a run is one of those in a picture."""
    return all(run.variants[axis] in names for axis, names in plot.variants.items())


def grid(spec: Spec, found: Mapping[str, Mapping[str, Cell]]) -> list[list[float]]:
    """Return the means of the first metric, a row per variant of the first axis; nan where there is none.

    Args:
        spec: A benchmark of two axes.
        found: Metrics by combination.
    """
    (first, rows), (second, columns) = spec.axes.items()
    metric = next(iter(spec.metrics))
    table = []
    for row in rows:
        names = [combination({first: row, second: column}) for column in columns]
        means = [found[name][metric].mean if name in found else None for name in names]
        table.append([math.nan if each is None else each for each in means])
    return table


def _heat_map(make: Any, spec: Spec, results: Sequence[Result]) -> Any:
    (first, rows), (second, columns) = spec.axes.items()
    metric = next(iter(spec.metrics))
    table = np.ma.masked_invalid(np.array(grid(spec, cells(spec, results))))
    figure = make(figsize=(2.2 + 0.9 * len(columns), 1.6 + 0.6 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor("#dddddd")  # what was excluded or has failed
    image = axis.imshow(table, cmap="viridis", aspect="auto")
    middle = (table.min() + table.max()) / 2
    for (row, column), value in np.ndenumerate(table):
        shown = "-" if np.ma.is_masked(table[row, column]) else f"{value:.3g}"
        dark = not np.ma.is_masked(table[row, column]) and value < middle
        axis.text(column, row, shown, ha="center", va="center", color="white" if dark else "black")
    axis.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel=second, ylabel=first)
    axis.set_xticklabels(list(columns))
    axis.set_yticklabels(list(rows))
    axis.set_title(f"{metric}, mean over {len(spec.seeds)} seed{'s' * (len(spec.seeds) > 1)}", fontsize=10)
    if table.count():
        figure.colorbar(image)
    return figure


def _curves(make: Any, plot: Plot, runs: Sequence[Run], seeds: int) -> Any:
    """Draw panels of columns over the steps: mean over the seeds, and the range between the extremes."""
    figure = make(figsize=(4.2 * len(plot.panels), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(plot.panels)))
    rows = {run.name: metric_rows(run.folder) for run in runs}
    names = list(dict.fromkeys(run.combination for run in runs))
    for axis, (title, columns) in zip(axes, plot.panels.items(), strict=True):
        for name in names:
            for label, column in columns.items():
                curves = [values(rows[run.name], column) for run in runs if run.combination == name]
                _band(axis, [dict(each) for each in curves if each], _label(name, label, len(names)))
        axis.set(title=title, xlabel="optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
        if len(columns) > 1 or axis is axes[0]:
            axis.legend(frameon=False, fontsize=8)
    if seeds > 1:
        figure.suptitle(f"Mean and range over {seeds} seeds", fontsize=9)
    return figure


def _label(combination: str, column: str, combinations: int) -> str:
    variants = " + ".join(combination.split("+"))
    if not column:
        return variants
    return column if combinations == 1 else f"{variants}, {column}"


def _band(axis: Any, curves: Sequence[Mapping[int, float]], label: str) -> None:
    """Draw the steps that all seeds have; a step at which some had nothing to measure is of the others."""
    steps = sorted(set.intersection(*(set(each) for each in curves))) if curves else []
    if not steps:  # without a value too, so that a combination has the same colour in every panel
        axis.plot([], [], label=label)
        return
    table = np.ma.masked_invalid(np.array([[each[step] for step in steps] for each in curves]))
    (line,) = axis.plot(steps, table.mean(0), label=label)
    axis.fill_between(steps, table.min(0), table.max(0), color=line.get_color(), alpha=0.2, lw=0)
