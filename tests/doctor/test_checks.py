"""Each check on what only a plug-in, a trainer or a rare template can offend, and what becomes of findings."""

import pytest
import torch

from helpers import EOS, TOKENIZER, make_trainer, tiny_model
from stable_opd import OPDModule
from stable_opd.constraints import ReferenceKL
from stable_opd.data import PromptDataModule
from stable_opd.divergences import ReverseKL
from stable_opd.doctor import CHECKS, Finding, Patient, Report, Speaker, examine, refuse
from stable_opd.doctor.measure import Measured
from stable_opd.examples import Example
from stable_opd.learning import Learner
from stable_opd.mixtures import GoldenMixture, StudentOnly
from stable_opd.objective import Objective
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.policies import Policies
from stable_opd.readers import Readers
from stable_opd.references import InitialStudent, MovingAverage
from stable_opd.repetition import PeriodicSuffix
from stable_opd.samplers import MinP, Temperature, TopK, TopP
from stable_opd.sources import Columns, Source
from stable_opd.teachers import LocalTeacher
from stable_opd.terminal import StopRule
from stable_opd.weightings import TokenSelection

MODEL = tiny_model(0)


def speaker(name="student", template=None, **changes):
    tokenizer = TOKENIZER.__class__(
        tokenizer_object=TOKENIZER._tokenizer, eos_token="<eos>", pad_token="<pad>", **changes
    )
    tokenizer.chat_template = template
    return Speaker(name, name, MODEL, tokenizer)


def data_of(*examples, chat_template=False, validation=()):
    data = PromptDataModule(chat_template=chat_template)
    data.examples = {"train": list(examples), "validation": list(validation)}
    return data


def example(ids=(1, 2), golden=(3, EOS), **fields):
    return Example(list(ids), list(golden) if golden else None, {"prompt": "Q", "golden": "1", **fields})


def learner(mixture=None, policies=None, divergence=None, weightings=(), reference=None, constraints=None) -> Learner:
    objective = Objective(
        {"divergence": divergence or ReverseKL(), **(constraints or {})}, {"mixture": mixture or StudentOnly()}
    )
    readers, policies = Readers(LocalTeacher("unused")), policies or Policies()
    return Learner(
        MODEL,
        objective,
        readers,
        policies,
        weightings,
        reference or InitialStudent(),
        UpdateOptions(),
        [EOS],
        20,
        StopRule((EOS,)),
    )


def patient(**parts) -> Patient:
    healthy = {
        "student": speaker(),
        "teacher": speaker("teacher"),
        "contexts": {"student": 100, "teacher": 100},
        "stop_rule": StopRule((EOS,)),
        "sampler": Temperature(),
        "budget": 10,
        "precision": "32-true",
        "data": data_of(example()),
        "learner": learner(),
    }
    return Patient(**healthy | parts)


def found(name, **parts) -> list[Finding]:
    report = examine(patient(**parts), [CHECKS[name]])
    assert report.checked == [name]
    return report.findings


def test_nothing_is_found_where_nothing_is_wrong():
    report = examine(patient())
    assert report.findings == []
    measured = ["drift", "inert-signal", "extreme-signal", "teacher-stop", "golden-ending", "student-stop"]
    assert report.missing == dict.fromkeys(measured, "measured") | {"memory": "memory"}


@pytest.mark.parametrize(("prompt", "golden", "budget"), [(10, 1, 90), (10, 90, 1), (99, 1, 1)])
def test_rows_that_just_fit_are_accepted(prompt, golden, budget):
    parts = {
        "data": data_of(example([1] * prompt, [EOS] * golden)),
        "budget": budget,
        "learner": learner(GoldenMixture()),
    }
    assert found("context", **parts) == found("golden-context", **parts) == []


def test_budget_that_does_not_fit_names_reader_and_way_out():
    parts = {"contexts": {"student": 200, "teacher": 100}, "data": data_of(validation=[example([1] * 10)])}
    (finding,) = found("context", budget=91, **parts)
    assert finding.found.startswith("The teacher reads at most 100 ")
    assert "max_new_tokens to 90 or less" in finding.fix


def test_way_out_is_never_a_negative_budget():
    (finding,) = found("context", contexts={"student": 10}, data=data_of(example([1] * 20)))
    assert "max_new_tokens to 0 or less" in finding.fix


def test_golden_solution_that_does_not_fit_names_the_filter():
    parts = {"data": data_of(example([1] * 10, [1] * 91)), "contexts": {"student": 100}}
    (finding,) = found("golden-context", learner=learner(GoldenMixture()), **parts)
    assert "student reads at most 100 " in finding.found
    assert "golden solution 91" in finding.found
    assert "max_golden_tokens" in finding.fix
    assert found("golden-context", learner=learner(policies=Policies(loops="golden")), **parts)
    assert not found("golden-context", **parts)  # nobody reads it


