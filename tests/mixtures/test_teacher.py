"""Plans in which the teacher, or the golden solution, writes rows or begins them."""

import math

import pytest
import torch
from torch import nn

from stable_opd import Author, Linear, Prompts
from stable_opd.mixtures import GKDMixture, PrefixMixture, TeacherMixture

PROMPTS = Prompts([[1], [2]], [[4], [5]], [10, 11], [{}] * 2)
WITHOUT = Prompts([[1], [2]], [[4], None], [10, 11], [{}] * 2)
STUDENT, GOLDEN, TEACHER = Author.STUDENT, Author.GOLDEN, Author.TEACHER


@pytest.mark.parametrize("rows", [1, 3])
def test_teachers_rows_come_after_the_students(rows):
    plan = TeacherMixture(teacher_samples=rows).plan(WITHOUT, 2, 0.0, 0)
    assert plan.prompt == [0, 0, 1, 1, *[0] * rows, *[1] * rows]
    assert plan.author == [STUDENT] * 4 + [TEACHER] * (2 * rows)


def coin(mixture, steps=1000):
    """For each step, whether the batch is the student's."""
    plans = [mixture.plan(PROMPTS, 2, 0.0, step) for step in range(steps)]
    whole = {(STUDENT,) * 4, (mixture.author,) * 2}
    assert {tuple(plan.author) for plan in plans} <= whole  # one or the other, and nothing in between
    return [plan.author[0] == STUDENT for plan in plans]


@pytest.mark.parametrize("source", ["golden", "teacher"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_coin_of_gkd_falls_as_often_as_it_should(share, source):
    found = coin(GKDMixture(on_policy=share, source=source))
    deviation = math.sqrt(share * (1 - share) * 1000)
    assert abs(sum(found) - 1000 * share) <= 4 * deviation


def test_coin_is_the_same_on_every_process_and_another_under_another_seed(monkeypatch):
    """It follows from seed and step alone, not from the generator, the batch or the number of calls."""
    first = coin(GKDMixture())
    torch.manual_seed(7)
    assert coin(GKDMixture()) == first
    other = Prompts([[3]], [[6]], [99], [{}])
    assert [GKDMixture().plan(other, 1, 0.5, step).author == [STUDENT] for step in range(1000)] == first
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert coin(GKDMixture()) != first


def test_students_batches_of_gkd_need_no_golden_solutions():
    mixture = GKDMixture(on_policy=1.0)
    assert mixture.plan(WITHOUT, 1, 0.0, 0).author == [STUDENT] * 2
    with pytest.raises(ValueError, match="GKDMixture needs a golden solution"):
        GKDMixture(on_policy=0.0).plan(WITHOUT, 1, 0.0, 0)
    assert GKDMixture(on_policy=0.0, source="teacher").plan(WITHOUT, 1, 0.0, 0).author == [TEACHER] * 2


@pytest.mark.parametrize(
    ("progress", "length"), [(0.0, 128), (0.25, int(64 * (1 + math.sqrt(0.5)))), (0.5, 64), (0.9, 3), (1.0, 0)]
)
def test_beginnings_get_shorter_along_a_cosine(progress, length):
    plan = PrefixMixture().plan(PROMPTS, 2, progress, 0)
    assert (plan.prefix, plan.prefix_author) == (length, GOLDEN)
    assert (plan.prompt, plan.author) == ([0, 0, 1, 1], [STUDENT] * 4)


@pytest.mark.parametrize(("factor", "length"), [(-1.0, 0), (0.99, 9), (1.0, 10), (7.0, 10)])
def test_annealing_does_not_leave_the_interval(factor, length):
    assert PrefixMixture(prefix=10, annealing=Linear(factor, factor)).plan(PROMPTS, 2, 0.0, 0).prefix == length


def test_teacher_may_begin_where_there_are_no_golden_solutions():
    plan = PrefixMixture(source="teacher").plan(WITHOUT, 1, 0.0, 0)
    assert plan.prefix_author == TEACHER
    with pytest.raises(ValueError, match="PrefixMixture needs a golden solution"):
        PrefixMixture().plan(WITHOUT, 1, 0.0, 0)


@pytest.mark.parametrize("make", [GKDMixture, PrefixMixture])
def test_needs_follow_from_the_source(make):
    golden, teacher = make(source="golden"), make(source="teacher")
    assert (golden.needs_golden, golden.needs_writing_teacher, golden.authors) == (True, False, (GOLDEN,))
    assert (teacher.needs_golden, teacher.needs_writing_teacher, teacher.authors) == (False, True, (TEACHER,))
    assert isinstance(golden, nn.Module)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GKDMixture(on_policy=1.5), "on_policy between 0 and 1, but got 1.5"),
        (lambda: GKDMixture(source="student"), "source out of golden, teacher, but got 'student'"),
        (lambda: PrefixMixture(source="gold"), "source out of golden, teacher, but got 'gold'"),
        (lambda: PrefixMixture(prefix=-1), "prefix of at least 0 tokens, but got -1"),
        (lambda: TeacherMixture(teacher_samples=0), "teacher_samples of at least 1, but got 0"),
        (lambda: TeacherMixture(-0.5), "weight of at least 0, but got -0.5"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
