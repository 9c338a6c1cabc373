"""What a spec may say, and what is said of one that is wrong."""

import re

import pytest

from bench.common import spec_of, write_spec
from stable_opd.bench.command import EPILOG
from stable_opd.bench.expand import combinations
from stable_opd.bench.spec import METRICS, Metric, Plot, read
from stable_opd.bench.yamls import SpecError, load


def test_a_short_spec_has_sensible_defaults(tmp_path):
    spec = spec_of(tmp_path)
    assert spec.seeds == (0,)
    assert spec.metrics == METRICS
    assert spec.config == tmp_path / "recipe.yaml"
    assert list(spec.axes["a"]) == ["x", "y"]


def test_a_long_spec_is_read(tmp_path):
    spec = spec_of(
        tmp_path,
        axes={"a": {"x": None, 0.5: {"model.divergence": "ReverseKL"}}, "b": {"z": {"config": "recipe.yaml"}}},
        seeds=[3, 1],
        metrics={"loss": "train/loss", "late": {"column": "val/accuracy", "reduce": "mean", "window": 3}},
        exclude=[{"a": ["x"], "b": "z"}],
        baseline={"b": "z", "a": 0.5},
        options={"trainer.max_steps": 3},
        table="math",
        alpha=0.1,
        plots={"p": {"panels": {"T": "c", "U": {"l": "d"}}, "variants": {"a": ["x"], "b": "z"}}},
    )
    assert spec.seeds == (3, 1)
    assert spec.metrics == {"loss": Metric("train/loss"), "late": Metric("val/accuracy", "mean", 3)}
    assert spec.exclude == ({"a": ("x",), "b": ("z",)},)
    assert spec.baseline == {"a": "0.5", "b": "z"}
    assert spec.axes["a"]["0.5"].overrides == {"model.divergence": "ReverseKL"}
    assert spec.axes["b"]["z"].config == tmp_path / "recipe.yaml"
    assert (spec.table, spec.alpha) == ("math", 0.1)
    assert spec.plots == {"p": Plot({"T": {"": "c"}, "U": {"l": "d"}}, {"a": ("x",), "b": ("z",)})}
    assert spec.command == "fit"


