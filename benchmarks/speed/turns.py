"""Contestants take turns: each lives in its own process and works only while it is released.

The driver writes one line to a worker's stdin, the worker does that many steps and answers with one line. While one
works, the others block reading stdin. A step is timed by the worker, from its release, or from the end of the step
before, to the trainer's hook at the end of a step; so the loop's own work between two steps counts.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from benchmarks.speed.meter import Meter
from benchmarks.speed.stats import Side, Step

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        contestant: Who does it; a key of `benchmarks.speed.worker.CONTESTANTS`.
        settings: What this contestant needs to know.
        threads: Threads of its arithmetic.
        device: ``cpu`` or ``cuda``.
    """

    contestant: str
    settings: dict[str, Any]
    threads: int
    device: str


class Turns:
    """The worker's end.

    Args:
        job: What the worker does.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        # Libraries print; the driver must read nothing but answers.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.left = 0
        self.records: list[Step] = []
        self.began = 0.0

    def start(self) -> bool:
        """Say that everything is loaded, wait to be released, and return whether there is a step to do."""
        self.meter = Meter(self.job.device)
        return self._answer({})

    def finish(self, facts: Callable[[], Step]) -> bool:
        """End a step; return whether there is another one.

        Args:
            facts: Called after the clock was read, and not timed; returns what else is known of the step.
        """
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        self.records.append({"seconds": seconds, **facts()})
        self.left -= 1
        if self.left:
            self.began = time.perf_counter()
            return True
        if self.job.device == "cuda":
            torch.cuda.empty_cache()  # the other contestant needs the room
        return self._answer({"steps": self.records, "peak": self.meter.peak()})

    def report(self, findings: dict[str, Any]) -> None:
        """Answer with findings instead of steps."""
        self._write(findings)

    def _answer(self, answer: dict[str, Any]) -> bool:
        self._write(answer)
        line = sys.stdin.readline().split()
        if not line:
            return False
        self.left, self.records = int(line[0]), []
        if line[1:] == ["fresh"]:
            self.meter.reset()
        self.began = time.perf_counter()
        return True

    def _write(self, answer: dict[str, Any]) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()


class Worker:
    """The driver's end: a process that holds one contestant.

    Args:
        job: What it does.
        log: Where its output goes.
    """

    def __init__(self, job: Job, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.speed.worker", json.dumps(asdict(job))],
                cwd=ROOT,
                env=os.environ | threads | offline,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.loaded = self._read()
        self.peak = 0

    def __enter__(self) -> "Worker":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        if error is not None:
            self.process.kill()
        self.close()

    def close(self) -> None:
        """Let the process end, if it has not."""
        if self.process.poll() is None:
            self.process.communicate()  # no further line on its stdin is what ends it

    def run(self, steps: int, fresh: bool = False) -> Side:
        """Let it do some steps; ``fresh`` forgets the highest memory use before."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps} fresh\n" if fresh else f"{steps}\n")
        self.process.stdin.flush()
        answer = self._read()
        self.peak = answer["peak"]
        steps_done: Side = answer["steps"]
        return steps_done

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise RuntimeError(f"A worker ended before its time; the end of {self.log}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def ask(job: Job, log: Path) -> dict[str, Any]:
    """Return what a job that takes no steps finds."""
    with Worker(job, log) as worker:
        return worker.loaded


def enter_all(stack: ExitStack, jobs: dict[str, Job], logs: Path, warm_up: int) -> dict[str, Worker]:
    """Start a worker for each job, and warm it up before the next one starts."""
    workers = {}
    for name, job in jobs.items():
        workers[name] = stack.enter_context(Worker(job, logs / f"{name}.log"))
        if warm_up:
            workers[name].run(warm_up)
    return workers


def interleave(
    workers: Sequence[Worker], seconds: float, steps: int = 2, least: int = 2, most: int = 1000
) -> list[list[Side]]:
    """Let workers take turns, A B B A, again and again.

    Args:
        workers: Who takes turns.
        seconds: When this much time has passed, no new round begins.
        steps: Steps of one turn.
        least: Rounds to do in any case.
        most: Rounds to do at most.

    Returns:
        The steps of each worker, round by round.
    """
    rounds: list[list[Side]] = [[] for _ in workers]
    end = time.monotonic() + seconds
    while len(rounds[0]) < most and (len(rounds[0]) < least or time.monotonic() < end):
        first = not rounds[0]
        there = [worker.run(steps, fresh=first) for worker in workers]
        back = [worker.run(steps) for worker in reversed(workers)][::-1]
        for mine, one, other in zip(rounds, there, back, strict=True):
            mine.append([*one, *other])
    return rounds
