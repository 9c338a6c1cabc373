"""The models that read the rows and do not learn from them: the teacher, and the initial student."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from stable_opd.models import frozen_copy, output_head
from stable_opd.objective import Group, Piece, Reading
from stable_opd.offload import visiting
from stable_opd.scoring import HiddenStates, Opinion, body
from stable_opd.sharding import inside, is_sharded
from stable_opd.students import adapters_off
from stable_opd.teachers.base import Teacher
from stable_opd.terminal import SEPARATE, StopRule
from stable_opd.types import Rollout


class Readers:
    """Who reads the rows; a plain object, because a module would be trained and checkpointed.

    What they hand over are hidden states, which are a small part of the logits. So a model that rests in the host's
    memory reads all micro-batches in one go, and leaves before the student learns.

    Args:
        teacher: Scores the rows that a term needs it for.
        offload_reference: Let the initial student rest in the host's memory while it does not read.
    """

    def __init__(self, teacher: Teacher, offload_reference: bool = False) -> None:
        self.teacher = teacher
        self.reference: PreTrainedModel | None = None
        #: The student, where it is the reference itself once its adapters are off.
        self.adapted: PreTrainedModel | None = None
        self.offload_reference = offload_reference
        self._device = torch.device("cpu")

    def keep_reference(self, student: PreTrainedModel, adapted: bool) -> None:
        """Have a reference that is the student as it is now, unless there is one already.

        Args:
            student: The model that learns.
            adapted: Whether only its adapters do; then it takes no copy.
        """
        if adapted:
            self.adapted = student
        elif self.reference is None:
            self.reference = frozen_copy(student)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Let the reference read on a device, in a precision."""
        self._device = device
        if self.reference is not None:
            nn.Module.to(self.reference, "cpu" if self.offload_reference else device, dtype)

    def shard(self, spread: Callable[[PreTrainedModel], None], teacher: bool) -> None:
        """Spread the models over processes.

        Args:
            spread: Does it to a model, in place.
            teacher: Whether to do it to the teacher too. One that writes has to be whole, as a process cannot wait for
                the others in the middle of an answer.
        """
        if self.reference is not None:
            spread(self.reference)
        if teacher:
            self.teacher.shard(spread)

    def read(self, work: Sequence[Piece], vocabulary: int, rule: StopRule = SEPARATE) -> Iterator[list[Reading]]:
        """Read micro-batches.

        Args:
            work: The micro-batches.
            vocabulary: Size of the shared vocabulary.
            rule: Which terminal ids their log-probs have as one.

        Yields:
            For each micro-batch, what they think of its groups.
        """
        if not (self.teacher.offload or self.offload_reference):
            for piece in work:
                yield self._read(piece, vocabulary, rule)
            return
        initial = self.reference if self.offload_reference else None
        with self.teacher.present(), nullcontext() if initial is None else visiting(initial, self._device):
            everything = [self._read(piece, vocabulary, rule) for piece in work]
        yield from everything

    def readings(self, piece: Piece) -> tuple[int, int]:
        """Return how often teacher and reference would read a micro-batch, as far as processes have to agree."""
        asked = [[needs(group) for group in piece.groups] for needs in (_needs_teacher, _needs_reference)]
        waiting = self.teacher.sharded, self.reference is not None and is_sharded(self.reference)
        teacher, reference = (sum(each) if waits else 0 for each, waits in zip(asked, waiting, strict=True))
        return teacher, reference

    def _read(self, piece: Piece, vocabulary: int, rule: StopRule) -> list[Reading]:
        """Let those models read the groups that a term needs; where others wait for that, also a row for nothing."""
        own = self.readings(piece)
        idle = [max(0, asked - mine) for asked, mine in zip(piece.readings, own, strict=True)]
        short = piece.rollout.select(piece.rollout.lengths.argmin()[None]) if any(idle) else piece.rollout
        theirs = [self._teacher(group.rollout, rule) if _needs_teacher(group) else None for group in piece.groups]
        for _ in range(idle[0]):
            self._teacher(short, rule)
        initial = [
            self._initial(group.rollout, vocabulary, rule) if _needs_reference(group) else None
            for group in piece.groups
        ]
        for _ in range(idle[1]):
            self._initial(short, vocabulary, rule)
        return [Reading(*each) for each in zip(theirs, initial, strict=True)]

    def _teacher(self, rollout: Rollout, rule: StopRule) -> Opinion:
        return replace(self.teacher.score(rollout), event=rule.teacher)

    def _initial(self, rollout: Rollout, vocabulary: int, rule: StopRule) -> HiddenStates | None:
        """Let the reference read, if there is one."""
        reference = self.adapted if self.reference is None else self.reference
        if reference is None:
            return None

        def read() -> HiddenStates:
            return HiddenStates(body(reference, rollout), output_head(reference, vocabulary).detached(), rule.student)

        with torch.no_grad(), nullcontext() if self.adapted is None else adapters_off(self.adapted):
            return inside(reference, read)


def _needs_teacher(group: Group) -> bool:
    return any(term.needs_teacher for term in group.terms.values())


def _needs_reference(group: Group) -> bool:
    return any(term.needs_reference for term in group.terms.values())
