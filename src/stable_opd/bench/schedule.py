"""All runs of a benchmark, some at a time, and an orderly end when the user wants one."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from stable_opd.bench.environment import describe
from stable_opd.bench.expand import Run
from stable_opd.bench.folder import check_ownership, is_finished
from stable_opd.bench.process import Attempt, stop


class Stopped(BaseException):
    """The user or the system wants an end.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def execute(runs: Sequence[Run], jobs: int) -> None:
    """Run what is not finished.

    Args:
        runs: The runs.
        jobs: How many at a time.

    Raises:
        SpecError: If a run's folder belongs to something else.
        Stopped: If the user or the system wants an end; what was under way has ended then.
    """
    for run in runs:
        check_ownership(run)
    waiting = [run for run in runs if not is_finished(run)]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already.", file=sys.stderr)
    if not waiting:
        return
    with _stoppable(), tqdm(total=len(waiting), desc="runs", unit="run") as bar:
        _work(waiting, min(jobs, len(waiting)), bar)


def _work(waiting: list[Run], jobs: int, bar: Any) -> None:
    environment = describe()
    slots: dict[int, Attempt | None] = dict.fromkeys(range(jobs))
    shares = [variables(slot, jobs, os.environ, torch.cuda.device_count()) for slot in range(jobs)]
    failed = 0
    try:
        while waiting or any(slots.values()):
            for slot, attempt in slots.items():
                if attempt is not None and attempt.is_over():
                    if not attempt.conclude():
                        failed += 1
                        bar.write(f"{attempt.run.name} failed: {attempt.record.reason}", file=sys.stderr)
                    slots[slot] = attempt = None
                    bar.set_postfix_str(f"{failed} failed" if failed else "")
                    bar.update()
                if attempt is None and waiting:
                    slots[slot] = _begin(waiting.pop(0), environment, shares[slot], bar)
            if sys.stderr.isatty():  # the time that has passed; a log file would only grow
                bar.refresh()
            time.sleep(0.1)
    finally:
        stop([each for each in slots.values() if each is not None])


def _begin(run: Run, environment: Mapping[str, Any], share: Mapping[str, str], bar: Any) -> Attempt:
    attempt = Attempt(run, environment, share)
    if attempt.start.note:
        bar.write(attempt.start.note, file=sys.stderr)
    return attempt


def variables(slot: int, jobs: int, given: Mapping[str, str], devices: int) -> dict[str, str]:
    """Return the environment of a run, with its share of the machine.

    Args:
        slot: Which of the runs that go on at a time.
        jobs: How many go on at a time.
        given: The environment of the runner; what the user has set there is left alone.
        devices: How many CUDA devices the runner sees.
    """
    found = dict(given)
    found.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    if jobs > 1 and devices > 1:
        visible = given.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % devices]
    return found


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the signals that ask for an end into an exception, once: what follows must not be cut short."""

    def leave(number: int, frame: FrameType | None) -> None:
        for each in kept:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    kept = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
