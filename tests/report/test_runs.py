import numpy as np
import pytest

from report.made import quiet, write_run
from stable_opd.jsonl import read_records
from stable_opd.report.runs import differences, flat, read_metrics, read_run, read_runs


def test_training_and_validation_rows_are_told_apart(tmp_path):
    run = read_run(write_run(tmp_path, quiet(50), {"val/accuracy": [0.3, 0.4]}), "run")
    assert run.train.steps.tolist() == list(range(50))
    assert run.validation.steps.tolist() == [0, 20]
    assert run.validation["val/accuracy"].tolist() == [0.3, 0.4]
    assert run.config == {"model": {"lr": 1.0}}


def test_a_column_that_is_missing_is_nan(tmp_path):
    run = read_run(write_run(tmp_path, quiet(50)), "run")
    assert np.isnan(run.train["train/nothing"]).all()
    assert len(run.train["train/nothing"]) == 50
    assert not run.train.has("train/nothing")
    assert run.train.has("train/loss")


def test_columns_are_found_by_their_prefix_if_they_have_values(tmp_path):
    train = quiet(50) | {"train/loss/a": np.ones(50), "train/loss/b": np.full(50, np.nan)}
    assert read_run(write_run(tmp_path, train), "run").train.named("train/loss/") == ["train/loss/a"]


@pytest.mark.parametrize("tail", ["3,0.7", "3,0.7,", "3,", "3", '3,"0.7', "3,0.7,0.1"], ids=repr)
def test_a_line_that_was_cut_is_left_out(tmp_path, tail):
    (tmp_path / "m.csv").write_text("step,train/loss,val/accuracy\n1,0.5,\n2,0.6,\n" + tail)
    table = read_metrics(tmp_path / "m.csv")
    assert table["step"].tolist() == [1, 2]
    assert table["train/loss"].tolist() == [0.5, 0.6]


def test_a_row_with_cells_too_few_is_left_out_wherever_it_is(tmp_path):
    (tmp_path / "m.csv").write_text("step,train/loss,val/accuracy\n1,0.5,\n2,0.\n3,0.7,\n")
    assert read_metrics(tmp_path / "m.csv")["step"].tolist() == [1, 3]


def test_what_is_no_number_is_nan(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"step,train/loss\n1,oops\n2,nan\n3,\xff\xfe\n4,0.5\n,0.9\n")
    table = read_metrics(tmp_path / "m.csv")
    assert table["step"].tolist() == [1, 2, 3, 4]
    assert np.isnan(table["train/loss"][:3]).all()


@pytest.mark.parametrize("text", ["", "step,train/loss\n", "epoch,loss\n1,2\n", "step,train/loss\n1,0.5"], ids=repr)
def test_a_file_without_rows_is_refused(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"Expected .* at least one complete row, but got"):
        read_runs([tmp_path])


def test_of_two_rows_for_a_step_the_later_counts(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n3,0.3\n1,0.1\n2,0.2\n2,0.9\n")
    run = read_run(tmp_path, "run")
    assert run.train.steps.tolist() == [1, 2, 3]
    assert run.train["train/loss"].tolist() == [0.1, 0.9, 0.3]


@pytest.mark.parametrize("what", ["nowhere", "empty"])
def test_a_folder_without_a_run_is_refused_with_a_way_out(tmp_path, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Expected a folder that `stable-opd fit` left.* but got .*Name the folder"):
        read_runs([tmp_path / what])


def test_all_runs_below_a_folder_are_read_once_under_short_names(tmp_path):
    for name in ("opd/seed-0", "opd/seed-1", "stable/seed-0"):
        write_run(tmp_path / "runs" / name, quiet(30))
    runs = read_runs([tmp_path / "runs", tmp_path / "runs" / "opd" / "seed-0"])
    assert [run.name for run in runs] == ["opd/seed-0", "opd/seed-1", "stable/seed-0"]
    assert [run.variant for run in runs] == ["opd", "opd", "stable"]


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    for name in ("a/version_0", "b/version_0"):
        write_run(tmp_path / name, quiet(30))
    runs = read_runs([tmp_path / "a" / "version_0", tmp_path / "b" / "version_0"])
    assert [run.name for run in runs] == ["a", "b"]
    assert [run.name for run in read_runs([tmp_path / "a"])] == ["a/version_0"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("opd/seed-3", "opd"),
        ("opd-seed3", "opd"),
        ("opd_seed=3/v", "opd/v"),
        ("seed-1/opd", "opd"),
        ("seed-1", "seed-1"),
        ("seedling-2", "seedling-2"),
        ("linseed-2", "linseed-2"),
        ("version_0", "version_0"),
    ],
)
def test_variants_are_names_without_their_seeds(tmp_path, name, variant):
    write_run(tmp_path, quiet(30))
    assert read_run(tmp_path, name).variant == variant


def test_samples_that_were_cut_are_left_out(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"step": 1}\n[1]\n{"step": "x"}\n{"no": 1}\n{"step": 2, "comp')
    assert read_records(tmp_path / "s.jsonl") == [{"step": 1}]
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("text", "config"), [("a: [", {}), ("- 1\n", {}), (None, {})], ids=["broken", "list", "none"])
def test_a_configuration_that_cannot_be_read_is_empty(tmp_path, text, config):
    run = read_run(write_run(tmp_path, quiet(30), config=text), "run")
    assert run.config == config
    assert run.config_text == (text or "")


def test_configurations_are_compared_leaf_by_leaf():
    one = {"model": {"mixture": {"class_path": "G", "init_args": {"weight": 2}}, "lr": 1}, "seed": 0}
    other = {"model": {"mixture": None, "lr": 1}, "seed": 0}
    assert differences([one, other]) == {
        "model.mixture": ["-", None],
        "model.mixture.class_path": ["G", "-"],
        "model.mixture.init_args.weight": [2, "-"],
    }
    assert differences([one, one]) == {}
    assert flat({"a": {}, "b": {"c": [1]}}) == {"a": {}, "b.c": [1]}
