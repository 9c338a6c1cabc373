"""A teacher that is elsewhere: it tells no more than some log-probs."""

import pytest
import torch

from stable_opd import LocalTeacher, build
from stable_opd.terminal import SemanticClass
from teachers.common import Telling, module_of, steps_of


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
    for teacher in (LocalTeacher("testbed:control"), Telling("testbed:control", told=20)):
        parts = {"student": "testbed:student-other-stop", "terminal": SemanticClass()}
        found += steps_of(teacher, build("divergence", "TeacherTopK", k=8), 1, **parts)
    for name in ("train/loss", "train/grad_norm", "train/advantage_mean", "train/stop_mass_teacher"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)
    assert found[0]["train/stop_mass_teacher"] > 0.9
