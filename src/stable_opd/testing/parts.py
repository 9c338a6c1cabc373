"""What samplers, detectors, weightings, mixtures and the small parts have to keep to."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stable_opd.controllers import Controller
from stable_opd.mixtures.base import Mixture
from stable_opd.schedules import Schedule
from stable_opd.terminal import StopRule, TerminalIds
from stable_opd.testing.losses import use as use_term
from stable_opd.testing.scenes import draw, look, make_rollout, prompts, rollouts
from stable_opd.testing.subject import Subject, expect
from stable_opd.types import Author, Plan, Repetition, Rollout

#: What is logged in every step, for schedules that follow a metric.
FIGURES = {"train/truncation_rate": 0.9, "train/repetition_rate": 0.9, "train/grad_norm": 5.0, "train/loss": 1.0}


def logits_to_draw_from() -> dict[str, Tensor]:
    """Return logits of a batch, (B, V) each, by what is special about them."""
    drawn = torch.randn(5, 17, generator=torch.Generator().manual_seed(2))
    ruled_out = drawn.clone()
    ruled_out[:, 1:] = -torch.inf
    return {"ordinary": drawn, "all equal": drawn * 0, "of +-1e4": 1e4 * drawn.sign(), "of one token": ruled_out}


def check_logits(found: Tensor, like: Tensor, name: str) -> None:
    """Check that a token can be drawn from each row of logits."""
    expect(
        found.shape == like.shape and found.is_floating_point(),
        f"Expected logits of shape {tuple(like.shape)}, but got {found.dtype} of {tuple(found.shape)}. Rule tokens out "
        "with -inf instead of leaving them out.",
    )
    expect(
        not found.isnan().any() and not (found == torch.inf).any() and (found > -torch.inf).any(-1).all(),
        f"Expected logits from which a token can be drawn in every row, but got some that are undefined, infinite or "
        f"all -inf from logits that are {name}. Keep at least the likeliest token.",
    )


def sampler(subject: Subject) -> None:
    """Logits to draw from, row by row, without writing into those that came."""
    component = subject.build()
    for width in (0, 6):
        for name, logits in logits_to_draw_from().items():
            prefix = torch.arange(5 * width).reshape(5, width) % 17
            before = logits.clone()
            found = component(logits, prefix).clone()
            expect(
                torch.equal(before, logits),
                "Expected logits that are only read, but got changed ones. Use `masked_fill` and not `masked_fill_`.",
            )
            check_logits(found, logits, name)
            alone = torch.cat([component(logits[row, None], prefix[row, None]) for row in range(5)])
            expect(
                torch.allclose(alone, found, rtol=1e-5, atol=1e-5),
                "Expected each row to be treated by itself, but got other logits for a row alone. Reduce over the last "
                "axis only.",
            )


def request(subject: Subject) -> None:
    """Say the rule in the words of a server, or that a server cannot be told."""
    try:
        found = subject.build().request()
    except ValueError:
        return
    expect(
        isinstance(found, dict) and all(isinstance(key, str) for key in found),
        f"Expected `request` to return a dict of names and values, but got {found!r}. Raise ValueError if a server "
        "cannot be told.",
    )


def detector(subject: Subject) -> None:
    """A mark per token and a flag per row, of each row by itself."""
    component = subject.build()
    for name, rollout in rollouts().items():
        found = component(rollout)
        check_repetition(found, rollout, name)
        for row in range(len(rollout)):
            alone = component(rollout.select(torch.tensor([row])))
            here = rollout.row == row
            expect(
                torch.equal(alone.in_loop, found.in_loop[here])
                and torch.equal(alone.repetitive, found.repetitive[row, None]),
                "Expected a row to be judged by itself, but got other marks beside other rows. Do not look across the "
                "borders of rows: `rollout.row` and `rollout.position` tell them.",
            )


def check_repetition(found: Repetition, rollout: Rollout, name: str) -> None:
    """Check the form of what a detector returns."""
    expect(isinstance(found, Repetition), f"Expected a Repetition, but got a {type(found).__name__}. Return one.")
    for field, tensor, count in (
        ("in_loop", found.in_loop, int(rollout.lengths.sum())),
        ("repetitive", found.repetitive, len(rollout)),
    ):
        expect(
            tensor.shape == (count,) and tensor.dtype == torch.bool,
            f"Expected `{field}` to be bool of shape ({count},) for a rollout with {name}, but got {tensor.dtype} of "
            f"{tuple(tensor.shape)}. There is one mark per completion token and one flag per row.",
        )


def weighting(subject: Subject) -> None:
    """A finite weight of at least 0 per token, from what was declared."""
    component = subject.build()
    for name, rollout in rollouts().items():
        found = component(look(rollout, component.needs_scores))
        count = int(rollout.lengths.sum())
        expect(
            found.shape == (count,) and found.is_floating_point(),
            f"Expected one weight per completion token, ({count},), for a rollout with {name}, but got {found.dtype} "
            f"of {tuple(found.shape)}. Tokens of others than the student need one too; it does not matter.",
        )
        expect(
            found.isfinite().all() and (found >= 0).all() and not found.requires_grad,
            "Expected finite weights of at least 0 without a gradient, but got others. A weight of 0 takes a token out "
            "of the mean.",
        )


def plan(subject: Subject) -> None:
    """A plan whose rows exist, the same for the same step."""
    batch, component = prompts(), subject.build()
    allowed = {Author.STUDENT, *component.authors}
    for samples in (0, 2):
        for step, progress in ((0, 0.0), (1, 0.5), (7, 1.0)):
            found, again = (copy.deepcopy(component).plan(batch, samples, progress, step) for _ in range(2))
            check_plan(found, len(batch))
            strange = {Author(each).name for each in found.author if each not in allowed}
            expect(
                not strange,
                "Expected rows of the student and of those in `authors`, but got rows of "
                f"{', '.join(sorted(strange))}. Declare them, because the loss is called on their tokens.",
            )
            expect(
                found == again,
                "Expected the same plan for the same step, but got two. Key random choices by the step "
                "(`stable_opd.randomness`), so that a run can be resumed.",
            )


def check_plan(found: Plan, count: int) -> None:
    """Check the form of a plan."""
    expect(
        isinstance(found, Plan) and len(found.prompt) == len(found.author),
        f"Expected a Plan with one author per row, but got {found!r}. Return one entry per row.",
    )
    expect(
        all(0 <= prompt < count for prompt in found.prompt) and found.prefix >= 0,
        f"Expected prompts from 0 to {count - 1} and a prefix of at least 0, but got {found.prompt} and "
        f"{found.prefix}. A prompt is named by its place in the batch.",
    )


def blend(subject: Subject) -> None:
    """Where the teacher has a say in every token, a token can be drawn."""
    component = subject.build()
    if not component.blends:
        return
    for name, student in logits_to_draw_from().items():
        teacher = 3 * torch.randn(student.shape, generator=torch.Generator().manual_seed(8))
        before = student.clone(), teacher.clone()
        for progress in (0.0, 0.5, 1.0):
            check_logits(component.blend(student, teacher, progress), student, name)
        expect(
            torch.equal(student, before[0]) and torch.equal(teacher, before[1]),
            "Expected logits that are only read, but got changed ones. Do not work in place.",
        )


def revise(subject: Subject) -> None:
    """The rollout to learn from has the rows that were written, and perhaps rows of the past behind them."""
    component = subject.build()
    for step in range(4):
        written = make_rollout([[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]])
        found = component.revise(written, step)
        kept = found.select(torch.arange(len(written))) if len(found) >= len(written) else found
        expect(
            torch.equal(kept.tokens, written.tokens) and torch.equal(kept.author, written.author),
            "Expected the rows that were written, in their order, but got others. Add rows after them.",
        )
        expect(
            bool((found.author[len(written) :] == Author.PAST).all()) and len(found.texts) == len(found),
            "Expected rows of the author PAST after those that were written, each with its text, but got others. Mark "
            "them, so that they are not taken for this step's.",
        )


def schedule(subject: Subject) -> None:
    """A finite number at the beginning, in the middle and at the end."""
    component = subject.build()
    for progress in (0.0, 0.5, 1.0):
        found = component(progress)
        expect(
            isinstance(found, int | float) and math.isfinite(found),
            f"Expected a finite float at a progress of {progress}, but got {found!r}. Return a Python number.",
        )


def controller(subject: Subject) -> None:
    """A factor that stays positive and finite, whatever the value is."""
    component = subject.build()
    for raises_value in (False, True):
        for value in (component.target, 0.0, 1e30, math.nan, math.inf, -1.0, 1e-30, 1e30):
            for _ in range(30):
                component.update(value, raises_value)
            expect(
                math.isfinite(component.factor) and component.factor > 0,
                f"Expected a factor above 0, but got {component.factor} after values of {value}. Bound how far a step "
                "may go.",
            )


def transform(subject: Subject) -> None:
    """A finite number for each advantage, by itself."""
    component = subject.build()
    advantage = torch.cat([torch.randn(20, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 2e4, -2e4])])
    before = advantage.clone()
    found = component(advantage)
    expect(
        found.shape == advantage.shape and bool(found.isfinite().all()),
        f"Expected finite advantages of shape {tuple(advantage.shape)}, but got {tuple(found.shape)}. Work entry by "
        "entry.",
    )
    alone = torch.cat([component(each) for each in advantage.split(1)])
    expect(
        torch.allclose(alone, found) and torch.equal(before, advantage),
        "Expected each advantage to be transformed by itself and left as it was, but got something else. Use no mean "
        "over the batch: it can turn a sign.",
    )


def baseline(subject: Subject) -> None:
    """A finite number per position, of each position by itself."""
    component = subject.build()
    logprobs = draw().logits.log_softmax(-1)

    def worth(student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        return teacher - student if reference is None else teacher - student + 0.25 * (teacher - reference)

    for models in ((*logprobs[:2], None), tuple(logprobs)):
        found = component(worth, *models)
        expect(
            found.shape == logprobs.shape[1:2] and bool(found.isfinite().all()),
            f"Expected one finite number per position, ({logprobs.shape[1]},), but got {tuple(found.shape)}. Reduce "
            "over the vocabulary.",
        )
        alone = component(worth, *(None if each is None else each[:1] for each in models))
        expect(
            torch.allclose(alone, found[:1]),
            "Expected each position by itself, but got another number beside others. Reduce over the last axis only.",
        )


def reference(subject: Subject) -> None:
    """The reference is changed in place, and the student is not."""
    component = subject.build()
    torch_state = torch.random.get_rng_state()
    initial, student = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.random.set_rng_state(torch_state)
    before = [each.detach().clone() for model in (initial, student) for each in model.parameters()]
    for step in range(1, 4):
        component.update(initial, student, step)
    after = [each.detach() for model in (initial, student) for each in model.parameters()]
    expect(
        all(each.isfinite().all() for each in after) and all(map(torch.equal, before[2:], after[2:])),
        "Expected finite weights and a student that is left alone, but got something else. Change the reference in "
        "place, without a gradient.",
    )
    expect(
        component.moves or all(map(torch.equal, before, after)),
        "Expected a reference that stays, but got other weights. Declare moves = True, so that checkpoints hold it.",
    )


def terminal(subject: Subject) -> None:
    """The student's own stop token ends a row, and what is read are still distributions."""
    component = subject.build()
    logprobs = draw().logits[0].log_softmax(-1)
    for ids in (TerminalIds((3,), (5,), 3), TerminalIds((3,), (5, 3), 3), TerminalIds((2, 3), (5, 7, 3), 3)):
        found = component.rule(ids)
        expect(
            isinstance(found, StopRule) and ids.own in found.stop,
            f"Expected a StopRule by which {ids.own} ends a row, as it ends golden solutions, but got {found!r}.",
        )
        for event in (found.student, found.teacher):
            if event is None:
                continue
            read, drawn = event.read_(logprobs.clone()), event.merged(logprobs).softmax(-1)
            expect(
                bool(read.isfinite().all()) and torch.allclose(read.exp().sum(-1), drawn.sum(-1), atol=1e-6),
                "Expected finite log-probs whose probabilities add up to 1, but got others. Give tokens that cannot "
                "occur a log-prob of NEVER.",
            )
    expect(
        component.rule(TerminalIds((3,), (3,), 3)).student is None,
        "Expected nothing to be read otherwise where both models end with one token, but got an event.",
    )


