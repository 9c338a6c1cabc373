"""The figures of a step: where rows begin to repeat themselves, and processes that have no rows of the student's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import Recorder, make_rollout, make_trainer, tiny_model, total_of_one_process
from stable_opd import Author, Finish, LocalTeacher, OPDModule, PromptDataModule, Repetition, ReverseKL, StudentOnly
from stable_opd.engines import TransformersEngine
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.repetition import RepetitionDetector
from stable_opd.reporting import StepReport, onset
from stable_opd.sources import Source
from stable_opd.tally import Tally

CPU = torch.device("cpu")
BUDGET = 10
S, G, T = Author.STUDENT, Author.GOLDEN, Author.TEACHER


def marked_rollout():
    """Six rows of six tokens each, and their marks.

    Marked from 2; marked from 4 with a gap; flagged without marks; marked and not flagged; golden; begun by the
    teacher, which wrote the first two of three marked tokens.
    """
    authors = [S, S, S, S, G, S]
    token_authors = torch.tensor([int(author) for author in authors]).repeat_interleave(6)
    token_authors[30:33] = int(T)
    rollout = make_rollout(
        [[1] * 6] * 6, authors=authors, token_authors=token_authors, finish=[Finish.STOP] * 2 + [Finish.LENGTH] * 4
    )
    marks = ["001111", "000010", "000000", "111111", "111111", "011111"]
    in_loop = torch.tensor([mark == "1" for mark in "".join(marks)])
    return rollout, Repetition(in_loop, torch.tensor([True, True, True, False, True, True]))


def test_onset_is_the_first_marked_token_of_the_students_in_repetitive_rows():
    total, count = onset(*marked_rollout())
    assert [total.item(), count.item()] == [2 + 4 + 3, 3]


def test_onset_where_nothing_repeats():
    rollout, marks = marked_rollout()
    total, count = onset(rollout, Repetition(marks.in_loop, torch.zeros(6, dtype=torch.bool)))
    assert [total.item(), count.item()] == [0, 0]
    assert [
        each.item() for each in onset(make_rollout([[]]), Repetition(torch.zeros(0).bool(), torch.ones(1).bool()))
    ] == [
        0,
        0,
    ]


def tally_of(advantage, in_loop):
    """What the micro-batches would leave behind, where each position stands for itself."""
    tally, count = Tally({"a": torch.ones(1)}, CPU), len(advantage)
    figures = {"student": torch.zeros(count), "teacher": advantage, "in_loop": in_loop}
    figures |= dict.fromkeys(("own", "stopped"), torch.ones(count, dtype=torch.bool))
    figures |= {name: advantage.abs() for name in ("stop_student", "stop_teacher", "entropy_student", "kl", "overlap")}
    figures |= {"entropy_teacher": torch.zeros(count), "overlap_advantage": advantage, "position": torch.arange(count)}
    for name, values in (figures | dict.fromkeys(("stands_for", "overlapping"), torch.ones(count))).items():
        tally.diagnostics.put(name, values)
    return tally


def facts(role):
    """Rollout, marks and tally of a process: with rows of the student's, or without any."""
    if role == "writes":
        rollout, marks = marked_rollout()
        return rollout, marks, tally_of(torch.linspace(-3, 1, 30), torch.arange(30) % 3 == 0)
    rollout = make_rollout([[1, 2], [3]], authors=[G, G])
    return (
        rollout,
        Repetition(torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)),
        Tally({"a": torch.ones(1)}, CPU),
    )


def measure(report, role, total):
    rollout, marks, tally = facts(role)
    report.measure(rollout, marks, tally, tally.reduced(total), {"rollout": 2.0}, total, {})
    return report.numbers()


def run(role, total):
    """Two steps: the yardstick of the length must be kept in both."""
    report = StepReport(BUDGET)
    return [measure(report, role, total) for _ in range(2)]


ROLES = [("writes", "looks on"), ("looks on", "writes"), ("looks on", "looks on")]


