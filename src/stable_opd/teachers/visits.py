"""Having one of several teachers in place at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from stable_opd.scoring import Opinion
from stable_opd.teachers.base import Teacher
from stable_opd.types import Rollout


class Visits:
    """Lets teachers come when they are asked, and leave when another one is, so that one at most takes up room."""

    def __init__(self) -> None:
        self._stack: ExitStack | None = None
        self._here: Teacher | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let the last who was asked stay for the time of a context."""
        with ExitStack() as stack:
            self._stack = stack
            try:
                yield
            finally:
                self._stack = self._here = None

    def score(self, teacher: Teacher, rollout: Rollout) -> Opinion:
        """Let a teacher read some rows."""
        if self._stack is None:
            with teacher.present():
                return teacher.score(rollout)
        if self._here is not teacher:
            self._stack.close()
            self._stack.enter_context(teacher.present())
            self._here = teacher
        return teacher.score(rollout)
