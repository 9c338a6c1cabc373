"""What student and teacher say of some prompts before the first step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stable_opd.data import collate
from stable_opd.diagnostics import Diagnostics
from stable_opd.examples import Example
from stable_opd.mixtures.student import student_rows
from stable_opd.models import output_head
from stable_opd.packing import packs
from stable_opd.randomness import global_seed
from stable_opd.rollouts import Writers
from stable_opd.scoring import HiddenStates, Opinion, body, micro_batches
from stable_opd.streaming import opinion, tiles
from stable_opd.teachers import Teacher
from stable_opd.types import NOT_SCORED, Author, Evidence, Plan, Rollout

if TYPE_CHECKING:
    from stable_opd.module import OPDModule

#: Prompts that are answered.
PROMPTS = 8

#: Tokens of an answer, if the budget allows as many.
TOKENS = 128


@dataclass(frozen=True)
class Measured:
    """How student and teacher compare before the first step.

    Attributes:
        tokens: Tokens that the student wrote, over all prompts.
        kl: KL(student || teacher) at a token, in nats, their mean.
        overlap: Share of the likeliest tokens that both have in common, its mean.
        drift: Difference between a token's log-prob by who drew it and by the student's forward pass, its mean size.
        stop_student: Probability of a stop token by the student where golden solutions end, the median; None without
            golden solutions.
        stop_teacher: The same by the teacher.
        stop_teacher_own: The same by the teacher, of the teacher's own stop tokens.
    """

    tokens: int
    kl: float
    overlap: float
    drift: float
    stop_student: float | None
    stop_teacher: float | None
    stop_teacher_own: float | None


@torch.no_grad()
def measure(module: "OPDModule", examples: Sequence[Example], teacher_stop: Sequence[int], room: int) -> Measured:
    """Let the student answer some prompts, and let both read the answers and the golden solutions.

    Args:
        module: Its models are loaded, and where they shall be.
        examples: Some are taken from the start.
        teacher_stop: Token ids that end an answer of the teacher's.
        room: Tokens that a golden solution and its prompt may have.
    """
    module.model.eval()
    prompts = collate(list(enumerate(examples[:PROMPTS])), None)
    budget = min(TOKENS, module.rollout_options.max_new_tokens)
    teacher = module.readers.teacher
    writers = Writers(module.model, module.tokenizer, module.engine, budget, module.stop, columns=teacher.columns)
    plan = student_rows(prompts, 1)
    short = [
        row
        for row, each in enumerate(prompts.golden)
        if each and len(prompts.ids[row]) + len(each) <= room and _fits(teacher, prompts.fields[row], len(each))
    ]
    written = Plan([*plan.prompt, *short], [*plan.author, *[Author.GOLDEN] * len(short)])
    rollout = writers.carry_out(written, prompts, module.sampler, (global_seed(), "doctor"))
    found, drift = Diagnostics(), []
    for part, ours, theirs in _read(module, rollout.select(rollout.written_by(Author.STUDENT))):
        _compare(found, part, ours, theirs)
        drift.append((part.behaviour_logprobs - found["student"][-len(part.row) :]).abs())
    weights = found["stands_for"]
    ends, theirs_ends, own = _endings(module, rollout.select(rollout.written_by(Author.GOLDEN)), teacher_stop)
    return Measured(
        tokens=len(found["student"]),
        kl=float((found["kl"] * weights).sum() / weights.sum()),
        overlap=float((found["overlap"] * weights).sum() / weights.sum()),
        drift=float(torch.cat(drift).mean()),
        stop_student=ends,
        stop_teacher=theirs_ends,
        stop_teacher_own=own,
    )


def _fits(teacher: Teacher, fields: Mapping[str, Any], tokens: int) -> bool:
    """Whether a teacher can score an answer of some tokens."""
    try:
        teacher.check([fields], tokens)
    except ValueError:
        return False
    return True


def _read(module: "OPDModule", rollout: Rollout) -> Iterator[tuple[Rollout, HiddenStates, Opinion]]:
    """Yield some rows at a time, with what student and teacher think of their completion tokens."""
    rows, size = torch.arange(len(rollout), device=rollout.lengths.device), module.update_options.micro_batch_tokens
    teacher, head = module.readers.teacher, output_head(module.model, len(module.tokenizer)).detached()
    with teacher.present():
        for some in teacher.apart(rollout, rows):
            for batch in micro_batches(rollout, some, size, not packs(module.model)):
                part = rollout.select(batch)
                yield part, HiddenStates(body(module.model, part), head), teacher.score(part)


def _compare(found: Diagnostics, part: Rollout, ours: HiddenStates, theirs: Opinion) -> None:
    """Collect what student and teacher say of the tokens of some rows."""
    evidence = Evidence(
        tokens=part.completion,
        row=part.row,
        position=part.position,
        in_loop=torch.zeros_like(part.row, dtype=torch.bool),
        author=part.token_author,
        behaviour_logprobs=part.behaviour_logprobs,
        progress=0.0,
    )
    count = len(part.row)
    with torch.autocast(ours.states.device.type, enabled=False):  # as in the loss
        for tile in tiles(count, ours):
            tokens = evidence.tokens[tile]
            student, teacher = (
                opinion(name, model, tile, tokens) for name, model in (("student", ours), ("teacher", theirs))
            )
            found.add(evidence.seen(tile, student, teacher, NOT_SCORED), tile.start, count)


def _endings(
    module: "OPDModule", golden: Rollout, teacher_stop: Sequence[int]
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Return medians over golden rows of what a stop token has at their ends: by the student, and twice by the teacher.

    The teacher is asked for the student's stop tokens and for its own.
    """
    if not len(golden):
        return None, None, None
    masses: list[Tensor] = []
    for part, ours, theirs in _read(module, golden):
        ends = part.lengths.cumsum(0) - 1
        with torch.autocast(ours.states.device.type, enabled=False):
            last = part.completion[ends]
            p, q = (opinion(name, model, ends, last) for name, model in (("student", ours), ("teacher", theirs)))
            asked = (p, module.stop), (q, module.stop), (q, teacher_stop)
            masses.append(torch.stack([each.mass(tokens, last) for each, tokens in asked]))
    student, teacher, own = torch.cat(masses, -1).median(-1).values.tolist()
    return student, teacher, own