def test_model_that_does_not_say_its_context_is_not_checked():
    assert not found("context", contexts={"student": None}, budget=10**6)


def test_missing_golden_solutions_are_counted():
    data = data_of(*[example()] * 7, *[example(golden=None)] * 3)
    (finding,) = found("golden-missing", data=data, learner=learner(GoldenMixture()))
    assert "GoldenMixture needs a golden solution for every prompt, but 3 of 10" in finding.found
    assert not found("golden-missing", data=data)
    assert not found("golden-missing", data=data_of(example()), learner=learner(GoldenMixture()))


@pytest.mark.parametrize(("long", "warned"), [(1, False), (2, True)])
def test_one_golden_solution_in_twenty_may_exceed_the_budget(long, warned):
    data = data_of(*[example()] * (20 - long), *[example(golden=[3] * 11)] * long)
    assert bool(found("golden-budget", data=data)) is warned


def test_weighting_that_compares_with_a_teacher_who_is_not_asked_is_refused():
    blind = ReverseKL()
    blind.needs_teacher = False
    (finding,) = found("weighting", learner=learner(divergence=blind, weightings=[TokenSelection()]))
    assert "asks the teacher, because TokenSelection compares" in finding.found
    assert finding.severity == "error"
    assert "needs_teacher = True" in finding.fix
    assert not found("weighting", learner=learner(weightings=[TokenSelection()]))
    assert not found("weighting", learner=learner(divergence=blind))


def test_moving_reference_that_somebody_looks_at_is_accepted():
    anchored = learner(reference=MovingAverage(), constraints={"anchor": ReferenceKL(0.1)})
    assert not found("reference", learner=anchored)
    assert found("reference", learner=learner(reference=MovingAverage()))


def test_golden_rows_that_somebody_learns_from_are_accepted():
    assert not found("loops", learner=learner(GoldenMixture(), Policies(loops="golden")))
    assert not found("loops", learner=learner(policies=Policies(loops="mask")))
    assert found("loops", learner=learner(policies=Policies(loops="golden")))


@pytest.mark.parametrize(
    "sampler", [Temperature(0.7), TopP(0.9), TopK(5), MinP(0.1)], ids=lambda each: type(each).__name__
)
def test_a_sampler_that_is_not_the_student_is_warned_of(sampler):
    (finding,) = found("sampler", sampler=sampler)
    assert finding.severity == "warning"
    assert f"{type(sampler).__name__} does not draw from the student's own" in finding.found


@pytest.mark.parametrize("sampler", [Temperature(), TopP(1.0), MinP(0.0)], ids=lambda each: type(each).__name__)
def test_a_sampler_that_is_the_student_is_not(sampler):
    assert not found("sampler", sampler=sampler)


def test_precision_that_scales_gradients_is_refused():
    """Lightning replaces it on a CPU, so no command of the tests gets as far."""
    (finding,) = found("precision", precision="16-mixed")
    assert finding.severity == "error"
    assert "bf16-mixed" in finding.fix
    assert not found("precision", precision="bf16-mixed")


def test_golden_solution_without_a_stop_token_is_refused():
    """Those of the data module have one; a plug-in's may not."""
    (finding,) = found("golden-end", data=data_of(example(), example(golden=[3, 4])))
    assert finding.severity == "error"
    assert finding.found == "1 of 2 golden solutions do not end with a stop token."
    assert finding.fix == "End each with <eos>."
    assert not found("golden-end", data=data_of(example(), example(golden=None)))


def measured(**figures) -> Measured:
    healthy = {"tokens": 9, "kl": 0.3, "overlap": 0.7, "drift": 0.01}
    return Measured(**healthy | {"stop_student": 0.9, "stop_teacher": 0.9, "stop_teacher_own": 0.9} | figures)


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("drift", {"drift": 0.06}),
        ("inert-signal", {"kl": 1e-4}),
        ("extreme-signal", {"kl": 2.1}),
        ("extreme-signal", {"kl": float("nan")}),
        ("teacher-stop", {"stop_teacher": 1e-4}),
        ("golden-ending", {"stop_teacher": 1e-4, "stop_teacher_own": 0.05}),
        ("student-stop", {"stop_student": 0.05}),
    ],
)
def test_figure_is_judged_by_one_check(name, figures):
    signal = ["drift", "inert-signal", "extreme-signal", "teacher-stop", "golden-ending", "student-stop"]
    assert {each for each in signal if found(each, measured=measured(**figures))} == {name}
    assert not any(found(each, measured=measured()) for each in signal)


def test_pair_without_golden_solutions_is_not_judged_by_their_ends():
    nothing = measured(stop_student=None, stop_teacher=None, stop_teacher_own=None)
    assert not any(found(each, measured=nothing) for each in ("teacher-stop", "golden-ending", "student-stop"))


def test_sampler_of_another_distribution_does_not_drift():
    assert not found("drift", measured=measured(drift=1.0), sampler=Temperature(0.5))


