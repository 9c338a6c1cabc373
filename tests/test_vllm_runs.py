"""Whole runs whose rollouts and teacher's scores come from servers: of the stand-in, and of vLLM itself."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import TOKENIZER
from serving import BOTH, served
from stable_opd import servers
from stable_opd.cli import main
from stable_opd.models import load_model
from stable_opd.resume import step_of
from stable_opd.servers import GENERATE, ServerError
from standing_in import DROP, standing_in

RECIPE = str(Path(__file__).parent.parent / "configs" / "vllm.yaml")
SMALL = {
    "--data.batch_size": "4",
    "--data.eval_batch_size": "4",
    "--model.rollout.max_new_tokens": "24",
    "--model.rollout.samples_per_prompt": "2",
    "--trainer.limit_val_batches": "1",
    "--trainer.val_check_interval": "2",
    "--trainer.num_sanity_val_steps": "0",
    "--trainer.enable_progress_bar": "false",
    "--trainer.log_every_n_steps": "1",
    "--checkpoint.every_n_steps": "1",
}


def arguments(student, teacher, **others):
    urls = {"--model.engine.server.url": student.url, "--model.teacher.server.url": teacher.url}
    options = SMALL | urls | {f"--{name.replace('__', '.')}": str(value) for name, value in others.items()}
    return ["fit", "-c", RECIPE, *(part for option in options.items() for part in option)]


def result(folder):
    """How many steps a run took, and the student's weights."""
    state = torch.load(max(folder.rglob("*.ckpt"), key=step_of), weights_only=True)
    return state["global_step"], {name: each for name, each in state["state_dict"].items() if "student." in name}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_engine_and_teacher_in_servers(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        served(kind, "testbed:student", "student", tmp_path) as student,
        served(kind, "testbed:teacher", "teacher", tmp_path) as teacher,
    ):
        main(arguments(student, teacher, trainer__max_steps=3))
        version = student.ask("/weight_info")
    step, weights = result(tmp_path)
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["train/loss"]]
    assert step == len(steps) == 3
    for row in steps:
        assert 0 <= float(row["engine/gap"]) <= float(row["engine/gap_max"]) < 1e-4
        assert float(row["train/logprob_teacher"]) < 0
        assert abs(float(row["train/advantage_mean"])) < 20
    assert any(row["val/accuracy"] for row in rows)
    initial = load_model("testbed:student").state_dict()
    assert not torch.equal(weights["student.model.embed_tokens.weight"], initial["model.embed_tokens.weight"])
    assert version["weight_version"].startswith("stable-opd: ")


@pytest.mark.slow
def test_run_whose_server_dies_stops_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """The answers are those of the stand-in, so the weights can be compared bit for bit."""
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    with (
        standing_in("testbed:student", "student") as student,
        standing_in("testbed:teacher", "teacher") as teacher,
    ):
        for name in ("whole", "broken"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "whole")
        main(arguments(student, teacher, trainer__max_steps=3))
        handed_over = student.asked["/collective_rpc"]
        monkeypatch.chdir(tmp_path / "broken")
        student.asked = {}
        student.fault = lambda path, question, answer: DROP if student.asked.get("/collective_rpc", 0) > 3 else answer
        with pytest.raises(ServerError, match="start it again; the run then goes on"):
            main(arguments(student, teacher, trainer__max_steps=3, ckpt_path="last"))
        saved, _ = result(tmp_path / "broken")
        assert 0 < saved < 3
        with standing_in("testbed:student", "student") as another:  # at another address, and asked more patiently
            patience = {"model__engine__server__timeout": 700, "model__engine__weights": str(tmp_path / "weights")}
            main(arguments(another, teacher, trainer__max_steps=3, ckpt_path="last", **patience))
            assert another.asked["/collective_rpc"] == handed_over - saved  # those steps were not taken again
    (_, expected), (step, found) = result(tmp_path / "whole"), result(tmp_path / "broken")
    assert step == 3
    assert all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.slow
def test_two_processes_share_a_server_and_equal_one(tmp_path, monkeypatch):
    """Each asks for its own rows, and the first hands over the weights."""
    with (
        standing_in("testbed:student", "student") as student,
        standing_in("testbed:teacher", "teacher") as teacher,
    ):
        # Plain descent: Adam would blow the rounding of a vanishing gradient up to a whole step.
        descent = {"trainer__max_steps": 2, "model__optimizer": "torch.optim.SGD", "trainer__limit_val_batches": 0}
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "one")
        main(arguments(student, teacher, **descent))
        handed_over = student.asked["/collective_rpc"]
        two = {"data__batch_size": 2, "trainer__strategy": "ddp", "trainer__devices": 2}
        done = subprocess.run(
            [sys.executable, "-m", "stable_opd", *arguments(student, teacher, **descent, **two)],
            cwd=tmp_path / "two",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert student.asked["/collective_rpc"] == 2 * handed_over
    (_, expected), (step, found) = result(tmp_path / "one"), result(tmp_path / "two")
    assert step == 2
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BOTH[1]])
def test_exported_student_answers_as_in_transformers(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        standing_in("testbed:student", "student") as student,
        standing_in("testbed:teacher", "teacher") as teacher,
    ):
        main(arguments(student, teacher, trainer__max_steps=2))
    main(["export", str(max(tmp_path.rglob("*.ckpt"), key=step_of)), str(tmp_path / "exported")])
    model = load_model(str(tmp_path / "exported")).eval()
    prompts = [TOKENIZER(text)["input_ids"] for text in ("Q 3 * 7 + 8 - 2 ;", "Q 1 + 1 ;", "Q 9 * 9 * 9 ;")]
    with served(kind, str(tmp_path / "exported"), "exported", tmp_path) as server:
        rule = {"max_tokens": 60, "temperature": 0.0}
        questions = [{"model": "exported", "token_ids": each, "sampling_params": rule} for each in prompts]
        for prompt, answer in zip(prompts, server.ask_all(GENERATE, questions), strict=True):
            ids = torch.tensor([prompt])
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
            assert answer["choices"][0]["token_ids"] == expected[0, len(prompt) :].tolist()
