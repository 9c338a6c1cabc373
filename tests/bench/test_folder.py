"""What is on record of a run, and where it goes on."""

import csv
import os
import time

import pytest
import torch

from stable_opd.bench.expand import Run
from stable_opd.bench.folder import (
    LOG,
    METRICS,
    check_ownership,
    finish,
    is_finished,
    last_words,
    metric_rows,
    plan,
    prepare,
    read_record,
)
from stable_opd.bench.yamls import SpecError


@pytest.fixture
def run(tmp_path):
    return Run({"a": "x"}, 0, tmp_path, ("fit",), {"trainer": {"log_every_n_steps": 1}, "model": {"k": 1}})


def log_rows(run, steps, mark="", column="loss"):
    with (run.folder / METRICS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("step", column), *((step, f"{mark}{step}") for step in steps)])


def checkpoint(run, step):
    path = run.folder / "checkpoints" / f"step={step}.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step}, path)
    return path


def begin(run):
    return prepare(run, plan(run), {})


def steps(run):
    return [row["loss"] for row in metric_rows(run.folder)]


def test_an_unknown_run_starts_anew_and_says_nothing(run):
    start = plan(run)
    assert (start.checkpoint, start.note) == (None, None)


def test_finished_run_is_known_until_its_recipe_changes(run):
    finish(run, begin(run), "finished")
    assert is_finished(run)
    changed = Run(run.variants, run.seed, run.out, run.arguments, run.config | {"model": {"k": 2}})
    assert not is_finished(changed)
    assert "x/seed-0 is run anew, because its recipe changed: model.k: 1 became 2." in plan(changed).note
    log_rows(run, [0])
    begin(changed)
    assert metric_rows(run.folder) == []


def test_finished_run_is_anew_under_another_version(run, monkeypatch):
    finish(run, begin(run), "finished")
    monkeypatch.setattr("stable_opd.bench.expand.version", lambda _: "99")
    assert not is_finished(run)
    assert "the version of stable-opd" in plan(run).note


def test_interrupted_run_goes_on_from_its_last_checkpoint_that_can_be_read(run):
    record = begin(run)
    log_rows(run, range(9))
    path = checkpoint(run, 4)
    checkpoint(run, 2)
    (run.folder / "checkpoints" / "step=8.ckpt").write_bytes(path.read_bytes()[:100])
    finish(run, record, "interrupted")
    start = plan(run)
    assert (start.checkpoint, start.step) == (path, 4)
    assert "goes on from step 4" in start.note


def test_healthy_states_of_a_guard_are_no_place_to_go_on_from(run):
    """They are written in the midst of a step, before its evaluation and its metrics."""
    record = begin(run)
    log_rows(run, range(9))
    path = checkpoint(run, 4)
    (run.folder / "healthy").mkdir()
    (run.folder / "healthy" / "step=6.ckpt").write_bytes(checkpoint(run, 6).read_bytes())
    (run.folder / "checkpoints" / "step=6.ckpt").unlink()
    finish(run, record, "interrupted")
    assert (plan(run).checkpoint, plan(run).step) == (path, 4)


def test_metrics_of_all_attempts_become_one_file(run):
    begin(run)
    log_rows(run, range(5), "a")
    checkpoint(run, 3)
    begin(run)  # killed before it wrote anything
    assert steps(run) == ["a0", "a1", "a2"]
    record = begin(run)
    assert record.resumed_at == 3
    log_rows(run, range(3, 8), "b")
    checkpoint(run, 6)
    record = begin(run)
    log_rows(run, range(6, 9), "c")
    finish(run, record, "finished")
    assert steps(run) == ["a0", "a1", "a2", "b3", "b4", "b5", "c6", "c7", "c8"]
    assert sorted(each.name for each in run.folder.glob("*.csv")) == [METRICS]


def test_a_run_that_ended_at_its_last_checkpoint_keeps_its_metrics(run):
    begin(run)
    log_rows(run, range(4), "a")
    checkpoint(run, 4)
    finish(run, begin(run), "finished")
    assert steps(run) == ["a0", "a1", "a2", "a3"]


def test_checkpoint_whose_metrics_are_lost_is_no_place_to_go_on_from(run):
    begin(run)
    log_rows(run, range(3))
    checkpoint(run, 4)
    start = plan(run)
    assert start.checkpoint is None
    assert "from the beginning" in start.note


@pytest.mark.parametrize(("every", "logged", "covered"), [(1, 7, True), (5, 4, True), (5, 3, False), (50, 0, True)])
def test_steps_that_are_not_logged_are_not_missed(every, logged, covered, run):
    run.config["trainer"]["log_every_n_steps"] = every
    begin(run)
    log_rows(run, [logged])
    checkpoint(run, 8)
    assert (plan(run).checkpoint is not None) == covered


def test_row_that_was_cut_is_not_read(run):
    begin(run)
    (run.folder / METRICS).write_text("step,a,b\n0,1,2\n1,1")
    assert [row["step"] for row in metric_rows(run.folder)] == ["0"]
    (run.folder / METRICS).write_text("step,a,b\n0,1,2\n1,1\n")
    assert [row["step"] for row in metric_rows(run.folder)] == ["0"]


def test_checkpoint_that_failed_once_is_not_tried_again(run):
    begin(run)
    log_rows(run, range(3))
    checkpoint(run, 2)
    finish(run, begin(run), "failed", "boom")
    assert plan(run).checkpoint is None


def test_time_of_attempts_adds_up(run):
    record = begin(run)
    record.began -= 100
    log_rows(run, range(3))
    checkpoint(run, 2)
    finish(run, record, "interrupted")
    record = begin(run)
    record.began -= 20
    finish(run, record, "finished")
    assert read_record(run.folder).seconds == pytest.approx(120, abs=5)


def test_time_of_a_killed_runner_is_told_by_what_was_written_last(run):
    begin(run)
    log_rows(run, range(3))
    path = checkpoint(run, 2)
    os.utime(run.folder / METRICS, (time.time() + 50,) * 2)
    assert path.exists()
    assert begin(run).seconds == pytest.approx(50, abs=5)


def test_folder_of_something_else_is_left_alone(run):
    run.folder.mkdir(parents=True)
    check_ownership(run)
    (run.folder / "thesis.tex").touch()
    with pytest.raises(SpecError, match="to be empty or to hold a run of a benchmark"):
        check_ownership(run)


def test_last_words_are_those_of_the_exception(tmp_path):
    log = tmp_path / LOG
    log.write_text(
        "Step: 10%|█ | 1/10\rStep: 20%|██ | 2/10\nTraceback (most recent call last):\n  File 'a', line 1\n"
        "    f()\nValueError: too large\nby far\nStep: 20%|██ | 2/10\n"
    )
    assert last_words(tmp_path) == "ValueError: too large by far"
    log.write_text("one\ntwo\n\nthree\nfour\n")
    assert last_words(tmp_path) == "two three four"
    log.unlink()
    assert last_words(tmp_path) == "it left no log"
