"""`stable-opd bench` as a shell runs it: real processes, tiny models, two steps."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bench.common import bench, start, write_recipe
from stable_opd.bench import command
from stable_opd.cli import main

METRICS = {
    "loss": {"column": "train/loss", "better": "lower"},
    "length": {"column": "val/length_mean", "reduce": "max"},
}
PARTS = """
import time

from stable_opd import Author, Divergence, TokenLoss


class Distance(Divergence):
    \"\"\"Squared distance of the probabilities.\"\"\"

    support = "full"

    def forward(self, evidence):
        loss = (evidence.student.logprobs.exp() - evidence.teacher.logprobs.exp()).square().sum(-1)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))


class Broken(Distance):
    \"\"\"Raises in the first step.\"\"\"

    def forward(self, evidence):
        raise RuntimeError("the component gave up")


class Slow(Distance):
    \"\"\"Takes its time.\"\"\"

    def forward(self, evidence):
        time.sleep(0.15)
        return super().forward(evidence)
"""


@pytest.fixture
def place(student_path, teacher_path, train_path, validation_path, tmp_path):
    """A folder with components of its own and a way to write a recipe and a spec into it."""
    (tmp_path / "parts.py").write_text(PARTS)

    def place(trainer=None, **spec):
        write_recipe(tmp_path, student_path, teacher_path, train_path, validation_path, **(trainer or {}))
        content = {"config": "recipe.yaml", "metrics": METRICS} | spec
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path

    return place


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def metrics(path):
    """All figures that do not depend on the clock."""
    with path.open() as file:
        return [
            {name: cell for name, cell in row.items() if not name.startswith(("time/", "throughput/")) and cell}
            for row in csv.DictReader(file)
        ]


TWO_AXES = {
    "divergence": {
        "sampled": {},
        "js": {"model.divergence": "SampledJensenShannon"},
        "broken": {"model.divergence": "parts.Broken"},
    },
    "mixture": {"student": {}, "golden": {"model.mixture": "GoldenMixture"}},
}
LEFT_OUT = [{"divergence": ["js", "broken"], "mixture": "golden"}]


@pytest.mark.slow
def test_runs_fail_are_skipped_and_are_run_anew(place):
    """One story, because every chapter starts processes."""
    folder = place(axes=TWO_AXES, exclude=LEFT_OUT)
    out = folder / "out"

    status, printed, errors = bench("spec.yaml", "--out", "out", "--jobs", "2", cwd=folder)
    assert status == 1, errors
    assert "3 of 4 runs are finished" in printed
    assert "broken+student/seed-0 failed: exit status 1: RuntimeError: the component gave up" in errors
    found = {tuple(row["variants"].values()): row for row in rows(out)}
    assert found["broken", "student"]["status"] == "failed"
    assert found["broken", "student"]["metrics"] == {}
    good = found["js", "student"]
    assert good["status"] == "finished"
    assert good["metrics"]["loss"] is not None
    assert good["versions"]["stable-opd"]
    assert good["seconds"] > 1
    assert good["host"]["cpu"]
    run = out / "js+student" / "seed-0"
    assert {"log.txt", "config.yaml", "metrics.csv", "checkpoints"} <= {each.name for each in run.iterdir()}
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["divergence"]["init_args"]["clip"] == 0.2  # the recipe's 0.3 was another component's
    page = (out / "results.md").read_text()
    assert "| broken + student, seed 0 | failed | exit status 1: RuntimeError: the component gave up " in page
    assert good["command"] in page
    assert {"heatmap.png", "curves.png", "results.csv"} <= {each.name for each in out.iterdir()}

    # Finished runs are not touched; the component is mended outside of the recipe, and what failed is tried again.
    before = {each: each.stat().st_mtime_ns for each in out.rglob("metrics.csv") if "broken" not in str(each)}
    assert len(before) == 3
    (folder / "parts.py").write_text(
        PARTS.replace('raise RuntimeError("the component gave up")', "return super().forward(evidence)")
    )
    status, printed, errors = bench("spec.yaml", "--out", "out", cwd=folder)
    assert status == 0, errors
    assert "3 of 4 runs are finished already" in errors
    assert "4 of 4 runs are finished" in printed
    assert {each: each.stat().st_mtime_ns for each in before} == before

    # A changed recipe is another run; until then the old one counts for nothing.
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"]["rollout"]["max_new_tokens"] = 9
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, _, errors = bench("spec.yaml", "--out", "out", "--collect", cwd=folder)
    assert status == 1
    assert {row["status"] for row in rows(out)} == {"outdated"}
    status, _, errors = bench("spec.yaml", "--out", "out", "--only", "js+student/seed-0", cwd=folder)
    assert status == 0, errors
    assert (
        "js+student/seed-0 is run anew, because its recipe changed: model.rollout.max_new_tokens: 10 became 9."
        in errors
    )


def wait_for_checkpoint(folder, step, process):
    until = time.monotonic() + 120
    while not list(folder.rglob(f"*step={step}.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_whatever_is_killed_the_same_command_ends_with_the_same_table(place):
    """Runner and child, by SIGTERM and SIGKILL, one after the other in one run; then it may finish."""
    trainer = {"max_steps": 25, "val_check_interval": 5}
    folder = place(trainer, axes={"d": {"slow": {"model.divergence": "parts.Slow"}}})
    status, _, errors = bench("spec.yaml", "--out", "whole", cwd=folder)
    assert status == 0, errors
    run = folder / "out" / "slow" / "seed-0"
    ends = [
        (5, "runner", signal.SIGTERM, 143, "interrupted"),
        (10, "runner", signal.SIGKILL, -9, "started"),
        (15, "child", signal.SIGTERM, 1, "failed"),
        (20, "child", signal.SIGKILL, 1, "failed"),
    ]
    for number, (step, whom, how, expected, state) in enumerate(ends):
        process = start("spec.yaml", "--out", "out", cwd=folder)
        wait_for_checkpoint(run, step, process)
        (child,) = [each for each in children(process.pid) if alive(each)]
        os.kill(child if whom == "child" else process.pid, how)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == expected, errors
        until = time.monotonic() + 20
        while alive(child) and time.monotonic() < until:
            time.sleep(0.05)
        assert not alive(child)
        assert json.loads((run / "run.json").read_text())["status"] == state
        if number:
            before, _, signalled, *_ = ends[number - 1]
            (began,) = re.findall(r"goes on from step (\d+)", errors)
            # Who is asked to end saves the step that is under way.
            assert int(began) >= before if signalled == signal.SIGTERM else int(began) == before
        if whom == "child":
            assert rows(folder / "out")[0]["reason"] == f"ended by {how.name}"
    status, _, errors = bench("spec.yaml", "--out", "out", cwd=folder)
    assert status == 0, errors
    assert "goes on from step 20" in errors
    assert (folder / "out" / "results.csv").read_text() == (folder / "whole" / "results.csv").read_text()
    expected = metrics(folder / "whole" / "slow" / "seed-0" / "metrics.csv")
    assert len(expected) == 31  # 25 steps, and six validations
    assert metrics(run / "metrics.csv") == expected


def test_dry_run_prints_a_command_per_run_and_leaves_nothing(place, capsys, monkeypatch):
    folder = place(axes=TWO_AXES, exclude=LEFT_OUT, seeds=[0, 1])
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    main(["bench", "spec.yaml", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("stable-opd fit -c recipe.yaml ") for line in lines)
    assert lines[-1].endswith(
        "--trainer.logger.save_dir runs/spec --trainer.logger.name broken+student --trainer.logger.version seed-1"
    )
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_a_line_of_the_dry_run_can_be_pasted(place):
    folder = place(axes={"d": {"x": {"model.divergence": {"class_path": "JensenShannon", "init_args": {"beta": 0.3}}}}})
    status, printed, errors = bench("spec.yaml", "--dry-run", cwd=folder)
    assert status == 0, errors
    program = os.path.join(os.path.dirname(sys.executable), "stable-opd")
    line = printed.strip().replace("stable-opd", program, 1)
    subprocess.run(["sh", "-c", line], cwd=folder, check=True, capture_output=True)
    config = yaml.safe_load((folder / "runs" / "spec" / "x" / "seed-0" / "config.yaml").read_text())
    assert config["model"]["divergence"]["init_args"]["beta"] == 0.3


def test_job_array_is_written(place, capsys, monkeypatch):
    folder = place(axes={"a": {"x": {}}}, seeds=[0, 1])
    monkeypatch.chdir(folder)
    main(["bench", "spec.yaml", "--out", "out", "--slurm", "--jobs", "1"])
    assert capsys.readouterr().out == "sbatch out/array.sh\n"
    assert "#SBATCH --array=0-1%1" in (folder / "out" / "array.sh").read_text()


def test_collecting_nothing_says_what_is_missing(place, capsys, monkeypatch):
    folder = place(axes={"a": {"x": {}}})
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as done:
        main(["bench", "spec.yaml", "--collect"])
    assert done.value.code == 1
    assert "0 of 1 runs are finished; see runs/spec/results.md" in capsys.readouterr().out
    assert "| x, seed 0 | missing | not run yet |" in (folder / "runs" / "spec" / "results.md").read_text()


def test_tables_are_written_without_matplotlib(place, capsys, monkeypatch):
    folder = place(axes={"a": {"x": {}}, "b": {"y": {}}})
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(["bench", "spec.yaml", "--collect"])
    assert 'pip install "stable-opd[plot]"' in capsys.readouterr().err
    assert (folder / "runs" / "spec" / "results.md").exists()
    assert command.bench


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.yaml"], "a benchmark spec in a file, but got nowhere.yaml"),
        (["spec.yaml", "--only", "y/seed-0"], "Expected a run out of x/seed-0, but got 'y/seed-0'"),
        (["spec.yaml", "--jobs", "0"], "--jobs"),
        (["spec.yaml", "--dry-run", "--slurm"], "not allowed with"),
    ],
)
def test_wrong_calls_are_refused(args, message, place, capsys, monkeypatch):
    monkeypatch.chdir(place(axes={"a": {"x": {}}}))
    with pytest.raises(SystemExit) as done:
        main(["bench", *args])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_of_something_else_is_not_run_over(place, capsys, monkeypatch):
    folder = place(axes={"a": {"x": {}}})
    monkeypatch.chdir(folder)
    precious = folder / "runs" / "spec" / "x" / "seed-0" / "metrics.csv"
    precious.parent.mkdir(parents=True)
    precious.write_text("step\n")
    with pytest.raises(SystemExit) as done:
        main(["bench", "spec.yaml"])
    assert done.value.code == 2
    assert "to be empty or to hold a run of a benchmark" in capsys.readouterr().err
    assert precious.read_text() == "step\n"


def test_detectors_are_compared_without_a_recipe(tmp_path):
    (tmp_path / "spec.yaml").write_text(
        yaml.safe_dump(
            {
                "command": "detect",
                "options": {"texts": 3, "periods": [6], "budget": 60, "every": 6, "repetition": "PeriodicSuffix"},
                "axes": {"least": {"18": {"repetition.min_tokens": 18}, "99": {"repetition.min_tokens": 99}}},
                "seeds": [0, 1],
                "metrics": {"found": {"column": "exact-6/found", "better": "higher"}},
            }
        )
    )
    status, printed, errors = bench("spec.yaml", "--out", "out", cwd=tmp_path)
    assert (status, printed) == (0, "4 of 4 runs are finished; see out/results.md.\n"), errors
    page = (tmp_path / "out/results.md").read_text()
    assert "| 18 | 1 ± 0 |" in page
    assert "| 99 | 0 ± 0 |" in page
    assert "stable-opd detect --budget 60" in page
