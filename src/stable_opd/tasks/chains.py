"""Chains of modular arithmetic: a task small enough for a laptop in which the real failure mode occurs.

A problem is a chain of operations on 0..12, evaluated from left to right modulo 13. A golden solution writes one line
per operation and then the answer:

    Q 3 * 7 + 8 - 2 ;
    3 * 7 = 8 ; 8 + 8 = 3 ; 3 - 2 = 1 ; # 1

A wrong line may be flagged with ``?`` and written again. A *runaway* document repeats its last line to the end of the
context and has no stop token, as repeated text on the web does; a teacher trained on a few of them continues repeats.
"""

import operator
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stable_opd.tasks.base import Task

MODULUS = 13
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
END, RETRY, ANSWER, QUESTION = ";", "?", "#", "Q"
WORDS = [str(value) for value in range(MODULUS)] + [*OPERATIONS, "=", END, RETRY, ANSWER, QUESTION]


@dataclass(frozen=True, slots=True)
class Chain:
    """One problem: a start value and the (operation, operand) pairs applied to it."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, rng: random.Random, length: int = 3) -> "Chain":
        """Draw a chain of ``length`` operations."""
        steps = tuple((rng.choice([*OPERATIONS]), rng.randrange(MODULUS)) for _ in range(length))
        return cls(rng.randrange(MODULUS), steps)

    @property
    def prompt(self) -> str:
        """The question as the models see it."""
        return " ".join([QUESTION, str(self.start), *(f"{op} {operand}" for op, operand in self.steps), END])

    @property
    def answer(self) -> str:
        """The value of the chain."""
        value = self.start
        for op, operand in self.steps:
            value = OPERATIONS[op](value, operand) % MODULUS
        return str(value)

    @property
    def golden(self) -> str:
        """The solution without a mistake."""
        return self.solution(random.Random(0), mistakes=0.0, runaway=0.0, words=0)

    def solution(self, rng: random.Random, mistakes: float, runaway: float, words: int) -> str:
        """Write a solution as a fallible author would.

        Args:
            rng: Source of the mistakes.
            mistakes: Probability that a line gets a wrong result.
            runaway: Probability that a wrong line is repeated to the end instead of being flagged and written again.
            words: Length, in words, to which a runaway document is filled.
        """
        text: list[str] = []
        value = self.start
        for op, operand in self.steps:
            result = OPERATIONS[op](value, operand) % MODULUS
            if rng.random() < mistakes:
                wrong = (result + rng.randrange(1, MODULUS)) % MODULUS
                line = [str(value), op, str(operand), "=", str(wrong)]
                if rng.random() < runaway:
                    line.append(END)
                    while len(text) < words:
                        text += line
                    return " ".join(text[:words])
                text += [*line, RETRY]
            text += [str(value), op, str(operand), "=", str(result), END]
            value = result
        return " ".join([*text, ANSWER, str(value)])


def is_runaway(solution: str) -> bool:
    """Whether a document ends without an answer, so that it gets no stop token."""
    return ANSWER not in solution.split()


class ModularChains(Task):
    """Chains of arithmetic modulo 13, graded exactly on the first answer given."""

    def grade(self, completion: str, fields: Mapping[str, Any]) -> float:
        """Return 1.0 if the word after the first ``#`` is the answer and nothing follows it, else 0.0."""
        words = completion.split()
        return float(ANSWER in words and words[words.index(ANSWER) + 1 :] == [str(fields["answer"])])
