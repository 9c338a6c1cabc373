"""Who is asked to read which rows, and when; the states themselves are held against the models' own."""

import pytest
import torch

from helpers import TOKENIZER, VOCABULARY, make_rollout, tiny_model
from stable_opd import Author, Divergence, GoldenMixture, LocalTeacher, ReferenceKL, ReverseKL, TokenLoss
from stable_opd.models import frozen_copy
from stable_opd.objective import Cutting, Objective, pieces
from stable_opd.readers import Readers
from stable_opd.scoring import body
from stable_opd.types import Repetition

CPU = torch.device("cpu")
AUTHORS = [Author.STUDENT, Author.GOLDEN, Author.STUDENT, Author.STUDENT]
PLACES = {"nobody": (False, False), "teacher": (True, False), "reference": (False, True), "both": (True, True)}
each_place = pytest.mark.parametrize(("teacher_rests", "reference_rests"), PLACES.values(), ids=PLACES)


def alone():
    """A divergence that looks at the student alone; made here, so that it stays out of the registry."""

    class Alone(Divergence):
        """Asks nobody."""

        needs_teacher = False

        def forward(self, evidence):
            loss = -evidence.student.sampled
            return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    return Alone()


def cut(own=None, other=None, max_tokens=16_384):
    """Micro-batches of three rows of the student and a golden one."""
    rollout = make_rollout([[5, 6, 7], [1, 2], [9], [3, 4]], [[2, 3], [4], [8, 8], [6]], AUTHORS)
    nowhere = Repetition(torch.zeros(8, dtype=torch.bool), torch.zeros(4, dtype=torch.bool))
    own = {"divergence": ReverseKL()} if own is None else own
    other = {"mixture": GoldenMixture()} if other is None else other
    return list(pieces(rollout, nowhere, Objective(own, other), Cutting(max_tokens)))


@pytest.fixture
def make(teacher_path):
    """Make readers who say when they come, read and leave; the initial student is a copy of one that is trained."""

    def make(teacher_rests=False, reference_rests=False, reference=True):
        events = []

        class Saying(LocalTeacher):
            """Says what it does."""

            def score(self, rollout):
                events.append("teacher")
                return super().score(rollout)

        teacher = Saying(teacher_path, teacher_rests)
        teacher.setup("student", TOKENIZER, CPU)
        readers = Readers(teacher, reference_rests)
        if reference:
            readers.reference = frozen_copy(tiny_model(1).train())
            readers.reference.base_model.register_forward_pre_hook(lambda *_: events.append("reference"))
        readers.move(CPU, torch.float32)
        return readers, events

    return make


ASKED = {
    "teacher": (lambda: {"divergence": ReverseKL()}, ["teacher"]),
    "reference": (lambda: {"own": alone(), "anchor": ReferenceKL()}, ["reference"]),
    "both": (lambda: {"divergence": ReverseKL(), "anchor": ReferenceKL()}, ["teacher", "reference"]),
    "nobody": (lambda: {"own": alone()}, []),
}


@each_place
@pytest.mark.parametrize(("terms", "asked"), ASKED.values(), ids=ASKED)
def test_only_those_are_asked_whom_a_term_needs(terms, asked, teacher_rests, reference_rests, make):
    """The golden row, whose term needs nobody, is read by nobody."""
    readers, events = make(teacher_rests, reference_rests)
    work = cut(terms())
    ((own, golden),) = readers.read(work, VOCABULARY)
    assert events == asked
    assert (own.teacher is not None, own.reference is not None) == ("teacher" in asked, "reference" in asked)
    assert golden.teacher is golden.reference is None


def test_rows_of_others_are_read_by_whom_their_term_needs(make):
    readers, events = make()
    ((own, golden),) = readers.read(cut({"own": alone()}, {"mixture": ReverseKL(), "anchor": ReferenceKL()}), 40)
    assert events == ["teacher", "reference"]
    assert own.teacher is own.reference is None
    assert len(golden.teacher.states) == len(golden.reference.states) == 2


def test_without_an_initial_student_the_others_read_all_the_same(make):
    readers, _ = make(reference=False, reference_rests=True)
    ((own, _),) = readers.read(cut(), VOCABULARY)
    assert own.teacher is not None
    assert own.reference is None