OPEN = "{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}"
CLOSED = OPEN.replace("<think>\n", "<think>\n\n</think>\n\n")
EITHER = (
    "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "golden", "fix"),
    [
        (OPEN, "so </think> 1", None),
        (OPEN, "<think> so </think> 1", "begin inside their thoughts"),
        (OPEN, "1", "with thoughts"),
        (CLOSED, "1", None),
        (CLOSED, "<think> so </think> 1", "without thoughts"),
        (EITHER, "<think> so </think> 1", None),
        (EITHER, "1", "with thoughts"),
        ("{%- set enable_thinking = false %}" + EITHER, "1", None),  # the fix is one
        ("{{ messages[0].content }}", "1", None),
        ("{{ messages[0].content }}", "<think> so </think> 1", None),
    ],
)
def test_thoughts_of_template_and_golden_solutions_have_to_agree(template, golden, fix):
    parts = {"student": speaker(template=template), "data": data_of(example(golden=[3, EOS]), chat_template=True)}
    parts["data"].examples["train"][0].fields["golden"] = golden
    findings = found("thinking", **parts)
    assert bool(findings) is (fix is not None)
    assert all(fix in each.fix for each in findings)


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        (OPEN, None),
        (CLOSED, "but the teacher's"),
        (None, "but the teacher has none"),
        ("{{ raise_exception('no system') }}", "nothing, because no system"),
    ],
)
def test_templates_have_to_write_the_same_prompt(theirs, says):
    parts = {"student": speaker(template=OPEN), "teacher": speaker("teacher", theirs)}
    findings = found("template", data=data_of(example(), chat_template=True), **parts)
    assert bool(findings) is (says is not None)
    assert all(says in each.found for each in findings)
    assert not found("template", data=data_of(example()), **parts)  # nobody uses them


def test_template_without_an_end_of_turn_is_not_checked_for_it():
    assert not found("end-of-turn", student=speaker(template=OPEN), data=data_of(example(), chat_template=True))


def test_check_that_fails_stops_nothing():
    broken = "{{ raise_exception('one turn only') }}"
    report = examine(patient(student=speaker(template=broken), data=data_of(example(), chat_template=True)))
    assert report.missing["end-of-turn"] == "TemplateError: one turn only"
    assert "context" in report.checked


def test_teacher_elsewhere_is_said_to_be_unchecked():
    report = examine(patient(teacher=None))
    assert report.missing["stop-sets"] == report.missing["template"] == "teacher"
    assert "context" in report.checked


def test_errors_are_refused_together_and_warnings_said_once(recwarn):
    findings = [Finding(str(number), severity, "Found.", "Cost.", "Fix.") for number, severity in enumerate(SEVERE)]
    with pytest.raises(ValueError, match=r"^Found\. Cost\. Fix\.\nFound\. Cost\. Fix\.$"):
        refuse(Report(findings))
    assert [str(each.message) for each in recwarn.list] == ["Found. Cost. Fix."]


SEVERE = ["error", "warning", "note", "error"]


def test_notes_are_for_the_command_alone(recwarn):
    refuse(Report([Finding("a", "note", "Found.", "Cost.", "Fix.")]))
    assert not recwarn.list


def fit(student_path, teacher_path, train_path, **rollout):
    module = OPDModule(
        student_path,
        LocalTeacher(teacher_path),
        ReverseKL(),
        StudentOnly(),
        PeriodicSuffix(),
        sampler=rollout.pop("sampler", None),
        rollout=RolloutOptions(samples_per_prompt=1, **rollout),
    )
    data = PromptDataModule(Source(train_path), columns=Columns(), batch_size=4)
    make_trainer(max_steps=1).fit(module, data)
    return module


def test_fit_warns_before_the_first_step(student_path, teacher_path, train_path):
    with pytest.warns(
        UserWarning, match=r"golden solutions are longer than the token budget of 4\..*Raise model\.rollout"
    ):
        fit(student_path, teacher_path, train_path, max_new_tokens=4)
    with pytest.warns(UserWarning, match=r"TopK does not draw from the student's own.*leave model\.sampler out"):
        fit(student_path, teacher_path, train_path, max_new_tokens=24, sampler=TopK(3))


def test_fit_refuses_errors_with_their_fix(student_path, teacher_path, train_path):
    with pytest.raises(
        ValueError, match=r"student reads at most 96.*\nThe teacher reads .*max_new_tokens to \d+ or less"
    ):
        fit(student_path, teacher_path, train_path, max_new_tokens=500)


def test_fit_of_a_healthy_pair_says_nothing(student_path, teacher_path, train_path, recwarn):
    module = fit(student_path, teacher_path, train_path, max_new_tokens=24)
    assert module.global_step == 1
    assert torch.isfinite(torch.tensor(float(module.trainer.logged_metrics["train/loss"])))
    assert not [each for each in recwarn.list if "stable_opd" in str(each.filename)]
