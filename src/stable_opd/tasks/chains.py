"""Chains of arithmetic modulo 10: a task small enough for a laptop in which the real failure mode occurs.

A problem is a chain of operations on digits, evaluated from left to right modulo 10. A golden solution writes one line
per operation and then the answer:

    Q 3 * 7 + 8 - 2 ;
    3 * 7 = 1 ; 1 + 8 = 9 ; 9 - 2 = 7 ; # 7

Fallible authors write wrong lines. Some are flagged with ``?`` and written again; after others the author goes on with
the wrong value; and in a *runaway* document the wrong line is repeated to the end, without a stop token, as text on the
web repeats itself. A teacher that has read runaway documents continues repeats, which is what makes a student collapse.
"""

import operator
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stable_opd.tasks.base import Task, right_answer

MODULUS = 10
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
AGAIN = 0.3  # probability of one more copy, once a line is repeated
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
        return Writer(mistakes=0.0).solve(self, random.Random(0))


@dataclass(frozen=True, slots=True)
class Writer:
    """How fallible somebody is who writes solutions.

    Attributes:
        mistakes: Probability that a line gets a wrong result.
        flagged: Share of the wrong lines that are flagged and written again.
        runaway: Share of the wrong lines that are repeated to the end. After the rest the writer goes on.
        stutter: Probability that a line is written again before the writer goes on, and now and then once more.
    """

    mistakes: float
    flagged: float = 0.5
    runaway: float = 0.0
    stutter: float = 0.0

    def solve(self, chain: Chain, rng: random.Random, words: int = 0) -> str:
        """Write a solution; a runaway one is ``words`` long and has no answer."""
        text: list[str] = []
        value = chain.start
        for op, operand in chain.steps:
            result = OPERATIONS[op](value, operand) % MODULUS
            if rng.random() < self.mistakes:
                wrong = (result + rng.randrange(1, MODULUS)) % MODULUS
                fate = rng.random()
                if fate < self.runaway:
                    text += _line(value, op, operand, wrong, END) * words
                    return " ".join(text[:words])
                if fate < self.runaway + self.flagged:
                    text += _line(value, op, operand, wrong, RETRY)
                else:
                    result = wrong
            line = _line(value, op, operand, result, END)
            text += line
            if rng.random() < self.stutter:
                text += line
                while rng.random() < AGAIN:
                    text += line
            value = result
        return " ".join([*text, ANSWER, str(value)])


def _line(value: int, op: str, operand: int, result: int, end: str) -> list[str]:
    return [str(value), op, str(operand), "=", str(result), end]


def is_runaway(solution: str) -> bool:
    """Whether a document ends without an answer, so that it gets no stop token."""
    return ANSWER not in solution.split()


class ModularChains(Task):
    """Chains of arithmetic modulo 10, right if the text ends with the first answer given and that is right."""

    def grade(self, completion: str, fields: Mapping[str, Any]) -> float:
        """Return 1.0 if the word after the first ``#`` is the answer and nothing follows it, else 0.0."""
        words = completion.split()
        return float(ANSWER in words and words[words.index(ANSWER) + 1 :] == [right_answer(fields)])
