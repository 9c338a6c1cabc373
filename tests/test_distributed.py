"""Two processes on one machine, started as a user starts them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from runs import write_recipe
from stable_opd.cli import main
from stable_opd.resume import checkpoints


@pytest.fixture
def recipe(student_path, teacher_path, train_path, validation_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {
        "constraints": {"anchor": {"class_path": "ReferenceKL", "init_args": {"weight": 0.5}}},
        # Plain descent: Adam would blow the rounding of a vanishing gradient up to a whole step.
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "update": {"micro_batch_tokens": 100},  # several micro-batches, and not as many on each process
    }
    validation = {"one": {"path": validation_path}, "two": {"path": validation_path, "samples": 2}}
    trainer = {"max_steps": 2, "val_check_interval": 1}
    return write_recipe(tmp_path, student_path, teacher_path, train_path, validation, model, trainer=trainer)


def read(version):
    folder = Path(f"runs/opd/version_{version}")
    state = torch.load(checkpoints(folder / "checkpoints")[0], weights_only=True)["state_dict"]
    with (folder / "metrics.csv").open() as file:
        return {name: tensor for name, tensor in state.items() if "student" in name}, list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_two_processes_equal_one_on_the_same_data(aggregation, recipe):
    """Two with 4 prompts each are one with 8: the weights, and every figure that is logged."""
    options = ["-c", "recipe.yaml", "--model.update.aggregation", aggregation]
    main(["fit", *options, "--data.batch_size", "8"])
    two = ["--data.batch_size", "4", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "stable_opd", "fit", *options, *two],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (expected, rows), (found, other_rows) = read(0), read(1)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = torch.load(checkpoints(Path("runs/opd/version_0/checkpoints"))[0], weights_only=True)
    assert moved["global_step"] == 2
    assert len(rows) == len(other_rows)
    for row, other in zip(rows, other_rows, strict=True):
        clockless = [name for name in row if not name.startswith(("time/", "throughput/"))]
        for name in clockless:
            if row[name] == "":
                assert other[name] == "", name
            else:
                same = pytest.approx(float(row[name]), rel=1e-4, abs=1e-5, nan_ok=True)
                assert float(other[name]) == same, name


@pytest.mark.slow
def test_two_processes_under_a_guard_decide_alike_and_go_back_together(recipe):
    """They would wait for each other for ever if one of them saved, or went back, alone."""
    callbacks = [
        {"class_path": "guard.scripted.Scripted", "init_args": {"inflated": [[11, 18]]}},
        {"class_path": "CollapseGuard", "init_args": {"mode": "act", "resting": True, "patience": 4, "every": 5}},
    ]
    (recipe / "guarded.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    options = ["-c", "recipe.yaml", "-c", "guarded.yaml", "--trainer.max_steps", "21", "--data.batch_size", "4"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "stable_opd", "fit", *options, "--trainer.strategy", "ddp", "--trainer.devices", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (events,) = Path("runs").rglob("events.jsonl")
    answers = [each for each in map(json.loads, events.read_text().splitlines()) if each["action"] != "notice"]
    assert [(each["step"], each["action"]) for each in answers] == [(14, "raise"), (19, "roll back")]
    assert "went back to the weights of step 10" in answers[1]["done"]
    assert [path.name for path in events.parent.glob("healthy/*")] == ["step=10.ckpt"]
