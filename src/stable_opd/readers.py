"""The models that read the rows and do not learn from them: the teacher, and the initial student."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from stable_opd.models import frozen_copy, output_head
from stable_opd.objective import Group, Piece, Reading
from stable_opd.offload import visiting
from stable_opd.scoring import HiddenStates, body
from stable_opd.students import adapters_off
from stable_opd.teachers.base import Teacher
from stable_opd.terminal import SEPARATE, StopRule


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
                yield [self._read(group, vocabulary, rule) for group in piece.groups]
            return
        initial = self.reference if self.offload_reference else None
        with self.teacher.present(), nullcontext() if initial is None else visiting(initial, self._device):
            everything = [[self._read(group, vocabulary, rule) for group in piece.groups] for piece in work]
        yield from everything

    def _read(self, group: Group, vocabulary: int, rule: StopRule) -> Reading:
        """Let those models read some rows that a term needs."""
        needs_teacher = any(term.needs_teacher for term in group.terms.values())
        theirs = replace(self.teacher.score(group.rollout), event=rule.teacher) if needs_teacher else None
        reference = self.adapted if self.reference is None else self.reference
        if reference is None or not any(term.needs_reference for term in group.terms.values()):
            return Reading(theirs)
        with torch.no_grad(), nullcontext() if self.adapted is None else adapters_off(self.adapted):
            head = output_head(reference, vocabulary).detached()
            initial = HiddenStates(body(reference, group.rollout), head, rule.student)
        return Reading(theirs, initial)