def work(rank: int, folder: str) -> None:
    """Be one of two processes, in several pairs of roles one after the other, and leave the figures behind."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def total(local):
        together = local.clone()
        dist.all_reduce(together)
        return together

    try:
        torch.save([run(roles[rank], total) for roles in ROLES], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_a_process_without_rows_of_the_students_reports_what_the_others_do(tmp_path):
    """And none of them waits for one that does not come; the figures are those of the one that has rows."""
    here = Path(__file__)
    call = [sys.executable, "-c", "import sys, test_reporting; test_reporting.work(int(sys.argv[1]), sys.argv[2])"]
    paths = os.environ | {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([*call, str(rank), str(tmp_path)], env=paths) for rank in range(2)]
    try:
        assert [each.wait(timeout=240) for each in both] == [0, 0]
    finally:
        for each in both:
            each.kill()
    for number, roles in enumerate(ROLES):
        expected = run("writes" if "writes" in roles else "looks on", total_of_one_process)
        assert ("train/length_mean" in expected[0]) == ("train/log_ratio_p95" in expected[0]) == ("writes" in roles)
        for rank in range(2):
            for found, wanted in zip(torch.load(tmp_path / f"{rank}.pt")[number], expected, strict=True):
                assert found == pytest.approx(wanted, nan_ok=True)


def test_figures_of_a_step_by_hand():
    (figures, _) = run("writes", total_of_one_process)
    expected = {
        "train/repetition_onset": 3.0,
        "train/repetition_rate": 4 / 5,
        "train/truncation_rate": 3 / 5,
        "train/length_mean": 6.0,
        "train/log_ratio_p95": 3 - 4 * 1 / 29,
        "train/log_ratio_p99": 3.0,
        "train/kl_by_position/9": torch.linspace(-3, 1, 30)[9:].abs().mean().item(),
        "throughput/rollout_tokens_per_s": 15.0,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_rows_without_a_teacher_are_measured_all_the_same():
    report = StepReport(BUDGET)
    rollout, marks = marked_rollout()
    tally = Tally({"a": torch.ones(1)}, CPU, expected=False)
    report.measure(rollout, marks, tally, {}, {"rollout": 1.0}, total_of_one_process, {})
    figures = report.numbers()
    assert figures["train/length_mean"] == 6
    assert torch.tensor(figures["train/log_ratio_p99"]).isnan()
    assert "train/stop_hazard" not in figures


class _Marking(RepetitionDetector):
    """Calls rows with an even first token repetitive, and marks them from their second token on."""

    def forward(self, rollout):
        starts = rollout.lengths.cumsum(0) - rollout.lengths
        flags = rollout.completion[starts] % 2 == 0
        return Repetition(flags[rollout.row] & (rollout.position > 0), flags)


class _Keeping(TransformersEngine):
    """Keeps what it wrote."""

    def generate(self, model, request, sampler):
        self.written = request, super().generate(model, request, sampler)
        return self.written[1]


@pytest.mark.parametrize("micro_batch_tokens", [30, 16_384])
def test_figures_of_a_training_step_equal_those_from_full_forward_passes(
    micro_batch_tokens, student_path, teacher_path, train_path
):
    engine, recorder = _Keeping(), Recorder()
    module = OPDModule(
        student_path,
        LocalTeacher(teacher_path),
        ReverseKL(),
        StudentOnly(),
        _Marking(),
        engine=engine,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        rollout=RolloutOptions(samples_per_prompt=4, max_new_tokens=BUDGET),
        update=UpdateOptions(micro_batch_tokens=micro_batch_tokens),
    )
    make_trainer(recorder, max_steps=1).fit(module, datamodule=PromptDataModule(Source(train_path), batch_size=6))
    request, written = engine.written
    hazards, masses, gaps, divergences, onsets = [], [], [], [[] for _ in range(10)], []
    for row, number in zip(written.tokens.split(written.lengths.tolist()), request.prompt, strict=True):
        prompt = list(request.prompts[number])
        with torch.no_grad():
            p, q = (
                model(torch.tensor([prompt + row.tolist()])).logits[0, len(prompt) - 1 : -1].softmax(-1)
                for model in (tiny_model(1), tiny_model(2))
            )
        for place, token in enumerate(row.tolist()):
            hazards.append(p[place, module.stop].sum())
            if token in module.stop:
                masses.append(q[place, module.stop].sum())
            gaps.append(((p[place] * p[place].log()).sum() - (q[place] * q[place].log()).sum()).abs())
            divergences[place].append((p[place] * (p[place] / q[place]).log()).sum())
        if row[0] % 2 == 0 and len(row) > 1:
            onsets.append(1.0)
    logged = recorder.steps[0]
    expected = {
        "train/stop_hazard": torch.stack(hazards).mean().item(),
        "train/stop_mass_teacher": torch.stack(masses).mean().item(),
        "train/entropy_gap": torch.stack(gaps).mean().item(),
        "train/repetition_onset": sum(onsets) / len(onsets),
    } | {
        f"train/kl_by_position/{place}": torch.stack(each).mean().item()
        for place, each in enumerate(divergences)
        if each
    }
    assert len(expected) > 9
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert logged["train/overlap_advantage"] < 0
    assert logged["train/log_ratio_p95"] <= logged["train/log_ratio_p99"]
