"""The files that come with the package."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stable_opd.cli import main
from stable_opd.engines import Request, TransformersEngine
from stable_opd.models import load_model, load_tokenizer, stop_ids
from stable_opd.samplers import Temperature
from stable_opd.tasks import ModularChains
from stable_opd.testbed import PLACES, ROOT, build, resolve
from stable_opd.testbed.build import problems
from stable_opd.types import Finish


def examples(name):
    return [json.loads(line) for line in PLACES[name].read_text(encoding="utf-8").splitlines()]


def answers(name, temperature):
    """Accuracy and truncation of one of the models on the validation problems."""
    model, tokenizer, rows = (
        load_model(f"testbed:{name}").eval(),
        load_tokenizer(f"testbed:{name}"),
        examples("validation"),
    )
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    request = Request(prompts, range(len(rows)), range(len(rows)), 96, stop_ids(model, tokenizer))
    written = TransformersEngine().generate(model, request, Temperature(temperature))
    texts = tokenizer.batch_decode(
        [row.tolist() for row in written.tokens.split(written.lengths.tolist())], skip_special_tokens=True
    )
    grade = ModularChains().grade
    accuracy = sum(grade(text, row) for text, row in zip(texts, rows, strict=True)) / len(rows)
    return accuracy, (written.finish != Finish.STOP).float().mean().item()


@pytest.mark.parametrize("name", ["teacher", "control"])
def test_teachers_solve_the_task(name):
    accuracy, truncation = answers(name, 0.0)
    assert accuracy > 0.95
    assert truncation < 0.02


def test_student_has_room_above_it_and_stops_by_itself():
    accuracy, truncation = answers("student", 0.0)
    assert 0.2 < accuracy < 0.6
    assert truncation < 0.02


def test_other_student_differs_in_its_stop_token_alone():
    student, other = load_model("testbed:student").eval(), load_model("testbed:student-other-stop").eval()
    ids = torch.arange(18)[None]  # all words of the task
    swapped = [*range(18), 19, 18]
    with torch.no_grad():
        assert torch.equal(other(ids).logits[..., swapped], student(ids).logits)
    assert [
        stop_ids(each, load_tokenizer(f"testbed:{name}"))
        for each, name in (
            (student, "student"),
            (other, "student-other-stop"),
            (load_model("testbed:control"), "control"),
        )
    ] == [[18], [19], [18]]


def test_only_the_teacher_has_read_runaway_documents():
    """At temperature 1 its own mistakes lead it into loops; the control's do not."""
    assert answers("teacher", 1.0)[1] > 0.05
    assert answers("control", 1.0)[1] == 0.0


@pytest.mark.parametrize("name", ["train", "validation"])
def test_data_is_what_the_seed_gives(name):
    expected = [(chain.prompt, chain.golden, chain.answer) for chain in problems()[name]]
    assert [(row["prompt"], row["golden"], row["answer"]) for row in examples(name)] == expected


def test_no_problem_is_both_trained_and_validated_on():
    assert not {row["prompt"] for row in examples("train")} & {row["prompt"] for row in examples("validation")}


@pytest.mark.parametrize("name", ["train", "validation"])
def test_golden_solutions_are_right(name):
    assert all(ModularChains().grade(row["golden"], row) == 1.0 for row in examples(name))


def test_package_data_stays_small():
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 3e6


def test_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"testbed:student.*but got 'testbed:studnet'"):
        resolve("testbed:studnet")


def test_other_paths_are_left_alone():
    assert resolve("some/folder") == "some/folder"
    assert Path(resolve("testbed:teacher")).is_dir()


def test_rebuild_writes_everything_that_is_named(tmp_path, monkeypatch, capsys):
    """With two steps for each model; the shipped ones take minutes."""
    short = {name: replace(recipe, steps=2, first_steps=1) for name, recipe in build.RECIPES.items()}
    monkeypatch.setattr(build, "RECIPES", short)
    main(["testbed", "--out", str(tmp_path)])
    for name in (*short, "student-other-stop"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).config.vocab_size == len(
            AutoTokenizer.from_pretrained(tmp_path / name)
        )
    for name in ("train", "validation"):
        assert (tmp_path / PLACES[name].name).read_text() == PLACES[name].read_text()
    assert str(tmp_path) in capsys.readouterr().out
