"""A run as a process: its start, its end, and who may have it at a time."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from stable_opd.bench.child import STOPPED
from stable_opd.bench.expand import Run
from stable_opd.bench.folder import LOCK, LOG, Record, Start, finish, last_words, plan, prepare
from stable_opd.bench.yamls import SpecError


class Attempt:
    """A run that is under way.

    Args:
        run: The run.
        environment: Versions and hardware, for the record.
        variables: Environment variables of its process.

    Raises:
        SpecError: If another process has the run.
    """

    def __init__(self, run: Run, environment: Mapping[str, object], variables: Mapping[str, str]) -> None:
        self.run = run
        run.folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(run.folder / LOCK)
        self.start: Start = plan(run)
        self.record: Record = prepare(run, self.start, environment)
        argv = [sys.executable, "-m", "stable_opd.bench.child", *run.arguments]
        if self.start.checkpoint is not None:
            argv += ["--ckpt_path", str(self.start.checkpoint)]
        with (run.folder / LOG).open("a", encoding="utf-8") as log:
            # A group of its own, so that all of it can be ended; a pipe, so that it knows when the runner is gone; and
            # the lock, which is held as long as any process of the run lives.
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(variables),
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )

    def is_over(self) -> bool:
        """Return whether its process has ended."""
        return self.process.poll() is not None

    def conclude(self) -> bool:
        """Put the end of its process on record, and return whether the run is finished."""
        status = self.process.returncode
        if status == 0:
            finish(self.run, self.record, "finished")
        else:
            finish(self.run, self.record, "failed", _reason(status, self.run.folder))
        self._release()
        return bool(status == 0)

    def interrupt(self) -> None:
        """Put on record that it was ended before its time; its process has ended."""
        finish(self.run, self.record, "interrupted")
        self._release()

    def signal(self, number: int) -> None:
        """Send a signal to everything that belongs to the run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _release(self) -> None:
        self.signal(signal.SIGKILL)  # whatever outlived the main process
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.lock.close()


def stop(attempts: Sequence[Attempt], patience: float = 10.0) -> None:
    """End runs: ask, wait, and kill what is left."""
    for each in attempts:
        each.signal(signal.SIGTERM)
    until = time.monotonic() + patience
    while time.monotonic() < until and not all(each.is_over() for each in attempts):
        time.sleep(0.05)
    for each in attempts:
        each.signal(signal.SIGKILL)
        if each.process.wait() == 0:
            each.conclude()
        else:
            each.interrupt()


def _reason(status: int, folder: Path) -> str:
    if status == STOPPED or status < 0:
        name = signal.Signals(signal.SIGTERM if status == STOPPED else -status).name
        return f"ended by {name}"
    return f"exit status {status}: {last_words(folder)}"


def _lock(path: Path, patience: float = 30.0) -> IO[str]:
    """Return a locked file; a process whose runner was killed gets time to die."""
    file = path.open("a", encoding="utf-8")
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                raise SpecError(
                    f"Expected {path.parent} to be free, but got a run that is under way in it. "
                    "Wait for the other benchmark, or choose another --out."
                ) from None
            time.sleep(0.1)
