"""Several evaluation sets in one run, through the command line."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from helpers import problems, write_jsonl
from stable_opd import EvaluationSet, PromptDataModule
from stable_opd.cli import main


@pytest.fixture
def recipe(student_path, teacher_path, train_path, tmp_path, monkeypatch):
    """Write a recipe with the evaluation sets given, and return its path."""
    monkeypatch.chdir(tmp_path)
    easy = [{"question": each["prompt"], "answer": each["answer"]} for each in problems(3, seed=1)]
    write_jsonl(tmp_path / "easy.jsonl", easy)
    write_jsonl(tmp_path / "hard.jsonl", problems(4, seed=2))

    def recipe(validation):
        config = {
            "model": {
                "student": student_path,
                "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path}},
                "divergence": "SampledReverseKL",
                "mixture": "StudentOnly",
                "repetition": {"class_path": "PeriodicSuffix", "init_args": {"min_tokens": 3, "max_period": 4}},
                "rollout": {"samples_per_prompt": 1, "max_new_tokens": 12},
            },
            "data": {
                "class_path": "PromptDataModule",
                "init_args": {
                    "train": {"path": train_path},
                    "validation": validation,
                    "task": "ModularChains",
                    "batch_size": 2,
                    "eval_batch_size": 4,
                },
            },
            "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(config))
        return "recipe.yaml"

    return recipe


EASY = {"path": "easy.jsonl", "columns": {"prompt": "question"}, "task": {"class_path": "ExactMatch"}}
HARD = {"path": "hard.jsonl", "samples": 4}


def figures(number):
    with Path(f"runs/opd/version_{number}/metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_each_set_has_the_figures_that_it_has_alone(recipe):
    main(["validate", "-c", recipe({"easy": EASY, "hard": HARD})])
    main(["validate", "-c", recipe(EASY)])
    main(["validate", "-c", recipe(HARD | {"samples": 1})])
    (both,), (easy,), (hard,) = map(figures, range(3))
    for name in ("val/accuracy", "val/truncation_rate", "val/repetition_rate", "val/length_mean"):
        assert both[name.replace("val/", "val/easy/")] == easy[name]
        assert both[name.replace("val/", "val/hard/")] == hard[name]
        assert both[name] == pytest.approx((easy[name] + hard[name]) / 2)
    assert both["val/easy/sampled/length_mean"] != both["val/hard/sampled/length_mean"]
    assert {"val/hard/sampled/pass_at_2", "val/hard/sampled/pass_at_4"} <= set(both)
    # Only one of the sets has several samples, and a single set has no name.
    assert not any("pass_at" in name for name in both if name.startswith(("val/sampled", "val/easy")))
    assert not any(name.startswith(("val/easy", "val/hard")) for name in easy | hard)


def test_fit_logs_them_and_the_samples_say_where_they_are_from(recipe):
    main(["fit", "-c", recipe({"easy": EASY, "hard": HARD})])
    rows = [row for row in figures(0) if "val/accuracy" in row]
    assert len(rows) == 1
    assert {"val/easy/accuracy", "val/hard/accuracy"} <= set(rows[0])
    (file,) = Path("runs").rglob("samples.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["set"] for line in lines] == ["easy"] * 3 + ["hard"] * 4


def test_test_and_predict_follow(recipe):
    path = recipe({"easy": EASY, "hard": HARD})
    main(["test", "-c", path])
    (row,) = figures(0)
    assert {"test/accuracy", "test/easy/accuracy", "test/hard/sampled/accuracy"} <= set(row)
    main(["predict", "-c", path])
    (file,) = Path("runs").rglob("answers.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["set"] for line in lines] == ["easy"] * 3 + ["hard"] * 4
    assert "question" in lines[0]


def test_flags_reach_into_a_set(recipe):
    main(["validate", "-c", recipe({"easy": EASY, "hard": HARD}), "--data.validation.hard.samples", "2"])
    (row,) = figures(0)
    assert "val/hard/sampled/pass_at_2" in row
    assert "val/hard/sampled/pass_at_4" not in row


def test_samples_of_a_prompt_differ_and_their_batches_are_bounded(recipe, monkeypatch):
    """Four answers to each of four prompts, of which a batch of four answers holds one."""
    seen = []
    from stable_opd.evaluation import Evaluation

    measure = Evaluation.measure

    def spy(self, answers, prompts, rollout, detector):
        seen.append((answers.kind, rollout.prompt.tolist(), rollout.texts))
        return measure(self, answers, prompts, rollout, detector)

    monkeypatch.setattr(Evaluation, "measure", spy)
    main(["validate", "-c", recipe({"hard": HARD | {"temperature": 2.0}})])
    sampled = [texts for kind, prompts, texts in seen if kind and prompts == [0, 0, 0, 0]]
    assert len(sampled) == 4
    assert all(len(set(texts)) > 1 for texts in sampled)


@pytest.mark.parametrize("name", ["sampled", "a/b", "", "a b"])
def test_names_that_cannot_be_part_of_a_metric_are_refused(name):
    with pytest.raises(ValueError, match="names of evaluation sets"):
        PromptDataModule(validation={name: EvaluationSet("x")})
