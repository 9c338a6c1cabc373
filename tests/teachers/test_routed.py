"""Several teachers, each for a part of the data."""

from contextlib import contextmanager

import pytest
import torch

from helpers import TOKENIZER, VOCABULARY, Recorder, make_rollout, make_trainer, problems, save, tiny_model, write_jsonl
from stable_opd import (
    GoldenMixture,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReverseKL,
    SampledReverseKL,
    TransformersEngine,
    build,
)
from stable_opd.mixtures import ReplayMixture
from stable_opd.objective import Cutting, Objective, evaluate, pieces
from stable_opd.options import RolloutOptions
from stable_opd.readers import Readers
from stable_opd.sources import Source
from stable_opd.teachers import PrivilegedTeacher, RoutedTeacher, SelfTeacher
from stable_opd.types import Repetition
from teachers.common import Telling

CPU = torch.device("cpu")
WHOSE = ["adds", "takes", "adds", "adds", "takes"]
FIELDS = [{"task": name} for name in WHOSE]


@pytest.fixture
def routed(teacher_path, tmp_path):
    """Two teachers, of different widths, so that their states do not go together."""

    def routed(**options):
        other = save(tiny_model(3, hidden_size=48), tmp_path / "other")
        teachers = {"adds": LocalTeacher(teacher_path, **options), "takes": LocalTeacher(other, **options)}
        teacher = RoutedTeacher(teachers, "task")
        teacher.setup("student", TOKENIZER, CPU)
        return teacher

    return routed


def rows():
    completions = [[5, 6, 7], [1, 2], [9, 3, 3, 4], [3, 4], [8, 8, 1]]
    return make_rollout(completions, [[2, 3], [4], [8, 8], [6], [5, 1]], fields=FIELDS)


def loss_and_gradient(teacher, rollout, shares, max_tokens=16_384):
    """Loss and gradient of the parameters over all micro-batches that a learner would make."""
    student = tiny_model(1)
    nowhere = Repetition(torch.zeros_like(rollout.row, dtype=torch.bool), torch.zeros(len(rollout), dtype=torch.bool))
    objective = Objective({"divergence": ReverseKL()}, {"mixture": GoldenMixture()})
    parts = teacher.apart(rollout, torch.arange(len(rollout)))
    work = [each for part in parts for each in pieces(rollout, nowhere, objective, Cutting(max_tokens), part)]
    total = 0.0
    for piece, readings in zip(work, Readers(teacher).read(work, VOCABULARY), strict=True):
        result = evaluate(piece, readings, shares, student, VOCABULARY)
        result.loss.backward()
        total += result.loss.item()
    return total, torch.cat([each.grad.flatten() for each in student.parameters()])


@pytest.mark.parametrize("offload", [False, True], ids=["there", "resting"])
@pytest.mark.parametrize("max_tokens", [1, 12, 16_384])
def test_loss_is_that_of_each_row_with_its_own_teacher(routed, offload, max_tokens):
    teacher, rollout = routed(offload=offload), rows()
    shares = {"divergence": torch.linspace(0.1, 0.3, len(rollout.row))}
    found, gradient = loss_and_gradient(teacher, rollout, shares, max_tokens)
    expected, expected_gradient = 0.0, torch.zeros_like(gradient)
    for row, name in enumerate(WHOSE):
        one = torch.tensor([row])
        own = {"divergence": shares["divergence"][rollout.places(one)]}
        loss, part = loss_and_gradient(teacher.teachers[name], rollout.select(one), own)
        expected, expected_gradient = expected + loss, expected_gradient + part
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_teachers_that_rest_come_one_after_the_other(routed, monkeypatch):
    """Once each for all their micro-batches, and never two at a time."""
    teacher, events, here = routed(offload=True), [], set()
    for name, each in teacher.teachers.items():

        @contextmanager
        def present(name=name):
            assert not here
            here.add(name)
            events.append(name)
            yield
            here.remove(name)

        monkeypatch.setattr(each, "present", present)
    loss_and_gradient(teacher, rows(), {"divergence": torch.ones(14)}, max_tokens=5)
    assert events == ["adds", "takes"]
    assert not here


def test_rows_of_two_teachers_are_not_scored_together(routed):
    with pytest.raises(ValueError, match=r"rows of one teacher, but got rows of 2\. Cut them by `apart`"):
        routed().score(rows())


def test_rows_keep_their_order_within_a_teacher(routed):
    found = routed().apart(rows(), torch.tensor([4, 3, 1, 0]))
    assert [each.tolist() for each in found] == [[3, 0], [4, 1]]


