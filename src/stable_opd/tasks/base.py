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
            fields: All columns of the example, and its right answer as ``answer``.
        """


def right_answer(fields: Mapping[str, Any]) -> str:
    """Return the right answer of an example.

    Raises:
        ValueError: If it has none.
    """
    if "answer" not in fields:
        raise ValueError(
            f"Grading needs the right answer, but the examples have only the columns {sorted(fields)}. Name the column "
            "that holds it with data.columns.answer, or leave data.task out to measure everything but accuracy."
        )
    answer = fields["answer"]
    if answer is None or answer != answer:  # nan is how tables say that there is none
        raise ValueError(
            "Expected every example to have a right answer to grade by, but got none in some. Drop those rows, or "
            "leave data.task out to measure everything but accuracy."
        )
    return str(answer)
