"""The student as its own teacher."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.models import context_length, output_head, stop_ids
from stable_opd.scoring import HiddenStates, body
from stable_opd.teachers.base import Teacher
from stable_opd.types import Rollout


class SelfTeacher(Teacher):
    """The student as it is now, in evaluation mode; it takes no memory of its own, and no gradient flows into it.

    By itself it agrees with the student, so it belongs into a `PrivilegedTeacher`, whose prompt tells it more. It moves
    with the student; the initial student is a `LocalTeacher` with the student's path.

    Source: the self-teacher of SDPO (arXiv 2601.20802).
    """

    reads_by_student = True

    def __init__(self) -> None:
        self._student: PreTrainedModel | None = None
        self._vocabulary = 0
        self._stop_ids: tuple[int, ...] = ()

    @property
    def student(self) -> PreTrainedModel:
        """The model that learns."""
        if self._student is None:
            raise RuntimeError("The student was asked for scores before its teacher was told who it is by `meet`.")
        return self._student

    @property
    def context_length(self) -> int | None:
        """How many tokens the student can read."""
        return context_length(self.student)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The student's."""
        return self._stop_ids

    def meet(self, student: PreTrainedModel, tokens: Callable[[str], list[int]]) -> None:
        """Get to know the student."""
        self._student = student

    def setup(self, student: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Take over what ends the student's answers; the student itself is where it has to be."""
        self._vocabulary = len(tokenizer)
        self._stop_ids = tuple(stop_ids(self.student, tokenizer))

    @torch.no_grad()
    def score(self, rollout: Rollout) -> HiddenStates:
        """Read some rows and return the hidden states from which their completion tokens are predicted."""
        learning = self.student.training
        self.student.eval()
        try:
            states = body(self.student, rollout)
        finally:
            self.student.train(learning)
        return HiddenStates(states, output_head(self.student, self._vocabulary).detached())
