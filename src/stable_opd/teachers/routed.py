"""Several teachers, each for a part of the data."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.scoring import Opinion
from stable_opd.teachers.base import Teacher
from stable_opd.teachers.visits import Visits
from stable_opd.terms import SUPPORTS
from stable_opd.types import Rollout


class RoutedTeacher(Teacher):
    """Several teachers, each of whom scores the rows whose example names it.

    A micro-batch is read by one of them, so every row is scored by its own teacher alone. They tell what the one with
    the least to tell does, and an answer ends where any of them would end it. Those that rest in the host's memory come
    one after the other.

    Args:
        teachers: By name.
        column: Field of the examples that names the teacher of each.
    """

    def __init__(self, teachers: dict[str, Teacher], column: str) -> None:
        if not teachers:
            raise ValueError("Expected some teachers, but got none. Name them in model.teacher.teachers.")
        self.teachers, self.column = teachers, column
        all_ = teachers.values()
        self.support = min((each.support for each in all_), key=SUPPORTS.index)
        self.k = min((each.k for each in all_ if each.k is not None), default=None)
        self.columns = tuple(dict.fromkeys([column, *(name for each in all_ for name in each.columns)]))
        self.offload = any(each.offload for each in all_)
        self.reads_by_student = any(each.reads_by_student for each in all_)
        self._visits = Visits()

    def meet(self, student: PreTrainedModel, tokens: Callable[[str], list[int]]) -> None:
        """Let all get to know the student."""
        for each in self.teachers.values():
            each.meet(student, tokens)

    def setup(self, student: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Get all ready."""
        for each in self.teachers.values():
            each.setup(student, tokenizer, device)

    def check(self, examples: Sequence[Mapping[str, Any]], budget: int) -> None:
        """Make sure that every example names a teacher who can score the answers to it.

        Raises:
            ValueError: If one does not.
        """
        strangers = sorted({str(each.get(self.column)) for each in examples} - self.teachers.keys())
        if strangers:
            raise ValueError(
                f"Expected every example to name one of the teachers {', '.join(map(repr, self.teachers))} in its "
                f"column {self.column!r}, but {', '.join(map(repr, strangers[:3]))} is none of them. Add it to "
                "model.teacher.teachers, name another column, or drop these examples."
            )
        for name, teacher in self.teachers.items():
            teacher.check([each for each in examples if str(each[self.column]) == name], budget)

    def apart(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        """Cut rows into those of each teacher, in the order of the teachers."""
        names = [self._name(rollout.fields[row]) for row in rows.tolist()]
        found = []
        for name, teacher in self.teachers.items():
            places = [place for place, each in enumerate(names) if each == name]
            if places:
                found += teacher.apart(rollout, rows[torch.tensor(places, device=rows.device)])
        return found

    def present(self) -> AbstractContextManager[None]:
        """Let the teachers come one after the other."""
        return self._visits.open()

    @property
    def footprint(self) -> int:
        """Bytes on the device: those who stay there together, or the largest, if they come one after the other."""
        sizes = [each.footprint for each in self.teachers.values()]
        return max(sizes) if all(each.offload for each in self.teachers.values()) else sum(sizes)

    @property
    def identity(self) -> str:
        """Those of all, and who reads what."""
        return repr((self.column, sorted((name, each.identity) for name, each in self.teachers.items())))

    @property
    def stop_ids(self) -> tuple[int, ...] | None:
        """Token ids that end an answer of any of them."""
        said = [each.stop_ids for each in self.teachers.values()]
        return tuple(dict.fromkeys(token for each in said for token in each or ())) or None

    @property
    def context_length(self) -> int | None:
        """How many tokens all of them can read."""
        said = [each.context_length for each in self.teachers.values()]
        return min((each for each in said if each is not None), default=None)

    def score(self, rollout: Rollout) -> Opinion:
        """Let the teacher of some rows read them.

        Raises:
            ValueError: If they are not all of one teacher (`apart`).
        """
        names = {self._name(each) for each in rollout.fields}
        if len(names) != 1:
            raise ValueError(f"Expected rows of one teacher, but got rows of {len(names)}. Cut them by `apart`.")
        return self._visits.score(self.teachers[names.pop()], rollout)

    def _name(self, fields: Mapping[str, Any]) -> str:
        """Return whose row it is."""
        name = str(fields.get(self.column))
        if name not in self.teachers:
            raise ValueError(
                f"Expected a row of one of the teachers {', '.join(map(repr, self.teachers))} by its column "
                f"{self.column!r}, but got {name!r}. Add it to model.teacher.teachers."
            )
        return name
