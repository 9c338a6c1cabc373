"""Two processes of which one has nothing to learn from, fails, dies or hangs."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import two_processes
from runs import write_recipe
from stable_opd.cli import main
from stable_opd.resume import checkpoints, step_of

#: What is left out of the rows of one process, and with which settings.
UNEVEN = {
    "empty": [],
    "golden": ["--model.mixture", "GoldenMixture"],
    "cut": ["--model.policies.truncated", "drop"],
    "masked": ["--model.policies.loops", "mask"],
}


@pytest.fixture(scope="module")
def place(student_path, teacher_path, train_path, validation_path, tmp_path_factory):
    """A folder with a recipe."""
    model = {
        "mixture": "StudentOnly",
        "constraints": {"anchor": {"class_path": "ReferenceKL", "init_args": {"weight": 0.5}}},
        # Plain descent: Adam would blow the rounding of a vanishing gradient up to a whole step.
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "update": {"micro_batch_tokens": 60},  # several micro-batches, and not as many on each process
    }
    paths = student_path, teacher_path, train_path, validation_path
    validation = {"check_val_every_n_epoch": None, "val_check_interval": 100, "limit_val_batches": 0}
    return write_recipe(
        tmp_path_factory.mktemp("processes"),
        *paths,
        model,
        data={"batch_size": 4},
        trainer={"max_steps": 4, "num_sanity_val_steps": 0, **validation},
        checkpoint={"every_n_steps": 1, "keep": 9},
    )


def callback(path, **settings):
    return ["--trainer.callbacks", json.dumps([{"class_path": path, "init_args": settings}])]


def command(name, *flags):
    logger = ["--trainer.logger.name", name, "--trainer.logger.version", "0"]
    return ["fit", "-c", "recipe.yaml", "--ckpt_path", "last", *logger, *flags]


TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]


@pytest.fixture(scope="module")
def raised(place):
    """What the commands of two processes raised, by name and process."""
    uneven = ["--trainer.max_steps", "2"]
    commands = {
        kind: command(f"two-{kind}", *TWO, *uneven, *flags, *callback("faulty.Uneven", kind=kind, place=f"{kind}.json"))
        for kind, flags in UNEVEN.items()
    }
    fault = callback("faulty.Fault", what="loss", steps=[1, 2], rank=1)
    commands["skipped"] = command("skipped", *TWO, *fault, "--model.update.max_skipped", "1")
    commands["resumed"] = command("skipped", *TWO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = two_processes.fit(list(commands.values()), str(place), port)
    return {name: pair for name, *pair in zip(commands, *both, strict=True)}


def read(name):
    folder = Path("runs", name, "version_0")
    state = torch.load(checkpoints(folder / "checkpoints")[0], weights_only=True)["state_dict"]
    with (folder / "metrics.csv").open() as file:
        return {each: tensor for each, tensor in state.items() if "student" in each}, list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNEVEN)
def test_a_process_with_nothing_to_learn_from_changes_nothing(kind, raised, place, monkeypatch):
    """The two end, and equal one process with all of their prompts: the weights, and every figure that is logged."""
    assert raised[kind] == ["", ""]
    monkeypatch.chdir(place)
    uneven = callback("faulty.Uneven", kind=kind, place=f"{kind}.json")
    main(command(f"one-{kind}", "--trainer.max_steps", "2", "--data.batch_size", "8", *UNEVEN[kind], *uneven))
    (expected, rows), (found, other_rows) = read(f"one-{kind}"), read(f"two-{kind}")
    initial = torch.load(checkpoints(Path(f"runs/one-{kind}/version_0/checkpoints"))[-1], weights_only=True)
    assert any(not torch.equal(tensor, initial["state_dict"][name]) for name, tensor in expected.items())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    for row, other in zip(rows, other_rows, strict=True):
        assert float(row["train/grad_norm"]) > 0
        for name in (name for name in row if not name.startswith(("time/", "throughput/"))):
            if row[name] == "":
                assert other[name] == "", name
            else:
                same = pytest.approx(float(row[name]), rel=1e-4, abs=1e-5, nan_ok=True)
                assert float(other[name]) == same, name


@pytest.mark.slow
def test_all_processes_skip_and_stop_together_if_one_has_a_fault(raised, place, monkeypatch):
    """The loss of the second alone is not finite, and every gradient is; both skip, stop, save, and go on."""
    monkeypatch.chdir(place)
    for text in raised["skipped"]:
        assert text.startswith("NonFiniteError: Expected a finite loss and a finite gradient in step 2, but got a loss")
        assert "The state after 2 steps, before the one that failed, is kept" in text
    assert raised["resumed"] == ["", ""]
    folder = Path("runs/skipped/version_0")
    before, after = (
        torch.load(checkpoints(folder / "checkpoints")[-step], weights_only=True)["state_dict"] for step in (1, 2)
    )
    students = [name for name in before if name.startswith("student.")]
    assert all(torch.equal(before[name], after[name]) for name in students)
    assert step_of(checkpoints(folder / "checkpoints")[0]) == 4
    assert {path.name for path in (folder / "skipped").iterdir()} == {
        f"step=1-process={rank}.safetensors" for rank in (0, 1)
    }


FATES = {
    "the second is killed": callback("killing.Killer", moment="backward", step=2, marker="second", rank=1),
    "the first is killed": callback("killing.Killer", moment="rollout", step=2, marker="first", rank=0),
    "the second hangs": [
        *callback("faulty.Fault", what="hang", steps=[2], rank=1),
        *("--trainer.strategy", "DDPStrategy", "--trainer.strategy.timeout", "0:00:40"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("fate", FATES)
def test_a_process_ends_if_the_other_does_not_answer(fate, place, monkeypatch):
    """Within a bounded time, with a word on what happened; nothing is left behind, and there is a checkpoint."""
    monkeypatch.chdir(place)
    name = fate.replace(" ", "-")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "stable_opd", *command(name, *TWO, *FATES[fate])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,  # ends when both have
        text=True,
        timeout=150,
    )
    survivor = 1 if fate == "the first is killed" else 0
    said = f"Process {survivor} of 2 ends. It was waiting for another one, which has ended or does not"
    # Lightning looks every five seconds whether a process that it launched has failed, and may be faster.
    assert said in done.stderr or (fate == "the second is killed" and "Forcefully terminating" in done.stderr)
    assert done.returncode == (1 if said in done.stderr and survivor == 0 else -signal.SIGKILL)
    # One that hangs does so before the checkpoint of its step is written.
    assert step_of(checkpoints(Path(f"runs/{name}/version_0/checkpoints"))[0]) == (1 if fate.endswith("hangs") else 2)