def test_a_command_without_a_recipe_needs_none(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("command: detect\naxes: {a: {x: {}}}\n")
    assert (read(path).command, read(path).config) == ("detect", None)
    path.write_text("axes: {a: {x: {}}}\n")
    with pytest.raises(SpecError, match="Expected `config` in"):
        read(path)


WRONG = {
    "unknown key": ({"sedes": [0]}, "key of the spec out of .*, but got 'sedes'. Did you mean 'seeds'"),
    "no axes": ({"axes": {}}, "at least one axis"),
    "axes of a wrong type": ({"axes": ["x"]}, "`axes` to be a mapping, but got"),
    "empty axis": ({"axes": {"a": {}}}, "at least one variant of axis 'a'"),
    "variant of a wrong type": ({"axes": {"a": {"x": 3}}}, "variant 'x' of axis 'a' to be a mapping, but got 3"),
    "name with a joint": ({"axes": {"a": {"x+y": {}}}}, "letters, digits.*but got 'x\\+y'"),
    "name that is a truth value": ({"axes": {"a": {True: {}}}}, "but got True. .*quote it"),
    "two spellings of a name": ({"axes": {"a": {0.5: {}, "0.5": {}}}}, "each key once, but got '0.5'"),
    "key that is no key": ({"axes": {"a": {"x": {"--model": 1}}}}, "dotted keys.*but got '--model'"),
    "seed as an override": ({"options": {"seed_everything": 1}}, "leave seed_everything to the runner.*`seeds`"),
    "logger as an override": ({"options": {"trainer.logger.name": "x"}}, "leave trainer.logger to the runner"),
    "unknown axis left out": ({"exclude": [{"aa": "x"}]}, "axis in `exclude` out of a, but got 'aa'"),
    "unknown variant left out": ({"exclude": [{"a": "xx"}]}, "out of x, y, but got 'xx'. Did you mean 'x'"),
    "nothing left out": ({"exclude": [{}]}, "empty one"),
    "unknown baseline": ({"baseline": {"a": "w"}}, "variant of axis 'a' in `baseline` out of x, y, but got 'w'"),
    "half a baseline": ({"baseline": {}}, "variant of every axis in `baseline`, but got none of a"),
    "seeds of a wrong type": ({"seeds": 3}, "`seeds` to be a list, but got 3"),
    "equal seeds": ({"seeds": [1, 1]}, "different integers"),
    "negative seed": ({"seeds": [-1]}, "none negative"),
    "truth value as a seed": ({"seeds": [True]}, "different integers"),
    "no metrics": ({"metrics": {}}, "at least one metric"),
    "metric without a column": ({"metrics": {"m": {"reduce": "max"}}}, "'m' to have a `column`"),
    "unknown reduction": ({"metrics": {"m": {"column": "c", "reduce": "median"}}}, "but got 'median'"),
    "unknown direction": ({"metrics": {"m": {"column": "c", "better": "bigger"}}}, "higher, lower, None, but got"),
    "window without a mean": ({"metrics": {"m": {"column": "c", "window": 3}}}, "only beside `reduce: mean`"),
    "bound without first": ({"metrics": {"m": {"column": "c", "above": 3}}}, "`reduce: first` and `above` together"),
    "first without a bound": ({"metrics": {"m": {"column": "c", "reduce": "first"}}}, "Add or remove one"),
    "bound that is no number": (
        {"metrics": {"m": {"column": "c", "reduce": "first", "above": "high"}}},
        "`above` of metric 'm' to be a number, but got 'high'",
    ),
    "direction of a first step": (
        {"metrics": {"m": {"column": "c", "reduce": "first", "above": 1, "better": "lower"}}},
        "no `better` beside `reduce: first`",
    ),
    "unknown command": ({"command": "test"}, "`command` out of fit, detect, but got 'test'"),
    "plot without panels": ({"plots": {"p": {}}}, "at least one panel in plot 'p'"),
    "panel of a wrong type": ({"plots": {"p": {"panels": {"t": {"l": 3}}}}}, "panel 't' of plot 'p' to be a column"),
    "plot of an unknown variant": (
        {"plots": {"p": {"panels": {"t": "c"}, "variants": {"a": "xx"}}}},
        "variant of axis 'a' in `variants` of plot 'p' out of x, y, but got 'xx'",
    ),
    "window of zero": ({"metrics": {"m": {"column": "c", "reduce": "mean", "window": 0}}}, "positive integer"),
    "missing recipe": ({"config": "nowhere.yaml"}, "which is no file. Paths start at the spec"),
    "missing recipe of a variant": ({"axes": {"a": {"x": {"config": "no.yaml"}}}}, "`config` of variant 'x'"),
    "unknown table": ({"table": "maths"}, "`table: math` or no table, but got 'maths'"),
    "alpha of one": ({"alpha": 1}, "between 0 and 1"),
}


@pytest.mark.parametrize(("keys", "message"), WRONG.values(), ids=WRONG)
def test_wrong_spec_is_refused_with_what_was_expected_and_what_came(keys, message, tmp_path):
    with pytest.raises(SpecError, match=message):
        spec_of(tmp_path, **keys)


def test_key_that_is_written_twice_is_refused_with_its_place(tmp_path):
    path = write_spec(tmp_path)
    path.write_text("config: recipe.yaml\naxes:\n  a:\n    x: {}\n    x: {model.mixture: StudentOnly}\n")
    with pytest.raises(SpecError, match=r"each key once, but got 'x' again in .*spec.yaml, line 5"):
        read(path)


def test_example_of_the_help_is_a_spec(tmp_path):
    example = EPILOG.partition("A spec:\n")[2].partition("\n\nWithout")[0]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").touch()
    (tmp_path / "specs").mkdir()
    path = tmp_path / "specs" / "spec.yaml"
    path.write_text(example)
    spec = read(path)
    assert len(combinations(spec)) == 3
    assert spec.baseline == {"mixture": "none", "anchor": "without"}


def test_missing_spec_and_broken_yaml_are_refused(tmp_path):
    with pytest.raises(SpecError, match="a benchmark spec in a file, but got"):
        read(tmp_path / "nowhere.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("config: [")
    with pytest.raises(SpecError, match=re.escape(str(path))):
        read(path)
    path.write_text("config: recipe.yaml\n")
    with pytest.raises(SpecError, match="Expected `axes`"):
        read(path)


def test_numbers_are_read_as_the_command_line_reads_them():
    assert load("[1e-6, 1E3, 1.5e-3, 7, x1e3, 1.0]") == [1e-6, 1e3, 1.5e-3, 7, "x1e3", 1.0]


def test_anchors_may_be_merged():
    assert load("a: &a {x: 1}\nb: {<<: *a, y: 2}")["b"] == {"x": 1, "y": 2}
