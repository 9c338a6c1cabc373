import pytest

from stable_opd.divergences import ReverseKL
from stable_opd.mixtures import GoldenMixture, StudentOnly
from stable_opd.objective import Objective
from stable_opd.policies import Policies
from stable_opd.preflight import check_context, check_golden, check_parts, check_term_names
from stable_opd.references import InitialStudent, MovingAverage
from stable_opd.samplers import MinP, Temperature, TopK, TopP
from stable_opd.weightings import TokenSelection


@pytest.mark.parametrize(("prompt", "golden", "budget"), [(10, 0, 90), (10, 90, 1), (99, 1, 1)])
def test_rows_that_just_fit_are_accepted(prompt, golden, budget):
    check_context({"student": 100, "teacher": 100}, prompt, golden, budget)


def test_budget_that_does_not_fit_names_reader_and_way_out():
    with pytest.raises(ValueError, match=r"teacher reads at most 100 .*max_new_tokens to 90 or less"):
        check_context({"student": 200, "teacher": 100}, 10, 0, 91)


def test_way_out_is_never_a_negative_budget():
    with pytest.raises(ValueError, match="max_new_tokens to 0 or less"):
        check_context({"student": 10}, 20, 0, 5)


def test_golden_solution_that_does_not_fit_names_the_filter():
    with pytest.raises(ValueError, match=r"student reads at most 100 .*golden solution 91.*max_golden_tokens"):
        check_context({"student": 100}, 10, 91, 5)


def test_model_that_does_not_say_its_context_is_not_checked():
    check_context({"student": None}, 10**6, 10**6, 10**6)


@pytest.mark.parametrize("names", [["divergence"], ["anchor", "mixture"], ["mixture", "divergence"]])
def test_constraint_under_the_name_of_another_term_is_refused(names):
    with pytest.raises(ValueError, match=r"no other term has, but got '(divergence|mixture)'.*choose another key"):
        check_term_names("model.constraints", names, {"divergence", "mixture"})


def test_other_constraint_names_are_accepted():
    check_term_names("model.constraints", ["anchor", "entropy"], {"mixture"})


@pytest.mark.parametrize("name", ["kl.anchor", "keys", "type", "two words", ""])
def test_constraint_that_could_not_be_held_or_logged_is_refused(name):
    with pytest.raises(ValueError, match=r"plain words as keys of model\.constraints.*'anchor'"):
        check_term_names("model.constraints", ["entropy", name], {"divergence", "mixture"})


def test_missing_golden_solutions_are_counted():
    check_golden("GoldenMixture", 10, 10)
    with pytest.raises(ValueError, match=r"but 3 of 10 training examples have none.*data\.columns\.golden"):
        check_golden("GoldenMixture", 7, 10)


def check(mixture, policies, sampler=None, divergence=None, weightings=(), reference=None):
    objective = Objective({"divergence": divergence or ReverseKL()}, {"mixture": mixture})
    check_parts(objective, mixture, policies, weightings, reference or InitialStudent(), sampler or Temperature())


def test_weighting_that_compares_with_a_teacher_who_is_not_asked_is_refused():
    blind = ReverseKL()
    blind.needs_teacher = False
    with pytest.raises(ValueError, match=r"asks the teacher, because TokenSelection compares"):
        check(StudentOnly(), Policies(), divergence=blind, weightings=[TokenSelection()])
    check(StudentOnly(), Policies(), weightings=[TokenSelection()])


def test_moving_reference_that_nobody_looks_at_is_refused():
    with pytest.raises(ValueError, match=r"model\.reference is MovingAverage, but got none\. Add .*ReferenceKL"):
        check(StudentOnly(), Policies(), reference=MovingAverage())


def test_golden_rows_that_nobody_learns_from_are_refused():
    with pytest.raises(ValueError, match=r"loops is golden, but got StudentOnly.*Use GoldenMixture, or choose .* mask"):
        check(StudentOnly(), Policies(loops="golden"), Temperature())
    check(GoldenMixture(), Policies(loops="golden"), Temperature())
    check(StudentOnly(), Policies(loops="mask"), Temperature())


@pytest.mark.parametrize(
    "sampler", [Temperature(0.7), TopP(0.9), TopK(5), MinP(0.1)], ids=lambda each: type(each).__name__
)
def test_a_sampler_that_is_not_the_student_is_warned_of(sampler):
    with pytest.warns(UserWarning, match=rf"{type(sampler).__name__} does not draw from the student's own"):
        check(StudentOnly(), Policies(), sampler)


@pytest.mark.parametrize("sampler", [Temperature(), TopP(1.0), MinP(0.0)], ids=lambda each: type(each).__name__)
def test_a_sampler_that_is_the_student_is_not(sampler, recwarn):
    check(StudentOnly(), Policies(), sampler)
    assert not recwarn.list
