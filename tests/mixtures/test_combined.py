"""Several mixtures at once."""

import pytest
import torch

from helpers import EOS, make_evidence, make_rollout
from stable_opd import Author, Prompts
from stable_opd.divergences import ForwardKL, SampledReverseKL
from stable_opd.mixtures import (
    CombinedMixture,
    GKDMixture,
    GoldenMixture,
    PrefixMixture,
    ReplayMixture,
    ShapedGolden,
    SpeculativeMixing,
    StudentOnly,
    TeacherMixing,
    TeacherMixture,
)

PROMPTS = Prompts([[1], [2]], [[4, EOS], [5, EOS]], [10, 11], [{}] * 2)
STUDENT, GOLDEN, TEACHER, PAST = Author


def test_students_rows_stand_once_before_those_of_all_parts():
    plan = CombinedMixture([GoldenMixture(), TeacherMixture(), ReplayMixture()]).plan(PROMPTS, 2, 0.0, 0)
    assert plan.prompt == [0, 0, 1, 1, 0, 1, 0, 1]
    assert plan.author == [STUDENT] * 4 + [GOLDEN] * 2 + [TEACHER] * 2
    assert plan.prefix == 0


@pytest.mark.parametrize("turned", [False, True])
def test_beginnings_of_one_part_stand_beside_the_rows_of_another(turned):
    parts = [PrefixMixture(prefix=3), TeacherMixture()]
    plan = CombinedMixture(parts[::-1] if turned else parts).plan(PROMPTS, 1, 0.0, 0)
    assert plan.author == [STUDENT] * 2 + [TEACHER] * 2
    assert (plan.prefix, plan.prefix_author) == (3, GOLDEN)


@pytest.mark.parametrize("turned", [False, True])
def test_batch_that_gkd_gives_to_others_is_theirs(turned):
    """In whatever order the parts are named."""
    for on_policy, expected in ((0.0, [GOLDEN] * 2), (1.0, [STUDENT] * 4)):
        parts = [GKDMixture(on_policy=on_policy), ReplayMixture()]
        assert CombinedMixture(parts[::-1] if turned else parts).plan(PROMPTS, 2, 0.0, 0).author == expected


def test_each_token_is_learnt_by_the_part_that_brought_it():
    parts = [GoldenMixture(0.3), ReplayMixture(0.5), TeacherMixture(0.7, loss=ForwardKL()), TeacherMixing()]
    whole = CombinedMixture(parts)
    logits, teacher = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6).log_softmax(-1)
    authors = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    evidence = make_evidence(
        torch.arange(8) % 6, logits.log_softmax(-1), teacher, None, authors, -2 - torch.rand(8), 0.5
    )
    term = whole(evidence)
    assert term.where.tolist() == (authors != STUDENT).tolist()
    for part, author in zip(parts, (GOLDEN, PAST, TEACHER), strict=False):
        mine, alone = authors == author, part(evidence)
        torch.testing.assert_close(term.loss[mine], alone.loss[mine])
        torch.testing.assert_close(term.value[mine], alone.value[mine])
        gradients = [torch.autograd.grad(each.loss[mine].sum(), logits, retain_graph=True)[0] for each in (term, alone)]
        torch.testing.assert_close(*gradients)
    assert not term.value.requires_grad
    assert term.loss[authors == STUDENT].tolist() == [0.0, 0.0]


def test_needs_are_those_of_all_parts():
    whole = CombinedMixture([GoldenMixture(), TeacherMixture(loss=ForwardKL()), SpeculativeMixing()])
    assert (whole.needs_golden, whole.needs_writing_teacher, whole.needs_teacher, whole.blends) == (True,) * 4
    assert (whole.support, whole.authors, whole.begins) == ("full", (GOLDEN, TEACHER), False)
    plain = CombinedMixture([StudentOnly(), GoldenMixture()])
    assert (plain.support, plain.needs_teacher, plain.blends, plain.positionwise) == ("sampled", False, False, True)
    assert CombinedMixture([PrefixMixture(), TeacherMixture()]).begins


def test_part_that_blends_is_asked():
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    found = CombinedMixture([GoldenMixture(), TeacherMixing(0.4)]).blend(student, teacher, 0.0)
    torch.testing.assert_close(found, TeacherMixing(0.4).blend(student, teacher, 0.0))


def test_part_that_revises_is_asked():
    whole = CombinedMixture([GoldenMixture(), ReplayMixture(rate=1.0)])
    rollout = make_rollout([[1, 2], [3]], authors=[STUDENT, GOLDEN])
    assert whole.revise(rollout, 0).author.tolist() == [STUDENT, GOLDEN]
    assert whole.revise(rollout, 1).author.tolist() == [STUDENT, GOLDEN, PAST]


def test_what_parts_remember_is_in_the_checkpoint():
    whole, other = (CombinedMixture([GoldenMixture(), ReplayMixture()]) for _ in range(2))
    whole.revise(make_rollout([[1, 2], [3]]), 0)
    other.load_state_dict(whole.state_dict())
    assert [row["tokens"].tolist() for row in other.parts[1].rows] == [[1, 1, 2], [1, 3]]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "but got none. Name one"),
        ([GoldenMixture(), ShapedGolden()], "GoldenMixture, ShapedGolden .two with tokens by GOLDEN"),
        ([GoldenMixture(), GKDMixture()], "two with tokens by GOLDEN"),
        ([ReplayMixture(), ReplayMixture()], "two with tokens by PAST"),
        ([TeacherMixing(), SpeculativeMixing()], "one at most blends .*but got TeacherMixing, SpeculativeMixing"),
        (
            [PrefixMixture(), PrefixMixture(source="teacher")],
            "one at most begins the student's answers, but got Prefix",
        ),
        ([CombinedMixture([GoldenMixture()]), GoldenMixture()], "two with tokens by GOLDEN"),
        (
            [ReplayMixture(loss=SampledReverseKL(discount=0.5)), TeacherMixture(loss=ForwardKL())],
            "follows whole rows and one over the vocabulary",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        CombinedMixture(parts)


def test_parts_that_follow_rows_go_with_those_that_look_at_written_tokens():
    whole = CombinedMixture([ReplayMixture(loss=SampledReverseKL(discount=0.5)), GoldenMixture()])
    assert (whole.support, whole.positionwise) == ("sampled", False)
