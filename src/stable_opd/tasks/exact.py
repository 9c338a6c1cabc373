"""Grading by comparison with a known answer."""

from collections.abc import Mapping
from typing import Any

from stable_opd.tasks.base import Task


class ExactMatch(Task):
    """Right if the text after the last marker is the answer, apart from white space around it.

    Args:
        marker: What stands before the final answer; empty: the whole completion is compared.
        answer: Column that holds the right answer.
    """

    def __init__(self, marker: str = "####", answer: str = "answer") -> None:
        self.marker = marker
        self.answer = answer

    def grade(self, completion: str, fields: Mapping[str, Any]) -> float:
        """Return 1.0 if the answer is right, else 0.0."""
        if self.answer not in fields:
            raise ValueError(
                f"ExactMatch compares with the column {self.answer!r}, but the examples have {sorted(fields)}. Name "
                "the column with data.task.init_args.answer."
            )
        if self.marker and self.marker not in completion:
            return 0.0
        given = completion.rpartition(self.marker)[2] if self.marker else completion
        return float(given.strip() == str(fields[self.answer]).strip())
