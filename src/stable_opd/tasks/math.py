"""Mathematics: the final answer of a solution, compared by its value."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from stable_opd.tasks import grader
from stable_opd.tasks.base import Task, right_answer

log = logging.getLogger(__name__)

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_SAID = re.compile(r"(?:####|(?:answer is|answer:)(?:\*\*)?)[ \t]*:?\s*([^\n]+)", re.IGNORECASE)


def final_answer(solution: str) -> str | None:
    r"""Return the final answer of a solution as it is written, None if it gives none.

    That is what is in the last ``\boxed{...}``; without a box, what follows the last "the answer is", "Answer:" or
    "####" on its line. A last box that is never closed, as in a solution that was cut, holds nothing.
    """
    boxes = list(_BOX.finditer(solution))
    if boxes:
        return _boxed(solution, boxes[-1].end())
    said = _SAID.findall(solution)
    return _plain(said[-1]) if said else None


def _boxed(solution: str, start: int) -> str | None:
    """Return what a box holds: a group in braces, or one character."""
    if not solution.startswith("{", start):
        return solution[start : start + 1].strip() or None
    depth, place = 0, start
    while place < len(solution):
        character = solution[place]
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return _plain(solution[start + 1 : place])
        place += 2 if character == "\\" else 1  # an escaped brace is a sign of its own
    return None


def _plain(text: str) -> str | None:
    """Return an answer without the dollars around it and the full stop of its sentence."""
    text = text.strip().rstrip(".").strip("*").strip()
    for mark in ("$$", "$"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip()
    return text or None


class MathVerify(Task):
    r"""Right if the final answer has the value of the right one, as Math-Verify sees it: 1/2 is 0.5 is \frac{1}{2}.

    Answers are compared in a process of its own, under limits that hold against any input: Math-Verify computes with
    what it reads, and a student in training writes things like ``9^{9^{9^9}}``. An answer that exceeds a limit, or that
    brings the process down, is wrong; it is counted in `ungraded` and logged. Needs ``pip install 'stable-opd[math]'``
    and a POSIX system.

    Args:
        seconds: Time for one answer.
        memory: Memory that the process may take, in MiB.

    Raises:
        ModuleNotFoundError: If Math-Verify is not installed.
        ValueError: If there is no time or no memory.
    """

    def __init__(self, seconds: float = 5.0, memory: int = 2048) -> None:
        if seconds <= 0 or memory <= 0:
            raise ValueError(f"Expected seconds and memory above 0, but got {seconds} and {memory}. Give some of both.")
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError(
                "Expected the package math-verify to grade by, but got none. Install it: pip install 'stable-opd[math]'"
            )
        self.seconds, self.memory = seconds, memory
        self.ungraded = 0
        self._grader = Grader(seconds, memory)

    def grade(self, completion: str, fields: Mapping[str, Any]) -> float:
        """Return 1.0 if the final answer is right, else 0.0; a list of right answers asks for all of them."""
        right, given = _expected(fields), final_answer(completion)
        if given is None:
            return 0.0
        if given == right:
            return 1.0
        if self._grader.process_id != os.getpid():  # the other end of our pipes belongs to the process that forked us
            self._grader = Grader(self.seconds, self.memory)
        verdict = self._grader.equal(right, given)
        if verdict is None:
            self.ungraded += 1
            log.warning(
                "An answer could not be graded in %g s and %d MiB, and counts as wrong (%d so far): %.200r",
                *(self.seconds, self.memory, self.ungraded, given),
            )
        return float(bool(verdict))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the process here: a copy starts one of its own."""
        return {name: value for name, value in vars(self).items() if name != "_grader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be ready to start a process."""
        vars(self).update(state)
        self._grader = Grader(self.seconds, self.memory)


def _expected(fields: Mapping[str, Any]) -> str:
    answer = fields.get("answer")
    if isinstance(answer, list | tuple):
        fields = {**fields, "answer": ", ".join(_plain(str(each)) or "" for each in answer)}
    right = right_answer(fields)
    return final_answer(right) or _plain(right) or ""


class Grader:
    """Who compares answers: a process that is started when it is needed, and again after one that brought it down.

    It ends when this object does, and if nobody is left to end it, when its input does.

    Args:
        seconds: Time for one answer.
        memory: Memory that the process may take, in MiB.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        # Without its folder in the search path, whose modules have common names.
        self.command = [sys.executable, "-P", grader.__file__, str(seconds), str(memory << 20)]
        self.memory = memory
        self.process_id = os.getpid()
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = lambda: None

    def equal(self, right: str, given: str) -> bool | None:
        """Whether two answers have the same value; None if that cannot be told within the limits.

        Raises:
            RuntimeError: If the process cannot start.
        """
        with self._turn:
            used = self._process is not None
            verdict, ended = self._ask(right, given)
            if not verdict and used and ended != -signal.SIGALRM:
                # It may have been brought down by somebody else, or by what earlier answers left in its memory.
                verdict, _ = self._ask(right, given)
        return verdict == "1" if verdict else None

    def _ask(self, right: str, given: str) -> tuple[str, int | None]:
        """Return what the process says, or nothing and how it ended."""
        process, self._process = self._process or self._start(), None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([right, given]) + "\n")
            process.stdin.flush()
        verdict = process.stdout.readline().strip()  # ends when the process does, which has its limits
        if not verdict:
            return "", self._ended(process)
        self._process = process  # not before, so that whoever is interrupted here leaves no verdict for the next answer
        return verdict, None

    def _start(self) -> "subprocess.Popen[str]":
        """Start a process, in a session of its own, so that Ctrl-C is for us alone."""
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, process, self.process_id)
        assert process.stdout is not None
        if process.stdout.readline().strip() != grader.READY:
            ended = self._ended(process)
            raise RuntimeError(
                f"Expected Math-Verify to load in {self.memory} MiB, but its process ended with {ended}. Give the task "
                "more memory, or see what `python -c 'import math_verify'` says."
            )
        return process

    def _ended(self, process: "subprocess.Popen[str]") -> int:
        """Return how a process ended that writes no more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        self._end()
        return process.returncode


def _end(process: "subprocess.Popen[str]", owner: int) -> None:
    """End a process; one that a fork has copied leaves it to its owner."""
    if os.getpid() != owner:
        return
    with contextlib.suppress(BrokenPipeError), process:  # closes the pipes and waits
        if process.poll() is None:
            process.kill()
