"""The picture of the results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, THEIRS = "#1f6fb2", "#c1432e"


def draw(results: dict[str, Any], place: Path) -> None:
    """Draw what there is: speed by cell, and our cost against tokens."""
    mpl.use("Agg")
    panels: dict[str, Callable[[Axes, Any], None]] = {"steps": _steps, "linearity": _linearity}
    there = [name for name in panels if results.get(name)]
    if not there:
        return
    figure, axes = plt.subplots(1, len(there), figsize=(6.5 * len(there), 4), layout="constrained", squeeze=False)
    for name, axis in zip(there, axes[0], strict=True):
        panels[name](axis, results[name])
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(place, dpi=130)
    plt.close(figure)


def _steps(axis: Axes, cells: list[dict[str, Any]]) -> None:
    names = [each["cell"] for each in cells]
    for offset, key, label, color in ((-0.2, "throughput", "whole step", OURS), (0.2, "rollout", "rollout", "#8fb8d8")):
        values = [each[key]["value"] for each in cells]
        below = [each[key]["value"] - each[key]["low"] for each in cells]
        above = [each[key]["high"] - each[key]["value"] for each in cells]
        places = [place + offset for place in range(len(cells))]
        axis.bar(places, values, 0.38, yerr=(below, above), label=label, color=color, error_kw={"lw": 1})
    axis.axhline(1, color=THEIRS, lw=1)
    axis.set_xticks(range(len(cells)), names, rotation=35, ha="right")
    axis.set(title="Generated tokens per second, TRL = 1", ylabel="ratio, 95 % interval")
    axis.legend(frameon=False)


def _linearity(axis: Axes, result: dict[str, Any]) -> None:
    points = sorted(result["points"], key=lambda point: point["tokens"])
    seconds = [1e3 * point["seconds"] for point in points]
    for point in points:
        steps = point["raw"]
        axis.scatter([s["real"] for s in steps], [1e3 * s["seconds"] for s in steps], s=5, color=OURS, alpha=0.25, lw=0)
    tokens = [point["tokens"] for point in points]
    fitted = [
        result["ms_per_decoding_step"] * point["longest"] + 1e-3 * result["us_per_token"] * point["tokens"]
        for point in points
    ]
    axis.plot(tokens, seconds, "o", color=OURS, label="mean step, by real tokens")
    axis.plot([point["padded"] for point in points], seconds, "o", mfc="none", color=THEIRS, label="by padded tokens")
    axis.plot(tokens, fitted, "+", ms=11, color="#444444", label="fit: longest answer, real tokens")
    axis.set(xscale="log", yscale="log", xlabel="tokens of prompts and answers", title="Our step, milliseconds")
    axis.legend(frameon=False)
