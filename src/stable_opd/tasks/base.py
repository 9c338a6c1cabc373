"""The contract of a task: what a right answer is."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from stable_opd.registry import Component


class Task(Component):
    """What a right answer is."""

    kind: ClassVar[str] = "task"

    @abstractmethod
    def grade(self, completion: str, fields: Mapping[str, Any]) -> float:
        """Return how good a completion is, from 0.0 to 1.0.

        Args:
            completion: The answer as text, without special tokens.
            fields: All columns of the example.
        """
