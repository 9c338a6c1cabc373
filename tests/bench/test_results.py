"""Tables, marks and files, from results that are made by hand."""

import csv
import json
import math

import pytest

from bench.common import spec_of
from stable_opd.bench.command import unknown_columns
from stable_opd.bench.plots import grid
from stable_opd.bench.results import Result, against_baseline, best, cells, compare, write_rows, write_table
from stable_opd.bench.tables import baseline_table, main_table, math_table, page, significance

UP = {"acc": {"column": "val/accuracy", "better": "higher"}}
DOWN = {"acc": {"column": "val/accuracy", "better": "lower"}}


def results(metric="acc", **by_variant):
    """Finished runs of axis a, one value per seed; a text in place of a value is the reason of a failure."""
    found = []
    for name, values in by_variant.items():
        for seed, value in enumerate(values):
            bad = isinstance(value, str)
            found.append(
                Result(
                    {"a": name},
                    seed,
                    "failed" if bad else "finished",
                    {} if bad else {metric: value},
                    value if bad else None,
                    f"stable-opd fit --seed_everything {seed}",
                    1.0,
                    {"stable-opd": "0.1.0"},
                    "abc",
                    {"cpu": "C", "gpu": []},
                )
            )
    return found


def spec(tmp_path, seeds=6, metrics=UP, **keys):
    return spec_of(tmp_path, seeds=list(range(seeds)), metrics=metrics, **keys)


SIX = {"x": [0.5, 0.6, 0.55, 0.5, 0.6, 0.5], "y": [0.4, 0.5, 0.45, 0.4, 0.5, 0.3]}


def test_best_is_marked_where_six_seeds_agree(tmp_path):
    found = cells(spec(tmp_path), results(**SIX))
    assert best(spec(tmp_path), found, "acc") == "x"
    assert best(spec(tmp_path, metrics=DOWN), found, "acc") == "y"
    assert "| x | **0.542 ± 0.049** |" in main_table(spec(tmp_path), found)
    says = significance(spec(tmp_path), found)
    assert "differs from the runner-up by an exact two-sided sign-flip permutation test" in says
    assert "x against y: difference +0.117 on 6 seeds, p = 0.0312, significant." in says


def test_few_seeds_are_never_marked_and_the_page_says_why(tmp_path):
    five = {name: values[:5] for name, values in SIX.items()}
    found = cells(spec(tmp_path, 5), results(**five))
    assert best(spec(tmp_path, 5), found, "acc") is None
    assert "**" not in main_table(spec(tmp_path, 5), found)
    assert "So few seeds cannot be significant: the smallest p-value possible is 0.062." in significance(
        spec(tmp_path, 5), found
    )


def test_difference_that_is_no_rule_is_not_marked(tmp_path):
    found = cells(spec(tmp_path), results(x=SIX["x"], y=[0.4, 0.7, 0.5, 0.6, 0.5, 0.3]))
    assert best(spec(tmp_path), found, "acc") is None
    assert "not significant." in significance(spec(tmp_path), found)


def test_without_a_direction_nothing_is_marked(tmp_path):
    plain = spec(tmp_path, metrics={"acc": "val/accuracy"})
    assert best(plain, cells(plain, results(**SIX)), "acc") is None
    assert "- acc" not in significance(plain, cells(plain, results(**SIX)))


def test_pairs_are_those_seeds_that_both_finished(tmp_path):
    found = cells(spec(tmp_path), results(x=[0.5, "boom", 0.7], y=[0.1, 0.2, 0.2]))
    comparison = compare(found["x"]["acc"], found["y"]["acc"])
    assert (comparison.pairs, comparison.p) == (2, 0.5)
    assert comparison.difference == pytest.approx(0.45)
    assert "| x | 0.6 ± 0.14 (n = 2) |" in main_table(spec(tmp_path), found)
    nothing = cells(spec(tmp_path), results(x=["boom"], y=[0.1]))
    assert compare(nothing["x"]["acc"], nothing["y"]["acc"]) is None
    assert "| x | - |" in main_table(spec(tmp_path), nothing)


def three(tmp_path, seeds):
    return spec(tmp_path, seeds, axes={"a": {"base": {}, "x": {}, "y": {}}}, baseline={"a": "base"})


def test_baseline_is_tested_against_all_with_corrected_p_values(tmp_path):
    base = [0.1 * seed for seed in range(7)]
    values = {"base": base, "x": [each + 0.3 for each in base], "y": [each + 0.1 for each in base]}
    found = cells(three(tmp_path, 7), results(**values))
    comparisons = against_baseline(three(tmp_path, 7), found, "acc")
    assert comparisons["x"].p == comparisons["y"].p == 2 / 2**7
    assert best(three(tmp_path, 7), found, "acc") == "x"
    assert "| x | +0.3 (p = 0.016) |" in baseline_table(three(tmp_path, 7), found)
    assert "differs from the baseline" in significance(three(tmp_path, 7), found)


def test_five_seeds_are_too_few_and_six_enough_for_any_number_of_combinations(tmp_path):
    for seeds, marked in ((5, None), (6, "x")):
        base = [0.1 * seed for seed in range(seeds)]
        values = {"base": base, "x": [each + 0.3 for each in base], "y": [each + 0.1 for each in base]}
        found = cells(three(tmp_path, seeds), results(**values))
        assert best(three(tmp_path, seeds), found, "acc") == marked
        says = significance(three(tmp_path, seeds), found)
        assert ("the smallest p-value possible is 0.062" in says) == (marked is None)