@each_place
def test_states_are_those_of_the_models_over_the_rows_of_the_group(teacher_rests, reference_rests, make):
    readers, _ = make(teacher_rests, reference_rests)
    work = cut({"divergence": ReverseKL(), "anchor": ReferenceKL()}, max_tokens=6)
    answers = list(readers.read(work, VOCABULARY))
    assert len(work) == len(answers) > 1
    for piece, parts in zip(work, answers, strict=True):
        for group, part in zip(piece.groups, parts, strict=True):
            if not group.on_policy:
                continue
            for found, model in ((part.teacher, tiny_model(2)), (part.reference, tiny_model(1))):
                torch.testing.assert_close(found.states, body(model, group.rollout).detach())
                torch.testing.assert_close(found.head.weight, model.lm_head.weight.detach())


def test_heads_are_cut_to_the_shared_vocabulary(make):
    readers, _ = make()
    ((own, _),) = readers.read(cut({"anchor": ReferenceKL()}), VOCABULARY - 3)
    assert own.reference.head.weight.shape == (VOCABULARY - 3, 32)


def test_those_who_stay_read_one_micro_batch_at_a_time(make):
    readers, events = make()
    work = cut({"divergence": ReverseKL(), "anchor": ReferenceKL()}, {}, max_tokens=1)
    readings = readers.read(work, VOCABULARY)
    assert events == []
    for piece in work:
        events.clear()
        next(readings)
        assert events == ["teacher", "reference"] * sum(group.on_policy for group in piece.groups)
    assert len(work) == 4


@pytest.mark.parametrize(("teacher_rests", "reference_rests"), [(True, False), (False, True), (True, True)])
def test_one_who_rests_makes_all_read_everything_at_once(teacher_rests, reference_rests, make):
    """And has left when the first micro-batch is handed over."""
    readers, events = make(teacher_rests, reference_rests)
    work = cut({"divergence": ReverseKL(), "anchor": ReferenceKL()}, max_tokens=1)
    readings = readers.read(work, VOCABULARY)
    next(readings)
    assert events == ["teacher", "reference"] * 3
    assert len(list(readings)) == 3
    assert len(events) == 6


def test_visitors_are_there_while_they_read_and_only_then(make, monkeypatch):
    readers, events = make(True, True)
    names, move = {id(readers.reference): "reference", id(readers.teacher.model): "teacher"}, torch.nn.Module.to

    def to(module, *args):
        events.append(f"{names[id(module)]} moves")
        return move(module, *args)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    next(readers.read(cut({"divergence": ReverseKL(), "anchor": ReferenceKL()}), VOCABULARY))
    assert sorted(events[:2]) == sorted(events[-2:]) == ["reference moves", "teacher moves"]
    assert events[2:-2] == ["teacher", "reference"]


@each_place
def test_nothing_of_the_readers_gets_a_gradient_or_is_trained(teacher_rests, reference_rests, make):
    readers, _ = make(teacher_rests, reference_rests)
    for parts in readers.read(cut({"divergence": ReverseKL(), "anchor": ReferenceKL()}), VOCABULARY):
        for read in (parts[0].teacher, parts[0].reference):
            assert not read.states.requires_grad
            assert not read.head.weight.requires_grad
            assert not read.states.is_inference()  # autograd of the student may keep it
    for model in (readers.reference, readers.teacher.model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reference_gets_no_gradient_even_if_it_could(make):
    """A model whose parameters somebody has unfrozen."""
    readers, _ = make()
    readers.reference.requires_grad_(True)
    ((own, _),) = readers.read(cut({"anchor": ReferenceKL()}), VOCABULARY)
    assert not own.reference.states.requires_grad
    assert not own.reference.head.weight.requires_grad


@pytest.mark.parametrize("rests", [False, True])
def test_reference_reads_in_the_precision_it_is_given(rests, make):
    readers, _ = make(reference_rests=rests)
    readers.move(CPU, torch.bfloat16)
    ((own, _),) = readers.read(cut({"anchor": ReferenceKL()}), VOCABULARY)
    assert own.reference.states.dtype == own.reference.head.weight.dtype == torch.bfloat16
