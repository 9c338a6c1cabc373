"""A teacher that is elsewhere: it tells no more than some log-probs."""

import pytest
import torch

from helpers import Recorder, make_trainer
from stable_opd import LocalTeacher, OPDModule, PeriodicSuffix, PromptDataModule, StudentOnly, build
from stable_opd.options import RolloutOptions
from stable_opd.sources import EvaluationSet, Source
from stable_opd.streaming import known_logprobs
from stable_opd.terminal import SemanticClass


class Telling(LocalTeacher):
    """Tells its k likeliest tokens."""

    def __init__(self, path, support="topk", k=4):
        super().__init__(path)
        self.support, self.k = support, k

    def score(self, rollout):
        return known_logprobs(super().score(rollout), rollout.completion, self.k)


def module_of(teacher, divergence, student="testbed:student", **parts):
    return OPDModule(
        student,
        teacher,
        divergence,
        StudentOnly(),
        PeriodicSuffix(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        rollout=RolloutOptions(max_new_tokens=24, samples_per_prompt=1),
        **parts,
    )


def steps_of(teacher, divergence, count=2, **parts):
    recorder = Recorder()
    data = PromptDataModule(Source("testbed:train"), EvaluationSet("testbed:validation"), batch_size=8)
    make_trainer(recorder, max_steps=count, limit_val_batches=0).fit(module_of(teacher, divergence, **parts), data)
    return recorder.steps


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        ("SampledReverseKL", {}),
        ("SampledReverseKL", {"discount": 0.5}),
        ("TeacherTopK", {"k": 4}),
        ("TailBucketTopK", {"k": 3}),
    ],
    ids=["positions", "whole rows", "likeliest tokens", "fewer of them"],
)
def test_what_is_told_is_enough_for_a_component_that_reads_no_more(divergence, options):
    """Two steps, so that the second one depends on the gradient of the first."""
    here = steps_of(LocalTeacher("testbed:teacher"), build("divergence", divergence, **options))
    told = steps_of(Telling("testbed:teacher"), build("divergence", divergence, **options))
    for ours, theirs in zip(here, told, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/advantage_mean", "train/length_mean"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
        assert torch.isnan(torch.tensor(theirs["train/entropy_teacher"]))
        assert torch.isnan(torch.tensor(theirs["train/kl_by_position/0"]))


@pytest.mark.parametrize(
    ("teacher", "divergence", "options", "expected"),
    [
        (
            {},
            "ReverseKL",
            {},
            r"what ReverseKL \(divergence\) reads, which is the whole vocabulary, but Telling tells the l",
        ),
        (
            {"support": "sampled"},
            "TeacherTopK",
            {},
            "which is the likeliest tokens, but Telling tells the log-probs of",
        ),
        ({}, "TeacherTopK", {"k": 5}, r"its 5 likeliest tokens, for TeacherTopK \(divergence\), but Telling tells 4"),
    ],
)
def test_a_component_that_reads_more_is_refused_before_anything_is_loaded(teacher, divergence, options, expected):
    module = module_of(Telling("testbed:nobody", **teacher), build("divergence", divergence, **options))
    with pytest.raises(ValueError, match=expected):
        module.load("fit")


def test_a_weighting_that_compares_whole_distributions_is_refused():
    weighting = build("weighting", "AgreementCut")
    module = module_of(
        Telling("testbed:nobody"), build("divergence", "SampledReverseKL"), weighting={"hard": weighting}
    )
    with pytest.raises(ValueError, match="because hard compares the student with it, but Telling tells"):
        module.load("fit")


def test_a_stop_event_is_read_from_what_is_told():
    """The pair whose stop tokens differ: with all tokens told, the step is that of a teacher in this process."""
    found = []
    for teacher in (LocalTeacher("testbed:control"), Telling("testbed:control", k=20)):
        parts = {"student": "testbed:student-other-stop", "terminal": SemanticClass()}
        found += steps_of(teacher, build("divergence", "TeacherTopK", k=8), 1, **parts)
    for name in ("train/loss", "train/grad_norm", "train/advantage_mean", "train/stop_mass_teacher"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)
    assert found[0]["train/stop_mass_teacher"] > 0.9