def task(subject: Subject) -> None:
    """A grade from 0 to 1 for any text."""
    component = subject.build()
    for text in ("", "nonsense", "#### 7", "7"):
        found = component.grade(text, {"answer": "7"})
        expect(
            isinstance(found, float | int) and 0 <= found <= 1,
            f"Expected a grade from 0.0 to 1.0 for {text!r}, but got {found!r}. Grade what cannot be read with 0.0.",
        )


def use_mixture(component: Mixture) -> None:
    """Let a mixture take part in two steps."""
    use_term(component)
    for step in range(2):
        component.plan(prompts(), 2, 0.5, step)
        component.revise(make_rollout([[5, 6, 7], [8]]), step)


def use_constraint(component: Any) -> None:
    """Let a constraint take part in a step."""
    use_term(component)
    component.adapt(torch.tensor(0.3))


def use_schedule(component: Schedule) -> None:
    """Let a schedule see some steps."""
    for _ in range(5):
        component.observe(FIGURES)


def use_controller(component: Controller) -> None:
    """Let a controller see some values."""
    for value in (3.0, 0.1):
        component.update(value)


def use_weighting(component: Any) -> None:
    """Let a weighting look at a batch."""
    component(look(rollouts()["loops beside regular rows"], component.needs_scores))


#: How a component of each kind is used before it is copied and saved.
USE: dict[str, Callable[[Any], object]] = {
    "divergence": use_term,
    "constraint": use_constraint,
    "mixture": use_mixture,
    "schedule": use_schedule,
    "controller": use_controller,
    "weighting": use_weighting,
}
