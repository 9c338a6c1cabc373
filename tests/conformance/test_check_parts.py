"""Each check of the other kinds finds what it is there for."""

import math

import pytest
import torch

from conformance.wrong import DOCUMENTED, fails, failures, own
from stable_opd import (
    Author,
    Mixture,
    Plan,
    Repetition,
    RepetitionDetector,
    Sampler,
    Schedule,
    StudentOnly,
    Task,
    TokenLoss,
)
from stable_opd.controllers import Controller
from stable_opd.divergences.baselines import AdvantageBaseline
from stable_opd.divergences.transforms import AdvantageTransform
from stable_opd.references import Reference
from stable_opd.testing import check_component
from stable_opd.weightings.base import Weighting


def sampler(function, **declared):
    body = {"forward": lambda self, logits, prefix: function(logits, prefix), "__doc__": DOCUMENTED, **declared}
    return type("Made", (Sampler,), body | {"__qualname__": "sampler.<locals>.Sampler"})


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda logits, _: logits[:, :-1], "logits of shape"),
        (lambda logits, _: logits - logits.amax() * math.inf, "token can be drawn"),
        (lambda logits, _: logits.masked_fill(logits < 2.9, -math.inf), "token can be drawn"),
        (lambda logits, _: logits.mul_(0.5), "only read"),
        (lambda logits, _: logits / (1 + logits.clamp(min=-1).mean().square()), "row to be treated by itself"),
    ],
    ids=["shape", "undefined", "nothing left", "in place", "rows"],
)
def test_sampler(found, match):
    fails(sampler(found), "logits", match)


def test_request():
    check_component(sampler(lambda logits, _: logits, request=lambda self: {"top_p": 1.0}))
    fails(sampler(lambda logits, _: logits, request=lambda self: ["top_p"]), "request", "Expected `request`")


def detector(function):
    body = {"forward": lambda self, rollout: function(rollout), "__doc__": DOCUMENTED}
    return type("Made", (RepetitionDetector,), body | {"__qualname__": "detector.<locals>.Detector"})


def row_flags(rollout):
    return torch.zeros(len(rollout), dtype=torch.bool)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda r: Repetition(torch.zeros(len(r.tokens), dtype=torch.bool), row_flags(r)), "`in_loop` to be bool"),
        (lambda r: Repetition(r.completion == 7, row_flags(r).float()), "`repetitive` to be bool"),
        (lambda r: (r.completion == 7, row_flags(r)), "Expected a Repetition"),
        (lambda r: Repetition(r.completion == r.completion.roll(1), row_flags(r)), "judged by itself"),
        (lambda r: Repetition(r.completion.clamp(max=r.completion.max()) < 0, row_flags(r)), "RuntimeError"),
    ],
    ids=["prompts marked", "float flags", "tuple", "across rows", "empty"],
)
def test_detector(found, match):
    fails(detector(found), "marks", match)


def weighting(function):
    body = {"forward": lambda self, look: function(look), "__doc__": DOCUMENTED}
    return type("Made", (Weighting,), body | {"__qualname__": "weighting.<locals>.Weighting"})


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda look: look.rollout.position - 1.0, "at least 0"),
        (lambda look: look.rollout.position > 0, "one weight per completion token"),
        (lambda look: look.rollout.lengths.float(), "one weight per completion token"),
        (lambda look: look.rollout.position / look.rollout.position * 1.0, "finite weights"),
    ],
    ids=["negative", "bool", "per row", "undefined"],
)
def test_weighting(found, match):
    fails(weighting(found), "weights", match)


def test_weighting_that_reads_scores_has_to_declare_it():
    assert "needs_scores = True" in failures(weighting(lambda look: look.scores.entropy))["weights"]


def mixture(**declared):
    return type("Made", (StudentOnly,), {"__doc__": DOCUMENTED, "__qualname__": "m.<locals>.M", **declared})


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (lambda *_: Plan([3], [Author.STUDENT]), "prompts from 0 to 2"),
        (lambda *_: Plan([0, 1], [Author.STUDENT]), "one author per row"),
        (lambda *_: Plan([0], [Author.TEACHER]), "but got rows of TEACHER"),
        (lambda *_: Plan([int(torch.randint(3, ())) for _ in range(9)], [Author.STUDENT] * 9), "same plan"),
    ],
    ids=["prompt", "lengths", "author", "chance"],
)
def test_plan(plan, match):
    fails(mixture(plan=plan), "plan", match)


def test_blend():
    fails(mixture(blends=True), "blend", "NotImplementedError.*does not define `blend`")
    fails(mixture(blends=True, blend=lambda _, p, q, progress: p.add_(1)), "blend", "only read")
    fails(mixture(blends=True, blend=lambda _, p, q, progress: p.exp().log() * 0), "blend", "token can be drawn")


def _twice(rollout):
    return torch.arange(len(rollout)).repeat(2)


def test_revise():
    fails(mixture(revise=lambda self, rollout, step: rollout.select(torch.tensor([0]))), "revise", "were written")
    fails(mixture(revise=lambda self, rollout, step: rollout.select(_twice(rollout))), "revise", "author PAST")


def test_mixture_is_a_loss_term_too():
    class Silent(Mixture):
        def plan(self, prompts, samples, progress, step):
            return Plan([], [])

        def forward(self, evidence):
            return TokenLoss(evidence.student.logprobs[:, 0], evidence.behaviour_logprobs, ~own(evidence))

    assert "shapes" in failures(Silent)


def small(base, **methods):
    return type("Made", (base,), {"__doc__": DOCUMENTED, "__qualname__": "small.<locals>.Small", **methods})


@pytest.mark.parametrize(
    ("cls", "check", "match"),
    [
        (small(Schedule, forward=lambda self, progress: torch.ones(2)), "factor", "finite float"),
        (
            small(Schedule, forward=lambda self, progress: math.inf if progress == 1 else 1.0),
            "factor",
            "progress of 1.0",
        ),
        (small(AdvantageTransform, __call__=lambda self, a: (a - a.mean()) / 2), "advantages", "by itself"),
        (small(AdvantageTransform, __call__=lambda self, a: a.clamp_(-1, 1)), "advantages", "left as it was"),
        (small(AdvantageTransform, __call__=lambda self, a: a.exp()), "advantages", "finite"),
        (small(AdvantageBaseline, __call__=lambda self, worth, *models: worth(*models)), "baseline", "per position"),
        (
            small(AdvantageBaseline, __call__=lambda self, worth, *models: worth(*models).mean() * models[0][:, 0]),
            "baseline",
            "position by itself",
        ),
        (small(Task, grade=lambda self, completion, fields: len(completion)), "grade", "from 0.0 to 1.0"),
        (small(Task, grade=lambda self, completion, fields: int(completion) / 9), "grade", "ValueError"),
    ],
)
def test_small_parts(cls, check, match):
    fails(cls, check, match)


@torch.no_grad()
def copy_over(self, reference, student, step):
    reference.weight.copy_(student.weight)


@torch.no_grad()
def write_back(self, reference, student, step):
    student.weight.copy_(reference.weight)


def test_reference():
    fails(small(Reference, update=copy_over), "update", "moves = True")
    check_component(small(Reference, update=copy_over, moves=True))
    fails(small(Reference, update=write_back, moves=True), "update", "left alone")


def test_controller():
    class Runaway(Controller):
        """Goes down without end.

        Source: of the tests.
        """

        def __init__(self):
            super().__init__(0.05)

        def update(self, value, raises_value=False):
            self.factor -= 1

        def next_factor(self, error):
            return self.factor

    fails(Runaway, "factor", "factor above 0")
