"""Runs that are killed, and started again by the same command."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from helpers import save, tiny_model
from killing import attempt
from runs import logged, same
from stable_opd.callbacks import RunCheckpoint
from stable_opd.callbacks.checkpoint import _state_bytes
from stable_opd.cli import main
from stable_opd.resume import changes, checkpoints, step_of

STEPS = 7


@pytest.fixture(scope="module")
def place(teacher_path, train_path, validation_path, tmp_path_factory):
    """A folder with a recipe of which every part remembers something.

    Epochs have 3 steps and an evaluation comes after every second, so that 7 steps see each of them in each place.
    """
    place = tmp_path_factory.mktemp("resume")
    config = {
        "model": {
            # Dropout draws from the global generator.
            "student": save(tiny_model(1, attention_dropout=0.3), place / "student"),
            "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path}},
            "divergence": "SampledReverseKL",
            "mixture": {"class_path": "ReplayMixture", "init_args": {"rate": 0.5, "capacity": 20}},
            "repetition": {"class_path": "PeriodicSuffix", "init_args": {"min_tokens": 3, "max_period": 4}},
            "constraints": {
                "anchor": {
                    "class_path": "ReferenceKL",
                    "init_args": {"weight": 0.1, "controller": {"class_path": "DualAscent"}},
                },
                "stop": {
                    "class_path": "EntropyFloor",
                    "init_args": {
                        "weight": 0.01,
                        "schedule": {
                            "class_path": "OnMetric",
                            "init_args": {"metric": "train/length_mean", "above": 5.0, "patience": 1},
                        },
                    },
                },
            },
            "reference": {"class_path": "MovingAverage", "init_args": {"decay": 0.9}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.7}},
            "rollout": {"samples_per_prompt": 2, "max_new_tokens": 10},
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {
                "train": {"path": train_path},
                "validation": {"path": validation_path},
                "task": "ModularChains",
                "batch_size": 8,
                "eval_batch_size": 3,
            },
        },
        "trainer": {
            **{"max_steps": STEPS, "accelerator": "cpu", "enable_progress_bar": False},
            **{"check_val_every_n_epoch": None, "val_check_interval": 2},
        },
        "checkpoint": {"every_n_steps": 1},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(config))
    return place


@pytest.fixture
def recipe(place, monkeypatch):
    """Go to the folder, and return what makes the arguments of a run by its name."""
    monkeypatch.chdir(place)

    def arguments(name, *flags):
        return ["fit", "-c", "recipe.yaml", "--ckpt_path", "last", "--trainer.logger.name", name, *flags]

    return arguments


@pytest.fixture
def whole(recipe):
    """The same, with a run that was never interrupted."""
    if not Path("runs", "whole").exists():
        main(recipe("whole", "--checkpoint.keep", "9"))
    return recipe


def copied(name):
    """Copy the run that was never interrupted, and return the folder of its checkpoints."""
    shutil.copytree(Path("runs", "whole"), Path("runs", name))
    return folder(name) / "checkpoints"


def folder(name):
    """Return the folder of a run; a start that was killed may have left one with nothing in it."""
    found = list(Path("runs", name).iterdir())
    (found,) = [each for each in found if checkpoints(each / "checkpoints")] or found
    return found


def state(name, step=STEPS):
    return torch.load(folder(name) / "checkpoints" / f"last-step={step}.ckpt", weights_only=True)


def assert_same_run(name, expected, processes=1):
    """Weights, optimizer and all other state; figures; sample answers."""
    found, wanted = state(name), state(expected)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "reference", "global_step", "epoch"):
        same(found[part], wanted[part], part)
    if processes > 1:
        same(found["processes"], wanted["processes"], "processes")
    assert logged(folder(name)) == logged(folder(expected))
    assert (folder(name) / "samples.jsonl").read_text() == (folder(expected) / "samples.jsonl").read_text()


def test_a_run_goes_on_from_every_step_as_if_it_had_not_been_killed(whole):
    for step in range(1, STEPS):
        name = f"from-{step}"
        for path in checkpoints(copied(name)):
            if step_of(path) != step:
                path.unlink()
        # What a killed process may leave: a cut line, and answers of later steps.
        (folder(name) / "metrics.csv").write_text("step,train/loss\n1,3.0\n5,2")
        main(whole(name))
        assert_same_run(name, "whole")


def killer(moment, step, **options):
    """Flags that add the plug-in which ends the process."""
    settings = {"moment": moment, "step": step, "marker": f"{moment}-{step}"} | options
    return ["--trainer.callbacks", json.dumps([{"class_path": "killing.Killer", "init_args": settings}])]


@pytest.mark.parametrize("moment", ["rollout", "backward", "writing", "evaluation"])
def test_the_same_command_goes_on_after_sigkill(moment, whole):
    name = f"killed-{moment}"
    command = whole(name, *killer(moment, 4))
    process = attempt(command)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(checkpoints(folder(name) / "checkpoints")) == 2
    main(command)
    assert_same_run(name, "whole")
    left = {path.name for path in (folder(name) / "checkpoints").iterdir()}
    assert left == {"last-step=6.ckpt", "last-step=7.ckpt"}  # nothing of the half that was written


@pytest.mark.parametrize("moment", ["rollout", "backward", "evaluation"])
def test_sigterm_finishes_the_step_saves_and_exits_with_143(moment, whole):
    """An evaluation that is due is finished too; checkpoints of single steps are not needed for that."""
    name = f"told-{moment}"
    command = whole(name, *killer(moment, 3, number=signal.SIGTERM), "--checkpoint.every_n_steps", "50")
    process = attempt(command)
    process.join(120)
    assert process.exitcode == 143
    struck = int(Path(f"{moment}-3").read_text())
    done = struck if moment == "evaluation" else struck + 1
    assert step_of(checkpoints(folder(name) / "checkpoints")[0]) == done
    main(command)
    assert_same_run(name, "whole")


def test_signals_at_random_moments(whole):
    """However often, wherever they meet the run: in its start, in a step, in an evaluation, in the end."""
    moments = torch.rand(5, generator=torch.Generator().manual_seed(0)).tolist()
    for number, moment in enumerate(moments):
        process = attempt(whole("random"))
        process.join(3 * moment)
        if process.is_alive():
            (process.terminate if number % 2 else process.kill)()
        process.join(120)
        assert process.exitcode in (0, 143, -signal.SIGKILL, -signal.SIGTERM)
    main(whole("random"))
    assert_same_run("random", "whole")


def test_a_finished_run_is_left_as_it_is(whole):
    copied("finished")
    main(whole("finished"))
    assert_same_run("finished", "whole")
    assert (folder("finished") / "metrics.csv").read_bytes() == (folder("whole") / "metrics.csv").read_bytes()


def test_runs_beside_each_other_find_their_own(recipe):
    """Two seeds that share the logger's folder: the later run is not taken for the earlier one."""
    short = ["--trainer.max_steps", "2"]
    main(recipe("shared", *short))
    with pytest.raises(ValueError, match="seed_everything: 0 became 1"):
        main(recipe("shared", *short, "--seed_everything", "1"))
    main([*recipe("shared", *short, "--seed_everything", "1"), "--ckpt_path", "null"])
    main(recipe("shared"))
    steps = [step_of(checkpoints(Path(f"runs/shared/version_{version}/checkpoints"))[0]) for version in (0, 1)]
    assert steps == [STEPS, 2]


