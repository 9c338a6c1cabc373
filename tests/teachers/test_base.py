"""A teacher that is elsewhere: it tells no more than some log-probs."""

import pytest
import torch

from stable_opd import LocalTeacher, build
from stable_opd.terminal import SemanticClass, TwoStop
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


def test_the_mass_of_a_stop_that_was_written_is_known_though_no_likely_token_is():
    divergence = build("divergence", "SampledReverseKL")
    (here,) = steps_of(LocalTeacher("testbed:teacher"), divergence, 1)
    (told,) = steps_of(Telling("testbed:teacher", "sampled", 0), divergence, 1)
    assert told["train/stop_mass_teacher"] == pytest.approx(here["train/stop_mass_teacher"], rel=1e-5)
    assert here["train/stop_mass_teacher"] > 0


@pytest.mark.parametrize(("support", "told"), [("sampled", 0), ("sampled", 4), ("topk", 1)])
def test_a_teacher_that_does_not_tell_enough_of_a_stop_event_is_refused(support, told):
    """What it would not tell counted for nothing, so a right stop by the token that it likes less would be punished."""

    def load(terminal, support=support, told=told):
        teacher, divergence = Telling("testbed:control", support, told), build("divergence", "SampledReverseKL")
        module_of(teacher, divergence, "testbed:student-other-stop", terminal=terminal).load("fit")

    with pytest.raises(ValueError, match=r"because 2 tokens end an answer .*Telling tells [01],.*model\.teacher\.k"):
        load(SemanticClass())
    load(TwoStop())
    load(SemanticClass(), "topk", 2)


def test_a_stop_event_is_read_from_what_is_told():
    """The pair whose stop tokens differ: with all tokens told, the step is that of a teacher in this process."""
    found = []
    for teacher in (LocalTeacher("testbed:control"), Telling("testbed:control", told=20)):
        parts = {"student": "testbed:student-other-stop", "terminal": SemanticClass()}
        found += steps_of(teacher, build("divergence", "TeacherTopK", k=8), 1, **parts)
    for name in ("train/loss", "train/grad_norm", "train/advantage_mean", "train/stop_mass_teacher"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)
    assert found[0]["train/stop_mass_teacher"] > 0.9
