"""Pictures of runs that are written by hand: what is drawn is read from the axes."""

import numpy as np
import pytest

from bench.common import spec_of
from stable_opd.bench.expand import Run
from stable_opd.bench.folder import Record, write_record
from stable_opd.bench.plots import draw
from stable_opd.bench.results import collect

pyplot = pytest.importorskip("matplotlib")

CURVES = {
    ("x", 0): "step,a,b\n0,0.0,\n1,0.2,nan\n2,0.4,5\n",
    ("x", 1): "step,a,b\n0,0.2,1\n1,0.4,3\n2,0.6,7\n",
    ("y", 0): "step,a,b\n0,1,1\n1,1,1\n",
    ("y", 1): "step,a,b\n0,3,1\n1,3,1\n",
}


@pytest.fixture
def runs(tmp_path):
    found = []
    for (name, seed), text in CURVES.items():
        run = Run({"axis": name}, seed, tmp_path / "out")
        run.folder.mkdir(parents=True)
        write_record(run.folder, Record(run.fingerprint, run.command, {}, "finished"))
        (run.folder / "metrics.csv").write_text(text)
        found.append(run)
    return found


@pytest.fixture
def pictures(runs, tmp_path, monkeypatch):
    """Draw a spec, and return its figures by name of the file."""
    drawn = {}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.update({path.name: figure}))

    def pictures(**keys):
        spec = spec_of(tmp_path, axes={"axis": {"x": {}, "y": {}}}, seeds=[0, 1], **keys)
        assert draw(spec, runs, collect(spec, runs), tmp_path / "out") == list(drawn)
        return drawn

    return pictures


def lines(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def test_curves_of_all_metrics_are_drawn_where_the_spec_names_no_picture(pictures):
    (name, figure), *more = pictures(metrics={"first": "a", "again": {"column": "a", "reduce": "max"}}).items()
    assert (name, more) == ("curves.png", [])
    (axis,) = figure.axes
    assert axis.get_title() == "a"
    assert set(lines(axis)) == {"x", "y"}
    np.testing.assert_allclose(lines(axis)["x"], [[0, 0.1], [1, 0.3], [2, 0.5]])
    np.testing.assert_allclose(lines(axis)["y"], [[0, 2], [1, 2]])


def test_panels_and_variants_of_a_picture(pictures):
    panels = {"One": "a", "Two": {"first": "a", "second": "b"}}
    figure = pictures(plots={"mine": {"panels": panels, "variants": {"axis": "x"}}})["mine.png"]
    one, two = figure.axes
    assert [one.get_title(), two.get_title()] == ["One", "Two"]
    assert list(lines(one)) == ["x"]
    assert list(lines(two)) == ["first", "second"]


def test_a_step_without_a_measurement_in_one_seed_is_of_the_others(pictures):
    figure = pictures(plots={"mine": {"panels": {"B": "b"}, "variants": {"axis": ["x"]}}})["mine.png"]
    np.testing.assert_allclose(lines(figure.axes[0])["x"], [[1, 3], [2, 6]])


def test_names_of_columns_follow_those_of_the_variants(pictures):
    figure = pictures(plots={"mine": {"panels": {"Both": {"first": "a", "second": "b"}}}})["mine.png"]
    assert list(lines(figure.axes[0])) == ["x, first", "x, second", "y, first", "y, second"]


def test_a_column_that_a_variant_lacks_leaves_its_place_in_the_legend(pictures):
    figure = pictures(plots={"mine": {"panels": {"Nothing": "c", "A": "a"}}})["mine.png"]
    assert lines(figure.axes[0]) == {"x": [], "y": []}
    assert [line.get_color() for line in figure.axes[0].lines] == [line.get_color() for line in figure.axes[1].lines]


def test_other_commands_have_no_curves(pictures):
    assert pictures(command="detect", metrics={"first": "a"}) == {}
