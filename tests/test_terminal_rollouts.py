"""Rows that are written under a terminal policy, and what the models then say of them."""

from contextlib import nullcontext

import pytest
import torch

from helpers import EOS, TOKENIZER, VOCABULARY, make_rollout, tiny_model
from stable_opd import Author, InProcessEngine, Plan, Prompts, ReverseKL, Temperature, TopP, TransformersEngine
from stable_opd.engines.base import Blend
from stable_opd.look import glance
from stable_opd.mixtures import mixed
from stable_opd.models import output_head
from stable_opd.objective import Cutting, Objective, evaluate, pieces
from stable_opd.readers import Readers
from stable_opd.rollouts import Writers
from stable_opd.scoring import HiddenStates
from stable_opd.scoring import body as body_of
from stable_opd.terminal import Canonical, SemanticClass, TeacherMap, TerminalIds, TwoStop
from stable_opd.types import Repetition

PROMPTS = Prompts(
    ids=[[12, 3, 13], [12, 1], [12, 7, 10, 2]],
    golden=[[1, 2, EOS], [5, EOS], [4, 5, 6, EOS]],
    index=[40, 50, 60],
    fields=[{}] * 3,
)
OTHERS = (4, 9)
PAIR = TerminalIds((EOS,), OTHERS, EOS)
BOTH = (SemanticClass(), Canonical())
NAMES = [type(policy).__name__ for policy in BOTH]


class ReadyTeacher:
    """A teacher in this process that has nothing to load."""

    offload = sharded = False
    language_model = tiny_model(2)

    def present(self):
        return nullcontext()

    def score(self, rollout):
        with torch.no_grad():
            return HiddenStates(body_of(self.language_model, rollout), output_head(self.language_model).detached())


def write(rule, engine, sampler=None, author=Author.STUDENT, blend=None):
    teacher = None if blend else ReadyTeacher()
    writers = Writers(tiny_model(1), TOKENIZER, engine, 8, rule.stop, teacher, rule)
    plan = Plan([0, 1, 2] * 20, [author] * 60)
    return writers.carry_out(plan, PROMPTS, sampler or Temperature(1.0), (0, 7), blend)


def read_by_hand(model, rollout, ids, adds):
    """Log-prob of each completion token of a rollout, row by row, with some ids as one or ruled out."""
    found = []
    for row in range(len(rollout)):
        text = rollout.select(torch.tensor([row]))
        with torch.no_grad():
            logits = model(text.tokens[None]).logits[0, int(text.prompt_lengths) - 1 : -1].double()
        written = text.completion.where(~torch.isin(text.completion, torch.tensor(ids)), EOS)
        if adds:
            logits[:, EOS] = logits[:, [EOS, *ids]].logsumexp(-1)
        logits[:, list(ids)] = -torch.inf
        found.append(logits.log_softmax(-1).gather(-1, written[:, None]).squeeze(-1))
    return torch.cat(found).float()


@pytest.mark.parametrize("engine", [InProcessEngine(), TransformersEngine()], ids=["in process", "transformers"])
@pytest.mark.parametrize("policy", BOTH, ids=NAMES)
def test_behaviour_is_that_of_the_event(policy, engine):
    """So the importance ratio of a fresh rollout is 1."""
    rollout = write(policy.rule(PAIR), engine)
    assert not torch.isin(rollout.completion, torch.tensor(OTHERS)).any()
    assert 0.1 < (rollout.completion == EOS).sum() / len(rollout) <= 1
    expected = read_by_hand(tiny_model(1), rollout, OTHERS, isinstance(policy, SemanticClass))
    torch.testing.assert_close(rollout.behaviour_logprobs, expected, rtol=0, atol=1e-4)


def test_any_id_ends_a_row_of_two_stops_and_is_kept():
    rollout = write(TwoStop().rule(PAIR), InProcessEngine())
    last = rollout.completion[rollout.lengths.cumsum(0) - 1]
    assert set(last[~rollout.truncated].tolist()) == {EOS, *OTHERS}


def test_student_is_kept_from_ids_before_the_sampler_looks():
    """A sampler that would keep nothing but such an id has another token to keep."""
    rollout = write(Canonical().rule(PAIR), InProcessEngine(), TopP(0.01))
    assert rollout.behaviour_logprobs.isfinite().all()
    assert not torch.isin(rollout.completion, torch.tensor(OTHERS)).any()


@pytest.mark.parametrize("policy", [SemanticClass(), TeacherMap(), Canonical()], ids=lambda each: type(each).__name__)
def test_teacher_ends_its_rows_as_the_student_does(policy):
    rollout = write(policy.rule(PAIR), InProcessEngine(), author=Author.TEACHER)
    assert (rollout.completion == EOS).sum() > 3
    expected = read_by_hand(tiny_model(2), rollout, OTHERS, True)
    torch.testing.assert_close(rollout.behaviour_logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", [InProcessEngine(), TransformersEngine()], ids=["in process", "transformers"])
def test_teacher_has_its_say_about_the_event(engine):
    """Both distributions of a mixture have the stop as one token."""
    rule = SemanticClass().rule(PAIR)
    blend = Blend(tiny_model(2), lambda ours, theirs: mixed(ours, theirs, 0.5), rule.teacher)
    rollout = write(rule, engine, blend=blend)
    own, theirs = (read_by_hand(tiny_model(seed), rollout, OTHERS, True).exp() for seed in (1, 2))
    torch.testing.assert_close(rollout.behaviour_logprobs.exp(), (own + theirs) / 2, rtol=1e-3, atol=1e-5)
    assert not torch.isin(rollout.completion, torch.tensor(OTHERS)).any()


@pytest.mark.parametrize("policy", BOTH, ids=NAMES)
def test_first_look_and_loss_read_the_event(policy):
    """Text that was not drawn from the student may have another id; it counts as the event."""
    rollout = make_rollout([[5, 6, EOS], [7, 9], [3, 2, 11]], [[12, 3], [12], [12, 1]])
    repetition = Repetition(torch.zeros(8, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    objective, rule, model = Objective({"divergence": ReverseKL()}, {}), policy.rule(PAIR), tiny_model(1)
    work = list(pieces(rollout, repetition, objective, Cutting(10**6, stop=PAIR.union, event=rule.student)))
    readings = list(Readers(ReadyTeacher()).read(work, VOCABULARY, rule))
    seen = glance(work, readings, model, VOCABULARY, 8, rule.student)
    shares = {"divergence": torch.full((8,), 1 / 8)}
    result = evaluate(work[0], readings[0], shares, model, VOCABULARY, event=rule.student)
    places = work[0].groups[0].places
    ours = read_by_hand(model, rollout, OTHERS, isinstance(policy, SemanticClass))
    theirs = read_by_hand(tiny_model(2), rollout, OTHERS, True)
    for name, expected in (("student", ours), ("teacher", theirs)):
        torch.testing.assert_close(getattr(seen, name), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.diagnostics[name], expected[places], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.values["divergence"], seen.divergence.mean())
