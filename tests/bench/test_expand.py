"""From a spec to command lines; the command line itself says what they come to."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from bench.common import spec_of
from stable_opd.bench.expand import combinations, expand, gather
from stable_opd.bench.recipes import argument, differences, explicit, find, flags, place, resolve
from stable_opd.bench.spec import read
from stable_opd.bench.yamls import SpecError
from stable_opd.cli import main

ROOT = Path(__file__).parent.parent.parent
RECIPE = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())


def two_axes(tmp_path, **keys):
    axes = {"a": {"x": {}, "y": {"model.mixture": "StudentOnly"}}, "b": {"u": {}, "v": {"trainer.max_steps": 7}}}
    return spec_of(tmp_path, axes=axes, **keys)


def test_product_is_in_the_order_of_the_spec(tmp_path):
    assert [tuple(each.values()) for each in combinations(two_axes(tmp_path))] == [
        ("x", "u"),
        ("x", "v"),
        ("y", "u"),
        ("y", "v"),
    ]


def test_exclusions_leave_out_what_matches_all_their_axes(tmp_path):
    spec = two_axes(tmp_path, exclude=[{"a": "x", "b": ["v", "u"]}, {"a": "y", "b": "u"}])
    assert combinations(spec) == [{"a": "y", "b": "v"}]
    with pytest.raises(SpecError, match="leaves out all"):
        combinations(two_axes(tmp_path, exclude=[{"a": ["x", "y"]}]))
    with pytest.raises(SpecError, match="baseline to be run"):
        combinations(two_axes(tmp_path, exclude=[{"a": "x"}], baseline={"a": "x", "b": "u"}))


def test_variants_win_over_options(tmp_path):
    spec = two_axes(tmp_path, options={"trainer.max_steps": 3, "model.mixture.weight": 2.0, "model.student": "s"})
    _, changes = gather(spec, {"a": "y", "b": "v"})
    assert changes == {"model.student": "s", "model.mixture": "StudentOnly", "trainer.max_steps": 7}


@pytest.mark.parametrize("second", ["model.mixture", "model"])
def test_axis_that_undoes_another_is_refused(second, tmp_path):
    axes = {"a": {"x": {"model.mixture.weight": 1.0, "model.mixture": 1}}, "b": {"u": {second: {}}}}
    with pytest.raises(SpecError, match=rf"undone by {second} of axis 'b'"):
        gather(spec_of(tmp_path, axes=axes), {"a": "x", "b": "u"})


def test_settings_may_follow_their_component(tmp_path):
    axes = {"a": {"x": {"model.mixture": "GoldenMixture"}}, "b": {"u": {"model.mixture.weight": 1.0}}}
    _, changes = gather(spec_of(tmp_path, axes=axes), {"a": "x", "b": "u"})
    assert changes == {"model.mixture": "GoldenMixture", "model.mixture.weight": 1.0}


def test_two_axes_with_recipes_are_refused(tmp_path):
    axes = {"a": {"x": {"config": "recipe.yaml"}}, "b": {"u": {"config": "recipe.yaml"}}}
    with pytest.raises(SpecError, match="one axis to name a recipe, but got a, b"):
        gather(spec_of(tmp_path, axes=axes), {"a": "x", "b": "u"})


def test_values_are_placed_where_a_flag_would_put_them():
    recipe = {"model": {"mixture": "GoldenMixture", "teacher": {"class_path": "T", "init_args": {"path": "p", "k": 1}}}}
    place(recipe, "model.mixture.weight", 2.0)
    place(recipe, "model.teacher.path", "q")
    place(recipe, "model.constraints.anchor", None)
    place(recipe, "model.teacher.init_args.k", 2)
    assert recipe["model"] == {
        "mixture": {"class_path": "GoldenMixture", "init_args": {"weight": 2.0}},
        "teacher": {"class_path": "T", "init_args": {"path": "q", "k": 2}},
        "constraints": {"anchor": None},
    }
    assert find(recipe, "model.mixture.weight") == 2.0
    assert find(recipe, "model.nowhere") != find(recipe, "model.mixture.weight")
    with pytest.raises(SpecError, match=r"Expected trainer\.devices to have keys, but got 2"):
        place({"trainer": {"devices": 2}}, "trainer.devices.x", 1)


@pytest.mark.parametrize(
    "value", [1, 1.5, 1e-6, True, None, "x", "1", "null", "", " x", "a: b", {"k": [1]}, ["a"], "é#"]
)
def test_arguments_survive_shell_and_yaml(value):
    (word,) = shlex.split(shlex.quote(argument(value)))
    assert yaml.safe_load(word) == value or float(word) == value


def test_component_without_settings_is_a_bare_name():
    assert flags({"model.divergence": {"class_path": "ReverseKL", "init_args": {}}}) == [
        "--model.divergence",
        "ReverseKL",
    ]
    assert argument({"class_path": "A", "init_args": {"k": 1}}) == '{"class_path": "A", "init_args": {"k": 1}}'


@pytest.fixture
def carrying(tmp_path, monkeypatch):
    """A recipe whose divergence and mixture have settings that others have too, with other defaults."""
    monkeypatch.chdir(tmp_path)
    recipe = {key: dict(value) for key, value in RECIPE.items()}
    transform = {"class_path": "LowerClip", "init_args": {"share": 0.7}}
    settings = {"clip": 0.3, "discount": 0.5, "transform": transform}
    recipe["model"]["divergence"] = {"class_path": "SampledReverseKL", "init_args": settings}
    recipe["model"]["mixture"] = {"class_path": "GoldenMixture", "init_args": {"weight": 2.0, "schedule": "Linear"}}

    def carrying(**axes):
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump({"config": "recipe.yaml", "axes": axes, "seeds": [0, 4]}, sort_keys=False))
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return read(path)

    return carrying


def printed(command, capsys):
    """What the command line makes of a command that was pasted."""
    program, *arguments = shlex.split(command)
    assert program == "stable-opd"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


DEFAULTS = {"clip": 0.2, "discount": 0.0, "transform": None}


def test_nothing_is_carried_over_from_one_component_to_another(carrying, capsys):
    """As a plain flag, a second file or JSON, the new class would keep all settings of these names."""
    spec = carrying(
        d={
            "bare": {"model.divergence": "SampledJensenShannon"},
            "full": {"model.divergence": {"class_path": "SampledJensenShannon", "init_args": {"limit": 3.0}}},
            "same": {"model.divergence": {"class_path": "SampledReverseKL", "init_args": {"dual_clip": 3.0}}},
            "nested": {
                "model.divergence": {"class_path": "SampledReverseKL", "init_args": {"transform": "LowerClip"}},
            },
        },
        m={"teacher": {"model.mixture": "TeacherMixture"}},
    )
    plain = printed("stable-opd fit -c recipe.yaml --model.divergence SampledJensenShannon", capsys)
    assert plain["model"]["divergence"]["init_args"]["clip"] == 0.3
    runs = {run.variants["d"]: run for run in expand(spec, Path("out")) if run.seed == 4}
    found = {name: printed(run.command, capsys)["model"] for name, run in runs.items()}
    settings = {name: each["divergence"]["init_args"] for name, each in found.items()}
    for name in ("bare", "full", "same"):
        assert settings[name].items() >= DEFAULTS.items(), name
    assert settings["full"]["limit"] == 3.0
    assert settings["same"]["dual_clip"] == 3.0
    assert settings["nested"]["transform"]["init_args"] == {"share": 0.3}
    assert settings["nested"]["clip"] == 0.2
    mixture = found["bare"]["mixture"]
    assert mixture["class_path"].endswith("TeacherMixture")
    assert mixture["init_args"]["schedule"] is None
    assert mixture["init_args"]["weight"] == 1.0


def test_config_of_a_run_is_what_its_command_comes_to(carrying, capsys):
    spec = carrying(d={"x": {"model.constraints.anchor": None, "trainer.max_steps": 3}})
    for run in expand(spec, Path("out")):
        config = printed(run.command, capsys)
        logger = config["trainer"].pop("logger")
        assert config == run.config
        assert config["seed_everything"] == run.seed
        place_of_run = logger["init_args"]
        assert Path(place_of_run["save_dir"]) / place_of_run["name"] / place_of_run["version"] == run.folder
        assert config["model"]["constraints"] == {"anchor": None}
        assert config["trainer"]["max_steps"] == 3
        assert "-c recipe.yaml" in run.command


def test_what_cannot_be_said_by_flags_is_refused():
    """A command line that keeps a setting whatever is written."""
    truth = {"model": {"divergence": {"class_path": "B", "init_args": {"k": 1}}}}
    kept = {"model": {"divergence": {"class_path": "B", "init_args": {"k": 2}}}}
    with pytest.raises(SpecError, match=r"carried over: model.divergence.init_args.k: 1 became 2\. Take them out"):
        explicit({"model.divergence": "B"}, truth, ["-c", "r"], lambda _: kept)


def test_numbers_that_flags_turn_into_text_are_no_carrying_over(carrying, capsys):
    (run, _) = expand(carrying(d={"x": {"trainer.devices": 2, "trainer.precision": 32}}), Path("out"))
    found = printed(run.command, capsys)["trainer"]
    assert (str(found["devices"]), str(found["precision"])) == ("2", "32")
    truth, text = {"a": True}, {"a": "True"}
    with pytest.raises(SpecError, match="carried over"):
        explicit({"a": True}, truth, [], lambda _: text)


def test_differences_name_the_keys():
    before, after = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    assert differences(before, after) == ["a.c: 2 became 5", "d: 3 became nothing", "e: nothing became 4"]


def test_misspelt_component_is_refused_before_anything_runs(carrying):
    with pytest.raises(SpecError, match=r"(?s)Variant x: .*Did you mean 'ReverseKL'"):
        expand(carrying(d={"x": {"model.divergence": "RevrseKL"}}), Path("out"))


@pytest.mark.parametrize(
    "logger",
    [
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "boards", "prefix": "p"}},
        {"class_path": "CSVLogger", "init_args": {"save_dir": "x", "prefix": "p", "flush_logs_every_n_steps": 7}},
        [{"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}],
        False,
        None,
    ],
    ids=["another class", "with settings", "several", "switched off", "not set"],
)
def test_every_run_logs_into_its_folder_whatever_the_recipe_says(logger, carrying, capsys):
    spec = carrying(d={"x": {}})
    recipe = yaml.safe_load(spec.config.read_text())
    recipe["trainer"].pop("logger")
    if logger is not None:
        recipe["trainer"]["logger"] = logger
    spec.config.write_text(yaml.safe_dump(recipe))
    run = expand(spec, Path("out"))[1]
    found = printed(run.command, capsys)["trainer"]["logger"]
    assert found["class_path"].endswith("CSVLogger")
    expected = {"save_dir": "out", "name": "x", "version": "seed-4", "prefix": "", "flush_logs_every_n_steps": 100}
    assert found["init_args"] == expected


def test_fingerprint_follows_recipe_and_seed_but_not_the_folder(carrying):
    spec = carrying(d={"x": {}})
    first, second = expand(spec, Path("out"))
    assert first.fingerprint != second.fingerprint
    assert expand(spec, Path("elsewhere"))[0].fingerprint == first.fingerprint
    recipe = yaml.safe_load(spec.config.read_text())
    recipe["model"]["rollout"]["max_new_tokens"] = 95
    spec.config.write_text(yaml.safe_dump(recipe))
    assert expand(spec, Path("out"))[0].fingerprint != first.fingerprint


def test_shared_folder_of_checkpoints_is_refused(carrying):
    callback = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept"}}
    with pytest.raises(SpecError, match="in the folder of each run, but got dirpath 'kept'"):
        expand(carrying(d={"x": {"trainer.callbacks": [callback]}}), Path("out"))


def test_resolving_leaves_the_arguments_of_the_process_alone(carrying, monkeypatch):
    carrying(d={"x": {}})
    monkeypatch.setattr("sys.argv", ["stable-opd", "bench", "spec.yaml"])
    assert resolve(["fit", "-c", "recipe.yaml"])["model"]["divergence"]["init_args"]["clip"] == 0.3
    with pytest.raises(SpecError, match=r"no-such\.yaml"):
        resolve(["fit", "-c", "no-such.yaml"])


SHIPPED = {"ablation": 36, "constraints": 11, "detectors": 27, "divergences": 50, "mixtures": 32, "terminal": 27}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), SHIPPED.items())
def test_shipped_specs_expand(name, count, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = expand(read(Path("benchmarks") / f"{name}.yaml"), Path("runs"))
    assert len(runs) == len({run.fingerprint for run in runs}) == len({run.folder for run in runs}) == count
    assert all("-c configs/" in run.command or name == "detectors" for run in runs)
    assert json.dumps([run.config for run in runs])


def test_every_spec_that_is_shipped_is_tested():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.yaml")} == set(SHIPPED)
