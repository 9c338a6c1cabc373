import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from report.made import collapsing, noise, write_run
from stable_opd.report.panels import Heat, Line, Panel, heats, panels
from stable_opd.report.plots import DARK, LIGHT, THEMES, draw, spread
from stable_opd.report.runs import read_runs


def pixels(png):
    return imread(io.BytesIO(png))[..., :3]


def luminance(color):
    parts = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_text_and_curves_can_be_read_on_their_paper(theme):
    assert all(contrast(color, theme.paper) >= 4.5 for color in (*theme.lines, theme.ink, theme.faint))
    assert len(set(theme.lines)) == len(theme.lines)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_every_panel_of_a_run_can_be_drawn_on_the_paper_of_the_theme(theme, tmp_path):
    train = collapsing() | {f"train/kl_by_position/{bin_}": noise(100, 1, 0.1) for bin_ in range(10)}
    train["train/kl_by_position/9"][:50] = np.nan
    runs = read_runs([write_run(tmp_path, train)])
    for what in [*panels(runs, [(7, "first sign"), (20, "end")]), *heats(runs)]:
        drawn = pixels(draw(what, theme))
        assert drawn[0, 0] == pytest.approx(to_rgb(theme.paper), abs=0.01)
        assert drawn.std() > 0.01


def curve(values, label="x", place=0):
    values = np.array(values, dtype=float)
    return Line(label, place, np.arange(len(values), dtype=float), values, values, values)


@pytest.mark.parametrize(
    "lines",
    [[curve([0.5])], [curve([0.5, 0.5])], [curve([1, np.nan, 2])], [curve([1e9, -1e9])]],
    ids=["a point", "a constant", "a gap", "large"],
)
def test_odd_curves_can_be_drawn(lines):
    assert len(draw(Panel("k", "t", lines), LIGHT)) > 1000


def test_names_are_drawn_as_they_are_and_in_any_script():
    """A dollar sign would begin a formula, and a broken formula is an error."""
    hostile = [curve([1, 2], r"$\frac{$", 0), curve([2, 1], "解 $_$", 1)]
    assert len(draw(Panel("k", r"$\nosuch{$", hostile, marks=[(1, r"$\frac{$")]), LIGHT)) > 1000


def test_a_map_of_zeros_can_be_drawn():
    assert len(draw(Heat("k", "t", np.arange(3.0), np.zeros((10, 3))), DARK)) > 1000


def test_the_same_run_gives_the_same_file():
    panel = Panel("k", "t", [curve([1, 2, 3])])
    assert draw(panel, LIGHT) == draw(panel, LIGHT)
    assert draw(panel, LIGHT) != draw(panel, DARK)


def test_labels_that_do_not_touch_stay_where_they_are():
    assert spread(np.array([0.9, 0.1, 0.5]), 0.1).tolist() == [0.9, 0.1, 0.5]


@pytest.mark.parametrize("seed", range(10))
def test_labels_are_moved_apart_in_their_order_and_stay_inside(seed):
    heights = np.random.default_rng(seed).uniform(0, 1, 8) ** 3
    placed = spread(heights, 0.1)
    order = np.argsort(heights)
    assert (np.diff(placed[order]) >= 0.1 - 1e-9).all()
    assert placed.min() >= 0
    assert placed.max() <= 1 + 1e-9


def test_two_labels_at_one_height_share_the_way():
    assert spread(np.array([0.5, 0.5]), 0.1) == pytest.approx([0.45, 0.55])