def test_last_is_also_what_an_evaluation_evaluates(whole, caplog):
    """Evaluations write folders of their own, which are no runs to go on with."""
    copied("evaluated")
    for command in ("validate", "predict"):
        main([command, *whole("evaluated")[1:], "--ckpt_path", "null"])
    assert len(list(Path("runs/evaluated").iterdir())) == 3
    for command in ("validate", "predict"):
        caplog.clear()
        main([command, *whole("evaluated")[1:]])
        assert "version_0 goes on from step 7" in caplog.text
    main(whole("evaluated"))  # it is finished, so nothing is trained, least of all in the folder of an evaluation
    assert [each.name for each in Path("runs/evaluated").iterdir() if checkpoints(each / "checkpoints")] == [
        "version_0"
    ]
    accept = ["--checkpoint.accept_changes", "true", "--trainer.max_steps", "8"]
    with pytest.warns(UserWarning, match=r"another configuration: .*anchor.init_args.weight"):
        main(whole("evaluated", "--model.constraints.anchor.init_args.weight", "0.2", *accept))
    assert step_of(checkpoints(Path("runs/evaluated/version_0/checkpoints"))[0]) == 8


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluating_the_last_of_nothing_is_refused(command, recipe):
    with pytest.raises(ValueError, match=r"a run of this configuration with a checkpoint.*Train it first"):
        main([command, *recipe(f"nothing-{command}")[1:]])


