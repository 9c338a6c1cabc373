import numpy as np
import pytest

from report.made import noise, quiet, write_run
from stable_opd.report.panels import MOST_VARIANTS, heats, line, panels
from stable_opd.report.runs import Curves, read_runs


def curves(steps, values):
    return Curves(np.array(steps, dtype=float), {"x": np.array(values, dtype=float)})


def test_a_line_over_seeds_has_their_mean_and_their_range():
    made = line("x", 0, [curves([0, 1], [1, 2]), curves([0, 1], [3, 8])], "x")
    assert made.steps.tolist() == [0, 1]
    assert made.values.tolist() == [2, 5]
    assert made.low.tolist() == [1, 2]
    assert made.high.tolist() == [3, 8]
    assert made.seeds == 2


def test_a_line_ends_where_the_first_seed_ends():
    """A mean over the seeds that are left would jump."""
    assert line("x", 0, [curves([0, 1, 2], [1, 1, 1]), curves([0, 1], [1, 1])], "x").steps.tolist() == [0, 1]


def test_a_seed_that_measured_nothing_does_not_count():
    made = line("x", 0, [curves([0, 1], [1, 2]), curves([0, 1], [np.nan, np.nan])], "x")
    assert (made.values.tolist(), made.seeds) == ([1, 2], 1)


def test_what_one_seed_did_not_measure_is_that_of_the_others():
    made = line("x", 0, [curves([0, 1], [1, np.nan]), curves([0, 1], [3, 4])], "x")
    assert made.values.tolist() == [2, 4]


def test_nothing_measured_is_no_line():
    assert line("x", 0, [curves([0, 1], [np.nan, np.nan])], "x") is None
    assert line("x", 0, [curves([], [])], "x") is None
    assert line("x", 0, [curves([0], [1])], "y") is None


def test_a_curve_breaks_where_nothing_was_measured_for_long_but_not_between_rare_measurements():
    steps = [*range(30), *range(60, 90)]
    assert np.isnan(line("x", 0, [curves(steps, np.ones(60))], "x").values).sum() == 1
    assert not np.isnan(line("x", 0, [curves(range(0, 300, 10), np.ones(30))], "x").values).any()


def test_few_points_by_chance_are_not_joined():
    def joined(*steps):
        values = np.full(100, np.nan)
        values[list(steps)] = 1.0
        made = line("x", 0, [curves(range(100), values)], "x")
        assert made.sparse
        return made.joined

    assert not joined(1, 20, 90)
    assert joined(0, 20, 40)
    assert line("x", 0, [curves([0, 19, 21], [1, 2, 3])], "x").joined  # as an evaluation after the last step


def test_one_run_has_what_belongs_together_in_one_panel(tmp_path):
    train = quiet() | {"train/loss/a": np.ones(100), "train/loss/b": np.ones(100)}
    runs = read_runs([write_run(tmp_path, train)])
    made = {panel.key: panel for panel in panels(runs, [(7, "first sign")])}
    assert [each.label for each in made["truncation-repetition"].lines] == ["truncated", "repetitive"]
    assert [each.label for each in made["losses"].lines] == ["a", "b"]
    assert "entropy" not in made
    assert made["length"].marks == [(7, "first sign")]


def test_several_variants_have_a_panel_for_each_curve_and_keep_their_places(tmp_path):
    for name in ("a/seed-0", "a/seed-1", "b/seed-0", "c/seed-0"):
        train = quiet()
        if name[0] == "b":
            del train["train/repeated_share"]
        write_run(tmp_path / name, train)
    made = {panel.key: panel for panel in panels(read_runs([tmp_path]))}
    assert [(each.label, each.seeds) for each in made["length-0"].lines] == [("a", 2), ("b/seed-0", 1), ("c/seed-0", 1)]
    assert [(each.label, each.place) for each in made["repeated-share-0"].lines] == [("a", 0), ("c/seed-0", 2)]
    assert made["truncation-repetition-1"].title == "Truncated and repetitive answers: repetitive"


def test_no_more_variants_are_drawn_than_can_be_told_apart(tmp_path):
    for number in range(MOST_VARIANTS + 2):
        write_run(tmp_path / f"v{number:02}", quiet(30))
    assert {len(panel.lines) for panel in panels(read_runs([tmp_path]))} == {MOST_VARIANTS}


def test_positions_are_stacked_in_their_order(tmp_path):
    train = quiet() | {f"train/kl_by_position/{bin_}": np.full(100, float(bin_)) for bin_ in (10, 2, 0)}
    (made,) = heats(read_runs([write_run(tmp_path, train)]))
    assert made.values[:, 0].tolist() == [0, 2, 10]
    assert "4 nats on average in the first ten" in made.alt


def test_positions_without_a_measurement_make_no_map(tmp_path):
    train = quiet() | {"train/kl_by_position/0": np.full(100, np.nan)}
    assert heats(read_runs([write_run(tmp_path, train)])) == []


def test_a_panel_is_told_in_words(tmp_path):
    train = quiet() | {"train/stop_hazard": np.linspace(0.5, 0.25, 100)}
    made = {panel.key: panel for panel in panels(read_runs([write_run(tmp_path, train)]), [(7, "first sign")])}
    assert made["stop-hazard"].alt == (
        "Stop hazard: chance to stop, per token, by optimizer step. student goes from 0.5 to 0.25, between 0.25 and "
        "0.5; first sign at step 7."
    )


@pytest.mark.filterwarnings("error")
def test_gaps_and_lone_points_are_told_without_warnings(tmp_path):
    train = quiet() | {"train/advantage_repeated": np.where(np.arange(100) % 50 == 3, noise(100), np.nan)}
    made = panels(read_runs([write_run(tmp_path, train)]))
    assert all("nan" not in panel.alt for panel in made)