def test_best_baseline_is_not_marked(tmp_path):
    base = spec(tmp_path, baseline={"a": "x"})
    found = cells(base, results(**SIX))
    assert best(base, found, "acc") is None
    assert "the baseline itself is the best" in significance(base, found)


def test_page_has_failures_and_commands_and_versions(tmp_path):
    text = page(spec(tmp_path, 2), results(x=[0.5, "a | b\nc"], y=[0.1, 0.2]), ["curves.png"])
    assert text.startswith("# spec\n\nMean ± standard deviation over seeds 0, 1. 3 of 4 runs are finished")
    assert "| x, seed 1 | failed | a \\| b c |" in text
    assert "- x: `stable-opd fit --seed_everything 0`" in text
    assert "stable-opd 0.1.0, at commit abc, on C." in text
    assert "![curves.png](curves.png)" in text
    assert "- `acc`: last val/accuracy" in text
    assert "## Not finished" not in page(spec(tmp_path, 2), results(**SIX))


def test_table_for_mathematics_leaves_missing_columns_empty(tmp_path):
    metrics = {"math500": "m", "AIME-24": "a", "other": "o"}
    maths = spec(tmp_path, 2, metrics=metrics, table="math")
    found = [
        Result({"a": name}, seed, "finished", {"math500": 0.5 + seed / 10, "AIME-24": 0.25}, None, "")
        for name in ("x", "y")
        for seed in (0, 1)
    ]
    lines = math_table(maths, cells(maths, found)).splitlines()
    assert lines[0] == "| a | MATH500 | Minerva | Olympiad | AMC | AIME24 | AIME25 | Avg. |"
    assert lines[2] == "| x | 55.0 ± 7.1 |  |  |  | 25.0 ± 0.0 |  |  |"
    assert "## Mathematics" in page(maths, found)


def test_table_for_mathematics_averages_what_is_complete(tmp_path):
    names = ["math500", "minerva", "olympiad", "amc", "aime24", "aime25"]
    maths = spec(tmp_path, 1, metrics=dict.fromkeys(names, "c"), table="math")
    metrics = {name: number / 10 for number, name in enumerate(names)}
    found = [Result({"a": "x"}, 0, "finished", metrics, None, "")]
    assert math_table(maths, cells(maths, found)).splitlines()[2].endswith("| 40.0 | 50.0 | 25.0 |")


def test_rows_are_json_without_nan(tmp_path):
    write_rows(tmp_path / "r.jsonl", results(x=[math.nan, 0.5, "boom"]))
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["metrics"] for row in rows] == [{"acc": None}, {"acc": 0.5}, {}]
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert {"variants", "seed", "reason", "command", "versions", "commit", "seconds", "host"} <= set(rows[0])


def test_csv_has_mean_deviation_and_number(tmp_path):
    write_table(tmp_path / "r.csv", spec(tmp_path, 2), results(x=[0.25, 0.75], y=["boom", "boom"]))
    first, second = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    assert (first["a"], first["acc_mean"], first["acc_seeds"]) == ("x", "0.5", "2")
    assert float(first["acc_std"]) == pytest.approx(math.sqrt(0.125))
    assert (second["acc_mean"], second["acc_std"], second["acc_seeds"]) == ("", "", "0")


def test_grid_of_a_heat_map_has_the_first_axis_down(tmp_path):
    two = spec(
        tmp_path, axes={"a": {"x": {}, "y": {}}, "b": {"u": {}, "v": {}, "w": {}}}, exclude=[{"a": "y", "b": "w"}]
    )
    found = [
        Result({"a": a, "b": b}, 0, "finished", {"acc": float(f"{i}.{j}")}, None, "")
        for i, a in enumerate("xy")
        for j, b in enumerate("uvw")
        if (a, b) != ("y", "w")
    ]
    table = grid(two, cells(two, found))
    assert table[0] == [0.0, 0.1, 0.2]
    assert table[1][:2] == [1.0, 1.1]
    assert math.isnan(table[1][2])


def test_column_that_no_run_has_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr("stable_opd.bench.command.metric_rows", lambda _: [{"step": "0", "val/accuracy": "1"}])

    class SomeRun:
        folder = tmp_path

    wrong = spec(tmp_path, 1, metrics={"acc": "val/acuracy"})
    (warning,) = unknown_columns(wrong, [SomeRun()], results(x=[None]))
    assert "'val/acuracy'" in warning
    assert "Did you mean 'val/accuracy'?" in warning
    assert unknown_columns(wrong, [SomeRun()], results(x=[0.5])) == []


FIRST = {"onset": {"column": "train/truncation_rate", "reduce": "first", "above": 0.9}}


def test_what_never_happened_is_counted_and_not_averaged(tmp_path):
    never = math.inf
    made = results("onset", x=[10.0, never, 20.0], y=[never] * 3, z=[never, "boom", never])
    table = main_table(spec(tmp_path, 3, FIRST), cells(spec(tmp_path, 3, FIRST), made))
    assert "| x | 15 ± 7.1 in 2 of 3 |" in table
    assert "| y | never |" in table
    assert "| z | never (n = 2) |" in table


def test_page_of_figures_without_a_direction_has_no_test(tmp_path):
    text = page(spec(tmp_path, 2, FIRST, baseline={"a": "x"}), results("onset", x=[1.0, 2.0], y=[3.0, 4.0]))
    assert "optimizer steps before train/truncation_rate first exceeds 0.9" in text
    assert "Bold" not in text
    assert "Differences" not in text
