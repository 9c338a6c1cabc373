"""Every recipe that is shipped runs: what is not executed here rots."""

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import yaml

import mathematics
from helpers import problems, write_jsonl
from sharded import run
from stable_opd.cli import main
from stable_opd.resume import step_of
from standing_in import standing_in

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
#: As little work as shows that the parts fit together.
SMALL = {
    "--trainer.max_steps": "2",
    "--trainer.val_check_interval": "1",
    "--trainer.limit_val_batches": "1",
    "--trainer.num_sanity_val_steps": "0",
    "--trainer.enable_progress_bar": "false",
    "--trainer.accelerator": "cpu",
    "--trainer.devices": "1",
    "--trainer.strategy": "auto",
    "--trainer.precision": "32-true",
    "--model.rollout.max_new_tokens": "8",
    "--data.batch_size": "2",
    "--data.eval_batch_size": "2",
}
#: What stands in for models and data that would have to be downloaded.
STAND_INS = {
    "--model.student": "testbed:student",
    "--model.teacher.init_args.path": "testbed:teacher",
    "--data.train.path": "testbed:train",
    "--data.validation.path": "testbed:validation",
    "--data.chat_template": "false",
}


def flags(options):
    return [part for option in options.items() for part in option]


def trained(folder):
    """The header of the figures that a run of two steps left."""
    newest = max(folder.rglob("*.ckpt"), key=step_of)
    assert torch.load(newest, weights_only=True)["global_step"] == 2
    (metrics,) = folder.rglob("metrics.csv")
    return metrics.read_text().splitlines()[0].split(",")


def smaller(config):
    """The flags for a recipe: one rollout where it has any, since none is another method."""
    rollout = yaml.safe_load(config.read_text())["model"]["rollout"]
    return SMALL | {"--model.rollout.samples_per_prompt": str(min(1, rollout.get("samples_per_prompt", 1)))}


@contextmanager
def servers():
    """The flags that name servers of the testbed's models."""
    with standing_in("testbed:student", "student") as student, standing_in("testbed:teacher", "teacher") as teacher:
        yield {"--model.engine.server.url": student.url, "--model.teacher.server.url": teacher.url}


def routed(path):
    """Flags that give the two teachers a stand-in each, and examples that name them."""
    records = [each | {"subject": subject} for each, subject in zip(problems(8), ["math", "code"] * 4, strict=True)]
    teachers = {"math": "testbed:teacher", "code": "testbed:control"}
    return {f"--model.teacher.teachers.{name}.init_args.path": each for name, each in teachers.items()} | {
        "--data.train.path": write_jsonl(path / "routed.jsonl", records)
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("config", [each for each in CONFIGS if each.parent == FOLDER], ids=lambda path: path.stem)
def test_recipe_runs_for_two_steps(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {} if "testbed:student" in config.read_text() else dict(STAND_INS)
    if config.stem == "routed":
        del models["--model.teacher.init_args.path"]
        models |= routed(tmp_path)
    with servers() if "VLLMEngine" in config.read_text() else nullcontext({}) as urls:
        main(["fit", "-c", str(config), *flags(smaller(config) | models | urls)])
    assert "train/loss" in trained(tmp_path)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """What takes the place of real models and real data, which are not here: tiny models, and problems of our own in
    the columns of the real ones."""
    folder = tmp_path_factory.mktemp("mathematics")
    files = mathematics.write_sets(folder)
    student, teacher = (mathematics.byte_model(folder / name, seed) for seed, name in enumerate(("student", "teacher")))
    sets = {f"--data.validation.{name}.path": files[name] for name in mathematics.EVALUATION}
    return {
        "--model.student": student,
        "--model.teacher.path": teacher,
        "--data.train.path": files["train"],
        "--data.max_golden_tokens": "60",
    } | sets


@pytest.mark.parametrize("config", sorted((FOLDER / "math").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_for_mathematics_runs_with_stand_ins(config, stand_ins, tmp_path, monkeypatch):
    """All else is that of the recipe: columns, filters, tasks and samples. Of six problems four pass the filters."""
    monkeypatch.chdir(tmp_path)
    if "teacher" not in yaml.safe_load(config.read_text())["model"]:
        stand_ins = {name: each for name, each in stand_ins.items() if name != "--model.teacher.path"}
    main(["fit", "-c", str(config), *flags(smaller(config) | stand_ins | {"--data.train.part": json.dumps([0, 4])})])
    found = trained(tmp_path)
    for name in mathematics.EVALUATION:
        assert f"val/{name}/sampled/accuracy" in found
    assert {"train/loss/mixture", "val/accuracy", "val/aime24/sampled/pass_at_32"} <= set(found)
    assert "val/math500/sampled/pass_at_32" not in found
    assert ("train/length_mean" in found) == (config.stem != "warm_start")  # somebody wrote


@pytest.mark.slow
@pytest.mark.parametrize("names", [["one_gpu"], ["eight_gpus", "two_nodes"]], ids=lambda names: names[-1])
def test_recipe_for_other_devices_runs_with_stand_ins(names, stand_ins, tmp_path, monkeypatch):
    """Over the recipe for mathematics, as their headers say; what is sharded is so here too, on one process."""
    monkeypatch.chdir(tmp_path)
    first = FOLDER / "math" / "stable_opd.yaml"
    configs = [first, *(FOLDER / "devices" / f"{name}.yaml" for name in names)]
    small = {name: value for name, value in smaller(first).items() if name != "--trainer.strategy"}
    small |= {"--trainer.num_nodes": "1"}
    arguments = [part for config in configs for part in ("-c", str(config))]
    arguments += flags(small | stand_ins | {"--data.train.part": json.dumps([0, 4])})
    assert run(["fit", *arguments], 1) == [0]
    (path,) = tmp_path.rglob("last-step=2.ckpt")
    assert path.is_dir() == (names != ["one_gpu"])
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert {"train/loss/mixture", "val/aime24/sampled/pass_at_32"} <= set(
        metrics.read_text().splitlines()[0].split(",")
    )


def test_every_recipe_is_run_here():
    found = {path.relative_to(FOLDER).parts[0] for path in CONFIGS if path.parent != FOLDER}
    assert found == {"math", "devices"}
    assert {path.stem for path in (FOLDER / "devices").glob("*.yaml")} == {"one_gpu", "eight_gpus", "two_nodes"}


def test_parts_of_the_warm_start_and_of_the_distillation_share_nothing():
    read = lambda name: yaml.safe_load((FOLDER / "math" / name).read_text())["data"]["init_args"]  # noqa: E731
    first, second = read("warm_start.yaml"), read("stable_opd.yaml")
    assert first["train"].pop("part") == [0, 33000]
    assert second["train"].pop("part") == [33000, 46000]
    assert first == second  # the same examples pass the filters
