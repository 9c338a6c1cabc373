"""Drawing panels with matplotlib, in light and dark; without pyplot, so no window and no global state."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stable_opd.report.panels import Heat, Line, Panel


@dataclass(frozen=True)
class Theme:
    """Colours.

    Attributes:
        name: Ends the names of the files.
        paper: Background.
        ink: Text and axes.
        faint: Marks that must not be taken for curves.
        lines: Of the curves; each has a contrast of at least 4.5 to the paper.
        heat: Colour map; small values are near the paper.
    """

    name: str
    paper: str
    ink: str
    faint: str
    lines: Sequence[str]
    heat: str


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1d2128",
    "#6a7280",
    ("#0b5fa5", "#b3341f", "#2e7031", "#7b3fa0", "#80561b", "#00707a", "#555b66", "#a81d68"),
    "Blues",
)
DARK = Theme(
    "dark",
    "#171a20",
    "#e8eaee",
    "#9aa3b2",
    ("#6db3f2", "#ff8a75", "#7bcf86", "#c9a0f0", "#e0b060", "#5fd0d6", "#b8bec9", "#f58bc0"),
    "cividis",
)
THEMES = (LIGHT, DARK)

#: Inches, and dots per inch.
SIZE, DENSITY = (4.4, 2.8), 170

#: So that curves differ in more than colour.
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (7, 2, 1.5, 2)))


def draw(what: Panel | Heat, theme: Theme) -> bytes:
    """Return a panel as a PNG file."""
    with warnings.catch_warnings():
        # A name may be in a script that the font lacks; the box that stands for it is good enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=SIZE, dpi=DENSITY, facecolor=theme.paper)
        # The same for all, so that steps stand below steps on the page; the names of curves need the right.
        figure.subplots_adjust(left=0.12, right=0.71, top=0.82, bottom=0.16)
        axes = figure.add_subplot(facecolor=theme.paper)
        if isinstance(what, Panel):
            _draw_lines(what, axes, theme)
        else:
            _draw_heat(what, figure, axes, theme)
        _dress(axes, what.title, theme)
        file = io.BytesIO()
        # Without a date or version inside, so that the same run gives the same file.
        figure.savefig(file, format="png", facecolor=theme.paper, metadata={"Software": None})
    return file.getvalue()


def _dress(axes: Axes, title: str, theme: Theme) -> None:
    """Set what all panels have in common."""
    lines = title if len(title) <= 34 else title.replace(": ", ":\n", 1)
    axes.set_title(lines, loc="left", fontsize=10.5, fontweight="bold", color=theme.ink, parse_math=False, pad=14)
    axes.set_xlabel("optimizer step", color=theme.ink, fontsize=9)
    axes.tick_params(colors=theme.ink, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.faint)


def _draw_lines(panel: Panel, axes: Axes, theme: Theme) -> None:
    for line in panel.lines:
        color = theme.lines[line.place % len(theme.lines)]
        if line.seeds > 1:
            axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.22, lw=0)
        axes.plot(
            line.steps,
            line.values,
            color=color,
            lw=1.7,
            ls=_DASHES[line.place % len(_DASHES)] if line.joined else "none",
            marker="o" if line.sparse else None,
            ms=3.5,
        )
    if panel.share:
        low = min(0.0, *(float(np.nanmin(line.low)) for line in panel.lines))
        axes.set_ylim(low - 0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y", color=theme.faint, alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    _mark(panel, axes, theme)
    _label(panel.lines, axes, theme)


def _mark(panel: Panel, axes: Axes, theme: Theme) -> None:
    """Draw a line at each marked step; what happened stands above, on the side where the other mark is not."""
    for place, (step, what) in enumerate(panel.marks):
        axes.axvline(step, color=theme.faint, lw=1, dashes=(2, 2))
        axes.annotate(
            f"{what} {step}",
            (step, 1.02),
            xycoords=("data", "axes fraction"),
            ha="right" if place == 0 and len(panel.marks) > 1 else "left",
            fontsize=8.5,
            color=theme.faint,
            parse_math=False,
        )


def _label(lines: Sequence[Line], axes: Axes, theme: Theme) -> None:
    """Write each curve's name at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = np.array([(float(line.values[-1]) - low) / (high - low) for line in lines])
    right = max(float(line.steps[-1]) for line in lines)
    for place, (line, height) in enumerate(zip(lines, spread(ends, 0.085), strict=True)):
        axes.annotate(
            line.label,
            xy=(right, ends[place]),
            xycoords=("data", "axes fraction"),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=theme.lines[line.place % len(theme.lines)],
            parse_math=False,
        )


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Move labels apart as little as it takes, in their order, so that two are never nearer than a gap; within 0 and 1.

    Args:
        heights: Where they would be, as shares of the axes' height, (n,).
        gap: The least distance.
    """
    order = np.argsort(heights, kind="stable")
    # Least squares under the order: pool neighbours that would overlap, and centre each pool on its mean.
    pools: list[list[float]] = []
    for wanted in heights[order].tolist():
        pools.append([wanted])
        while len(pools) > 1 and _bottom(pools[-2], gap) + gap * len(pools[-2]) > _bottom(pools[-1], gap):
            pools[-2:] = [pools[-2] + pools[-1]]
    placed = [_bottom(pool, gap) + gap * place for pool in pools for place in range(len(pool))]
    found = np.empty_like(heights)
    found[order] = placed
    return found


def _bottom(pool: Sequence[float], gap: float) -> float:
    height = gap * (len(pool) - 1)
    return max(0.0, min(sum(pool) / len(pool) - height / 2, 1 - height))


def _draw_heat(heat: Heat, figure: Figure, axes: Axes, theme: Theme) -> None:
    """Draw positions upwards and steps to the right; cells without a measurement are hatched."""
    bins = len(heat.values)
    finite = heat.values[np.isfinite(heat.values)]
    top = float(np.quantile(finite, 0.99))  # one outlier must not wash out the rest
    axes.patch.set(hatch="///", edgecolor=theme.faint, alpha=0.5)
    edges = np.append(heat.steps, heat.steps[-1] + 1) - 0.5
    image = axes.pcolormesh(
        edges, np.arange(bins + 1) * 100 / bins, np.ma.masked_invalid(heat.values), cmap=theme.heat, vmin=0, vmax=top
    )
    bar = figure.colorbar(image, cax=figure.add_axes((0.73, 0.16, 0.03, 0.66)), extend="max")
    bar.set_label("nats", color=theme.ink, fontsize=9)
    bar.ax.tick_params(colors=theme.ink, labelsize=8.5)
    bar.outline.set_edgecolor(theme.faint)
    axes.set_ylabel("position, % of the token budget", color=theme.ink, fontsize=9)