def test_a_guard_that_acts_is_part_of_the_configuration():
    def config(**settings):
        guard = {"class_path": "stable_opd.guard.CollapseGuard", "init_args": settings}
        return {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer"}, guard]}}

    assert changes(config(mode="warn"), {"trainer": {"callbacks": None}}) == []
    assert changes(config(mode="act"), config(mode="act")) == []
    (phrase,) = changes(config(mode="act", factor=2.0), config(mode="act", factor=3.0))
    assert phrase == "trainer.callbacks.CollapseGuard.factor: 2.0 became 3.0"
    assert changes(config(mode="act"), {"trainer": {}})


def test_where_a_server_is_may_change_and_what_it_serves_may_not():
    def config(**server):
        return {"model": {"teacher": {"init_args": {"server": {"model": "teacher", **server}}}}}

    here, there = config(url="http://one:8000", retries=4), config(url="http://two:8000", retries=9)
    assert changes(here, there) == []
    (phrase,) = changes(here, config(url="http://one:8000", retries=4, model="other"))
    assert phrase == 'model.teacher.init_args.server.model: "teacher" became "other"'


def test_room_is_asked_for_what_is_saved_and_no_more():
    class Module(LightningModule):
        def __init__(self, adapted):
            super().__init__()
            self.base, self.adapter = torch.nn.Linear(100, 100, bias=False), torch.nn.Linear(10, 10, bias=False)
            self.base.requires_grad_(not adapted)
            self.strict_loading = not adapted

    assert _state_bytes(Module(adapted=False)) == 3 * 4 * (10_000 + 100)
    assert _state_bytes(Module(adapted=True)) == 3 * 4 * 100


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    """Change one bit of a tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def hide_an_object(path):
    torch.save(torch.load(path, weights_only=True) | {"hook": Unpickled()}, path)


@pytest.mark.parametrize("harm", [cut, flip, empty, hide_an_object])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(harm, whole):
    name = f"harmed-{harm.__name__}"
    path = copied(name) / "last-step=7.ckpt"
    harm(path)
    with pytest.warns(UserWarning, match=r"Expected a whole checkpoint of plain values.*last-step=7"):
        main(whole(name))
    assert_same_run(name, "whole")
    assert not Unpickled.called


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_damaged_checkpoint_that_is_named_is_refused(command, whole):
    path = copied(f"named-{command}") / "last-step=7.ckpt"
    cut(path)
    with pytest.raises(ValueError, match=r"Expected a whole checkpoint of plain values, but got .*last-step=7"):
        main([command, *whole("other")[1:], "--ckpt_path", str(path)])


class Unpickled:
    """What a checkpoint must not be able to call."""

    called = False

    def __reduce__(self):
        return setattr, (Unpickled, "called", True)


CHANGES = {
    "learning rate": (["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.5"], "model.optimizer"),
    "component": (["--model.constraints.anchor.weight", "0.2"], "model.constraints.anchor.init_args.weight"),
    "data": (["--data.batch_size", "4"], "data.init_args.batch_size: 8 became 4"),
    "precision": (["--trainer.precision", "bf16-mixed"], "trainer.precision"),
}


@pytest.mark.parametrize(("flags", "named"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("path", ["last", "runs/whole/version_0/checkpoints/last-step=6.ckpt"], ids=["last", "path"])
def test_another_configuration_is_refused_and_what_changed_is_named(path, flags, named, whole):
    name = "whole" if path == "last" else "elsewhere"
    with pytest.raises(ValueError, match=r"begin anew without --ckpt_path, or .* --checkpoint.accept_changes") as error:
        main([*whole(name), *flags, "--ckpt_path", path])
    assert named in str(error.value)


def test_another_configuration_can_be_accepted(whole):
    copied("accepted")
    accept = ["--checkpoint.accept_changes", "true", "--trainer.max_steps", "8"]
    with pytest.warns(UserWarning, match=r"another configuration: .*anchor.init_args.weight: 0.1 became 0.2"):
        main(whole("accepted", "--model.constraints.anchor.init_args.weight", "0.2", *accept))
    assert len([row for row in logged(folder("accepted")) if row["train/loss"]]) == 8


def test_what_has_no_say_in_the_training_may_change(whole):
    copied("longer")
    harmless = ["--trainer.max_steps", "8", "--trainer.log_every_n_steps", "2", "--data.eval_batch_size", "6"]
    main(whole("longer", *harmless, "--checkpoint.keep", "3"))
    assert state("longer", 8)["global_step"] == 8


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(recipe):
    blocked = Path("runs", "blocked", "version_0")
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match=r"Expected to write checkpoints to .*blocked.*trainer.logger.save_dir"):
        main(recipe("blocked", "--trainer.logger.version", "0"))
    assert not (blocked / "metrics.csv").exists()


def test_a_disk_without_room_for_two_checkpoints_is_refused_before_the_first_step(recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**20, 2**20, 2**17))
    with pytest.raises(OSError, match=r"Expected room for 2 checkpoints of about .*trainer.logger.save_dir"):
        main(recipe("full"))


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_says_so(whole):
    """A limit on the size of files stands for the disk: the system refuses the write in the same place."""
    place = copied("limited")
    for step in (4, 5, 6, 7):
        (place / f"last-step={step}.ckpt").unlink()
    limits, previous = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((place / "last-step=3.ckpt").stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Could not write .* step 4 .*step 3 is whole.*ckpt_path last"):
            main(whole("limited"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert {path.name for path in place.iterdir()} == {f"last-step={step}.ckpt" for step in (1, 2, 3)}
    main(whole("limited"))
    assert_same_run("limited", "whole")


def test_slurm_queues_the_job_again_and_it_goes_on_by_itself(whole, tmp_path, monkeypatch):
    """The warning signal of Slurm; then the same command, which does not even have to name a checkpoint."""
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"JOB_ID": 4711, "JOB_NAME": "train", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    command = [*whole("queued", *killer("backward", 2, number=signal.SIGUSR1)), "--ckpt_path", "null"]
    first = attempt(command)
    first.join(120)
    assert first.exitcode == 143
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = attempt(command)
    second.join(120)
    assert second.exitcode == 0
    assert_same_run("queued", "whole")


@pytest.mark.slow
def test_two_processes_go_on_as_if_they_had_not_been_killed(whole):
    """First the second process dies; then the first one alone is told to stop, and both end."""

    def run(name, *flags):
        two = ["--data.batch_size", "4", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
        command = [sys.executable, "-m", "stable_opd", *whole(name, *two, *flags)]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = run("two")
    assert done.returncode == 0, done.stderr
    assert run("two-killed", *killer("backward", 2, rank=1, marker="two-backward")).returncode != 0
    told = run("two-killed", *killer("rollout", 4, number=signal.SIGTERM, marker="two-rollout"))
    assert told.returncode == 143, told.stderr
    assert int(Path("two-rollout").read_text()) == 4
    assert step_of(checkpoints(folder("two-killed") / "checkpoints")[0]) == 5
    done = run("two-killed")
    assert done.returncode == 0, done.stderr
    assert_same_run("two-killed", "two", processes=2)
    first, second = state("two")["processes"]
    assert len(first["mixture._extra_state"]) == len(second["mixture._extra_state"]) > 0
    assert first["mixture._extra_state"][0]["text"] != second["mixture._extra_state"][0]["text"]


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"every_n_steps": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match=r"Expected every_n_steps and keep of at least 1.*enable_checkpointing"):
            RunCheckpoint(**settings)
