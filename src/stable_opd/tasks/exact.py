"""Grading by comparison with a known answer."""

from collections.abc import Mapping
from typing import Any

from stable_opd.tasks.base import Task, right_answer


class ExactMatch(Task):
    """Right if the text after the last marker is the answer, apart from white space around it.

    Args:
        marker: What stands before the final answer; empty: the whole completion is compared.
    """

    def __init__(self, marker: str = "####") -> None:
        self.marker = marker

    def grade(self, completion: str, fields: Mapping[str, Any]) -> float:
        """Return 1.0 if the answer is right, else 0.0."""
        right = right_answer(fields)
        if self.marker and self.marker not in completion:
            return 0.0
        given = completion.rpartition(self.marker)[2] if self.marker else completion
        return float(given.strip() == right.strip())
