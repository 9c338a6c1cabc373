"""Shares of the machine, and the job array."""

import os
import subprocess
from pathlib import Path

import pytest

from stable_opd.bench import schedule
from stable_opd.bench.child import STOPPED
from stable_opd.bench.expand import Run
from stable_opd.bench.process import _reason
from stable_opd.bench.schedule import variables
from stable_opd.bench.slurm import script


@pytest.fixture
def _eight_cores(monkeypatch):
    monkeypatch.setattr(schedule.os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("_eight_cores")
@pytest.mark.parametrize(("jobs", "threads"), [(1, "8"), (3, "2"), (16, "1")])
def test_cores_are_shared(jobs, threads):
    assert variables(0, jobs, {}, 0) == {"OMP_NUM_THREADS": threads}
    assert variables(0, jobs, {"OMP_NUM_THREADS": "5", "X": "y"}, 0) == {"OMP_NUM_THREADS": "5", "X": "y"}


def test_devices_go_round():
    found = [variables(slot, 3, {}, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert found == ["0", "1", "0"]
    assert variables(1, 2, {"CUDA_VISIBLE_DEVICES": "4,7"}, 2)["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(("jobs", "devices"), [(1, 4), (4, 1), (4, 0)])
def test_devices_are_left_alone_where_there_is_nothing_to_share(jobs, devices):
    assert "CUDA_VISIBLE_DEVICES" not in variables(0, jobs, {}, devices)


def test_signals_are_named(tmp_path):
    assert _reason(STOPPED, tmp_path) == _reason(-15, tmp_path) == "ended by SIGTERM"
    assert _reason(-9, tmp_path) == "ended by SIGKILL"
    assert _reason(1, tmp_path) == "exit status 1: it left no log"


RUNS = [Run({"a": "x", "b": name}, 0, Path("out dir"), ("fit", "--k", "a b"), {}) for name in ("u", "v")]


def test_job_array_has_a_line_per_run():
    text = script(RUNS, Path("specs/s.yaml"), Path("out"), 4)
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=s\n#SBATCH --array=0-1%4\n")
    assert "\n  x+u/seed-0  # stable-opd fit --k 'a b'\n  x+v/seed-0  # " in text
    assert "stable-opd bench specs/s.yaml --out out --collect" in text
    assert "#SBATCH --array=0-1\n" in script(RUNS, Path("s.yaml"), Path("out"))


def test_job_array_calls_the_line_of_its_task(tmp_path):
    """By a shell, with a program in place of ours that says how it was called."""
    path = tmp_path / "array.sh"
    path.write_text(script(RUNS, Path("s.yaml"), Path("out dir")))
    program = tmp_path / "stable-opd"
    program.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "bench|s.yaml|--out|out dir|--only|x+v/seed-0|"