def test_what_is_told_is_what_the_one_with_the_least_tells():
    few, none = Telling("one", told=2), Telling("two", "sampled", told=3)
    assert RoutedTeacher({"a": few, "b": LocalTeacher("c")}, "task").support == "topk"
    both = RoutedTeacher({"a": few, "b": none}, "task")
    assert (both.support, both.k, both.columns) == ("sampled", 2, ("task",))
    assert RoutedTeacher({"b": LocalTeacher("c")}, "task").k is None


def test_answers_end_where_any_of_them_ends():
    teacher = RoutedTeacher({name: LocalTeacher(f"testbed:{name}") for name in ("student-other-stop", "student")}, "t")
    teacher.setup("student", TOKENIZER, CPU)
    ids = [each.stop_ids for each in teacher.teachers.values()]
    assert ids[0] != ids[1]
    assert set(teacher.stop_ids) == {*ids[0], *ids[1]}


def test_what_all_can_read_is_what_the_shortest_can(teacher_path, tmp_path):
    short = save(tiny_model(2, max_position_embeddings=17), tmp_path)
    teacher = RoutedTeacher({"long": LocalTeacher(teacher_path), "short": LocalTeacher(short)}, "task")
    teacher.setup("student", TOKENIZER, CPU)
    assert teacher.context_length == 17
    sizes = [each.footprint for each in teacher.teachers.values()]
    assert teacher.footprint == sum(sizes)
    for each in teacher.teachers.values():
        each.offload = True
    assert teacher.footprint == max(sizes)


def test_no_teachers_are_refused():
    with pytest.raises(ValueError, match="Expected some teachers"):
        RoutedTeacher({}, "task")


@pytest.fixture
def fit(student_path, teacher_path, tmp_path):
    """Train on examples that name a teacher each."""

    def fit(names, mixture=None, divergence=None, steps=3):
        examples = [example | {"task": name} for example, name in zip(problems(12), names * 12, strict=False)]
        path = write_jsonl(tmp_path / "train.jsonl", examples)
        other = save(tiny_model(3, hidden_size=48), tmp_path / "other")
        module = OPDModule(
            student_path,
            RoutedTeacher({"adds": LocalTeacher(teacher_path), "takes": LocalTeacher(other)}, "task"),
            divergence or ReverseKL(),
            mixture or GoldenMixture(),
            PeriodicSuffix(),
            engine=TransformersEngine(),
            rollout=RolloutOptions(samples_per_prompt=1, max_new_tokens=8),
        )
        recorder = Recorder()
        make_trainer(recorder, max_steps=steps).fit(module, PromptDataModule(Source(path), batch_size=4))
        return module, recorder.steps

    return fit


def test_replayed_rows_know_their_teacher(fit):
    """Also those whose golden solution is learnt from the teacher."""
    module, steps = fit(["adds", "takes"], ReplayMixture(rate=1.0), SampledReverseKL())
    assert steps[2]["train/value/mixture"] != 0
    assert {row["fields"]["task"] for row in module.mixture.rows} == {"adds", "takes"}
    module, steps = fit(["adds", "takes"], GoldenMixture(loss=build("divergence", "ForwardKL")), steps=1)
    assert steps[0]["train/value/mixture"] > 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["adds", "divides"], "teachers 'adds', 'takes' in its column 'task', but 'divides' is none of them"),
        (["adds", None], "but 'None' is none of them"),
    ],
)
def test_unknown_names_are_refused_before_the_first_step(fit, names, expected):
    with pytest.raises(ValueError, match=expected):
        fit(names, steps=0)


def test_unknown_names_are_refused_where_no_data_are_known_before(routed):
    stranger = make_rollout([[1, 2]], fields=[{"task": "divides"}])
    with pytest.raises(ValueError, match="one of the teachers 'adds', 'takes' by its column 'task', but got 'divides'"):
        routed().apart(stranger, torch.arange(1))


def test_another_vocabulary_is_refused_by_the_teacher_who_has_it(routed, tmp_path):
    teacher = routed()
    path = save(tiny_model(2), tmp_path / "strange")
    words = tmp_path / "strange" / "tokenizer.json"
    words.write_text(words.read_text().replace('"#"', '"&"'))
    teacher.teachers["strange"] = LocalTeacher(path)
    with pytest.raises(ValueError, match="strange' must have the vocabulary"):
        teacher.setup("student", TOKENIZER, CPU)


def test_says_that_the_student_reads_if_one_of_its_teachers_is_the_student(teacher_path):
    other, told = LocalTeacher(teacher_path), PrivilegedTeacher(SelfTeacher(), "{hint}")
    assert RoutedTeacher({"a": other, "b": told}, "task").reads_by_student
    assert not RoutedTeacher({"a": other, "b": other}, "task").reads_by_student
