"""A first look at the student's tokens, before the loss: what weights may depend on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.divergences.kl import expectation
from stable_opd.models import Head, output_head
from stable_opd.objective import Group, Piece, Reading
from stable_opd.scoring import HiddenStates, body
from stable_opd.sharding import inside, reshard
from stable_opd.streaming import opinion, scores, tiles
from stable_opd.terminal import StopEvent
from stable_opd.types import Author, Repetition, Rollout


@dataclass(frozen=True)
class Glance:
    """What the models say of each completion token; 0 where the student did not write, (N,) each.

    Attributes:
        student: Log-prob under the student.
        teacher: Log-prob under the teacher.
        entropy: Entropy of the student's distribution, in nats.
        divergence: KL(student || teacher) at the position, in nats.
    """

    student: Tensor
    teacher: Tensor
    entropy: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class Look:
    """What a `Weighting` sees: the whole batch of this process, before the loss.

    Attributes:
        rollout: The rows.
        repetition: What the detector said of them.
        progress: Share of the training that is over, from 0 to 1.
        own: The tokens that the student wrote, (N,) bool; weights of the others do not matter.
        gather: Puts the values of all processes one after the other, (n,) -> (m,). Every process has to call it equally
            often, also one that has no token.
        glance: What the models say, for weightings that declare ``needs_scores``.
    """

    rollout: Rollout
    repetition: Repetition
    progress: float
    own: Tensor
    gather: Callable[[Tensor], Tensor]
    glance: Glance | None = None

    @cached_property
    def scores(self) -> Glance:
        """What the models say.

        Raises:
            ValueError: If they were not asked.
        """
        if self.glance is None:
            raise ValueError("The models were not asked. Declare needs_scores = True in the weighting's class.")
        return self.glance


def glance(
    work: Iterable[Piece],
    readings: Iterable[Sequence[Reading]],
    student: PreTrainedModel,
    vocabulary: int,
    count: int,
    event: StopEvent | None = None,
) -> Glance:
    """Let the student read all micro-batches without a gradient, and compare it with the teacher.

    It reads as it writes, without dropout, so that the weights are no matter of chance.

    Args:
        work: The micro-batches.
        readings: What the teacher said of each.
        student: The model that learns.
        vocabulary: Size of the shared vocabulary.
        count: Completion tokens N of the rollout.
        event: The terminal ids that the student's log-probs have as one.

    Raises:
        ValueError: If the teacher did not read what the student wrote.
    """
    found = torch.zeros(4, count, dtype=torch.float32, device=student.device)  # whatever the default is
    for group, reading, ours in read_again(work, readings, student, vocabulary, event):
        if group.on_policy:
            found[:, group.places] = _seen(group, reading, ours)
    return Glance(*found)


@torch.no_grad()
def read_again(
    work: Iterable[Piece],
    readings: Iterable[Sequence[Reading]],
    student: PreTrainedModel,
    vocabulary: int,
    event: StopEvent | None = None,
) -> Iterator[tuple[Group, Reading, HiddenStates]]:
    """Let the student read all micro-batches without a gradient, in evaluation mode; sharded, on all processes.

    Args:
        work: The micro-batches.
        readings: What the models that do not learn said of each.
        student: The model that learns.
        vocabulary: Size of the shared vocabulary.
        event: The terminal ids that the student's log-probs have as one.

    Yields:
        Each group, with what the others and the student think of its positions.
    """
    learning = student.training
    student.eval()
    head = inside(student, partial(_head, student, vocabulary))  # it stays gathered, if it has to be
    for piece, answers in zip(work, readings, strict=True):
        states, start = inside(student, partial(body, student, piece.rollout)), 0
        for group, reading in zip(piece.groups, answers, strict=True):
            yield group, reading, HiddenStates(states[start : start + len(group.places)], head, event)
            start += len(group.places)
    student.train(learning)
    reshard(student)


@torch.no_grad()
def _seen(group: Group, reading: Reading, ours: HiddenStates) -> Tensor:
    """Return what `Glance` holds of a group's tokens, (4, n)."""
    theirs = reading.teacher
    if theirs is None:
        raise ValueError(
            "Expected a divergence that asks the teacher, because a weighting compares the student with it, but got "
            "none. Choose one that declares needs_teacher = True, or leave the weighting out."
        )
    found = torch.zeros(4, len(group.places), dtype=torch.float32, device=ours.states.device)
    # As in the loss: precision is decided by the dtypes that arrive.
    with torch.autocast(ours.states.device.type, enabled=False):
        for tile in tiles(len(group.places), ours):
            tokens = group.evidence.tokens[tile]
            p = scores("student", ours, tile, tokens)[0]
            q = opinion("teacher", theirs, tile, tokens)
            entropy = -expectation(p.probs, p.logprobs)
            gap = torch.sub(p.logprobs, q.logprobs, out=q.logprobs)  # memory of the tile, not needed any more
            found[:, tile] = torch.stack([p.sampled, q.sampled, entropy, expectation(p.probs, gap)])
    return found.where(group.evidence.written_by(Author.STUDENT), 0)


def _head(student: PreTrainedModel, vocabulary: int) -> Head:
    """Return the student's head without gradients, in the precision in which the loss reads it."""
    head = output_head(student, vocabulary).detached()
    if student.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return head
    return replace(head, weight=head.weight.to(torch.get_autocast_dtype("cuda")))
