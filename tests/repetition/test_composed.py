import csv
from pathlib import Path

import pytest
import torch
import yaml

from helpers import make_rollout
from stable_opd import PeriodicSuffix, Repetition, RepetitionDetector, Rollout, ZlibRepetition
from stable_opd.cli import main
from stable_opd.repetition import AllOf, AnyOf


def marking(mark_tokens, flag_rows) -> RepetitionDetector:
    class Fixed(RepetitionDetector):
        """Finds what it was told."""

        def forward(self, rollout: Rollout) -> Repetition:
            return Repetition(torch.tensor(mark_tokens, dtype=torch.bool), torch.tensor(flag_rows, dtype=torch.bool))

    return Fixed()


FIRST = marking([1, 1, 0, 0, 0, 1], [1, 0, 1])
SECOND = marking([1, 0, 1, 0, 0, 0], [1, 1, 0])
THIRD = marking([1, 0, 0, 0, 1, 0], [1, 0, 0])
ROLLOUT = make_rollout([[5, 6], [7, 8], [9, 9]])


def both(found: Repetition) -> tuple[list[int], list[int]]:
    return found.in_loop.int().tolist(), found.repetitive.int().tolist()


def test_any_of_is_the_union():
    assert both(AnyOf([FIRST, SECOND, THIRD])(ROLLOUT)) == ([1, 1, 1, 0, 1, 1], [1, 1, 1])


def test_all_of_is_the_intersection():
    assert both(AllOf([FIRST, SECOND])(ROLLOUT)) == ([1, 0, 0, 0, 0, 0], [1, 0, 0])


def test_row_that_all_flag_may_have_no_marks():
    assert both(AllOf([marking([1, 0], [1]), marking([0, 1], [1])])(make_rollout([[5, 6]]))) == ([0, 0], [1])


@pytest.mark.parametrize("composed", [AnyOf, AllOf])
def test_one_detector_is_that_detector(composed):
    assert both(composed([FIRST])(ROLLOUT)) == both(FIRST(ROLLOUT))


def test_they_nest_and_leave_the_parts_findings_alone():
    marks = torch.tensor([True, False]), torch.tensor([True])

    class Same(RepetitionDetector):
        """Returns the same tensors every time."""

        def forward(self, rollout: Rollout) -> Repetition:
            return Repetition(*marks)

    other = marking([0, 1], [0])
    assert both(AnyOf([AllOf([Same(), other]), Same()])(make_rollout([[5, 6]]))) == ([1, 0], [1])
    assert [each.tolist() for each in marks] == [[True, False], [True]]


@pytest.mark.parametrize("composed", [AnyOf, AllOf])
def test_none_at_all_is_refused(composed):
    with pytest.raises(ValueError, match=f"at least one detector in {composed.__name__}, but got none"):
        composed([])


def test_parts_are_registered_as_modules():
    parts = [PeriodicSuffix(), ZlibRepetition()]
    assert next(iter(AnyOf(parts).children()))[0] is parts[0]
    assert len(list(AnyOf(parts).modules())) == 4


@pytest.fixture
def recipe(student_path, teacher_path, train_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def recipe(repetition):
        config = {
            "model": {
                "student": student_path,
                "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path}},
                "divergence": "SampledReverseKL",
                "mixture": "StudentOnly",
                "repetition": repetition,
                "rollout": {"samples_per_prompt": 1, "max_new_tokens": 6},
            },
            "data": {"class_path": "PromptDataModule", "init_args": {"train": {"path": train_path}, "batch_size": 4}},
            "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(config))
        return "recipe.yaml"

    return recipe


TWO = ["PeriodicSuffix", {"class_path": "ZlibRepetition", "init_args": {"window": 100}}]


def test_yaml_names_the_parts_by_their_short_names(recipe, capsys):
    nested = ["NGramLoop", {"class_path": "AllOf", "init_args": {"detectors": TWO}}]
    path = recipe({"class_path": "AnyOf", "init_args": {"detectors": nested}})
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", path, "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["repetition"]
    assert printed["class_path"].endswith(".AnyOf")
    loop, inner = printed["init_args"]["detectors"]
    assert loop["init_args"] == {"n": 30, "min_count": 20}
    assert inner["class_path"].endswith(".AllOf")
    suffix, zlib = inner["init_args"]["detectors"]
    assert suffix["init_args"]["max_period"] == 128
    assert zlib["init_args"] == {"window": 100, "threshold": 10.0}


@pytest.mark.parametrize(("composed", "rate"), [("AnyOf", 1.0), ("AllOf", 0.0)])
def test_run_asks_all_parts(recipe, composed, rate):
    """One of them flags every answer of two letters, the other none."""
    everything = {"class_path": "ZlibRepetition", "init_args": {"window": 1, "threshold": 0.01}}
    parts = [everything, "NGramLoop"]
    main(["fit", "-c", recipe({"class_path": composed, "init_args": {"detectors": parts}})])
    with Path("runs/opd/version_0/metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert float(row["train/repetition_rate"]) == rate
    main(["fit", "-c", "runs/opd/version_0/config.yaml"])  # the record of a run can be run


def test_misspelt_part_gets_a_message(recipe, capsys):
    path = recipe({"class_path": "AnyOf", "init_args": {"detectors": ["PeriodicSufix"]}})
    with pytest.raises(SystemExit) as refused:
        main(["fit", "-c", path])
    assert refused.value.code == 2
    assert "PeriodicSufix" in capsys.readouterr().err


def test_no_parts_are_refused_on_the_command_line(recipe, capsys):
    path = recipe({"class_path": "AnyOf", "init_args": {"detectors": []}})
    with pytest.raises((SystemExit, ValueError)) as refused:
        main(["fit", "-c", path])
    message = capsys.readouterr().err if isinstance(refused.value, SystemExit) else str(refused.value)
    assert "at least one detector" in message
