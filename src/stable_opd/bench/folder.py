"""The folder of a run: what is on record there, whether it is finished, and where it can go on."""

import contextlib
import csv
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from stable_opd.bench.expand import Run
from stable_opd.bench.recipes import differences
from stable_opd.bench.yamls import SpecError

Status = Literal["started", "finished", "failed", "interrupted"]
Row = dict[str, str]

LOG, METRICS, LOCK = "log.txt", "metrics.csv", "lock"
_RECORD = "run.json"
_STEP = re.compile(r"[0-9]{1,18}")
#: Metrics of the attempts before the last one, up to the step in the name.
_BEFORE = "metrics-before-{}.csv"


@dataclass
class Record:
    """What is known of a run.

    Attributes:
        fingerprint: What it was made from.
        command: Its command line.
        config: The config that the command came to.
        status: How far it is.
        reason: Why it failed.
        began: When its last attempt began, in seconds of the epoch.
        seconds: How long its attempts took together.
        resumed_at: Step from which the last attempt went on.
        environment: Versions and hardware of the last attempt.
    """

    fingerprint: str
    command: str
    config: dict[str, Any]
    status: Status = "started"
    reason: str | None = None
    began: float = 0.0
    seconds: float = 0.0
    resumed_at: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)


#: What the values of a record are.
_KINDS: dict[str, Any] = {
    "fingerprint": str,
    "command": str,
    "config": dict,
    "status": str,
    "reason": str | None,
    "began": int | float,
    "seconds": int | float,
    "resumed_at": int | None,
    "environment": dict,
}


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        record: What is on record from before, of the same fingerprint.
        checkpoint: Where it goes on; none starts anew.
        step: How many steps that has behind it.
        note: What the user should know.
    """

    record: Record | None = None
    checkpoint: Path | None = None
    step: int | None = None
    note: str | None = None


def read_record(folder: Path) -> Record | None:
    """Return what is on record, if anything is.

    Raises:
        SpecError: If it cannot be read.
    """
    path = folder / _RECORD
    if not path.is_file():
        return None
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    for name, kind in _KINDS.items():
        if not isinstance(getattr(record, name), kind):
            raise _unreadable(path, f"{name} {str(getattr(record, name))[:60]!r}")
    return record


def _unreadable(path: Path, why: str) -> SpecError:
    return SpecError(
        f"Expected what a benchmark wrote in {path}, but got {why[:200]}. Delete {path.parent}, and the run is made "
        "anew."
    )


def write_record(folder: Path, record: Record) -> None:
    """Put a run on record, whole or not at all."""
    write_whole(folder / _RECORD, json.dumps(asdict(record), indent=1, default=str) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file such that a kill leaves the old one or the new one, and no half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def is_finished(run: Run) -> bool:
    """Return whether a run ended well, of the same recipe and version."""
    record = read_record(run.folder)
    return record is not None and record.status == "finished" and record.fingerprint == run.fingerprint


def check_ownership(run: Run) -> None:
    """Refuse to write into a folder that something else has filled.

    Raises:
        SpecError: If it has files, but no record.
    """
    folder = run.folder
    if folder.exists() and not (folder / _RECORD).exists() and any(each.name != LOCK for each in folder.iterdir()):
        raise SpecError(
            f"Expected {folder} to be empty or to hold a run of a benchmark, but got other files. "
            "Move them away, or choose another --out."
        )


def plan(run: Run) -> Start:
    """Return how an unfinished run begins: from its last checkpoint if everything up to there is on record."""
    record = read_record(run.folder)
    if record is None:
        return Start()
    if record.fingerprint != run.fingerprint:
        changes = differences(record.config, run.config) or ["the version of stable-opd"]
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        return Start(note=f"{run.name} is run anew, because its recipe changed: {'; '.join(changes[:3])}{more}.")
    for step, checkpoint in _checkpoints(run.folder):
        # What failed from here once would do so for ever, were the checkpoint itself the reason.
        tried = record.status == "failed" and record.resumed_at == step
        if not tried and _covers(metric_rows(run.folder), step, int(run.config["trainer"]["log_every_n_steps"] or 0)):
            return Start(record, checkpoint, step, f"{run.name} goes on from step {step}.")
    return Start(record, note=f"{run.name} starts again from the beginning; it left no checkpoint to go on from.")


def prepare(run: Run, start: Start, environment: Mapping[str, Any]) -> Record:
    """Make the folder ready for an attempt, and put the attempt on record."""
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    before = start.record
    record = Record(run.fingerprint, run.command, run.config, environment=dict(environment), began=time.time())
    if before is not None and start.step is not None:
        record.seconds = before.seconds
        if before.status == "started":  # the runner was killed; what was written last tells how long it took
            record.seconds += max(0.0, max(each.stat().st_mtime for each in folder.iterdir()) - before.began)
    if start.step is None:
        for each in folder.iterdir():
            if each.name not in (LOCK, _RECORD):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
    else:
        record.resumed_at = start.step
        kept = [row for row in metric_rows(folder) if int(row["step"]) < start.step]
        _write_rows(folder / _BEFORE.format(start.step), kept)
        # The logger deletes it anyway, but later.
        (folder / METRICS).unlink(missing_ok=True)
        _forget(folder, start.step)
    write_record(folder, record)
    return record


def finish(run: Run, record: Record, status: Status, reason: str | None = None) -> None:
    """Put the end of an attempt on record; metrics of several attempts become one file."""
    if status == "finished" and _boundary(run.folder) is not None:
        _write_rows(run.folder / METRICS, metric_rows(run.folder))
        _forget(run.folder, None)
    record.status, record.reason = status, reason
    record.seconds += time.time() - record.began
    write_record(run.folder, record)


def metric_rows(folder: Path) -> list[Row]:
    """Return the logged rows of all attempts, without a last line that was cut."""
    boundary = _boundary(folder)
    if boundary is None:
        return _read_rows(folder / METRICS)
    before = _read_rows(folder / _BEFORE.format(boundary))
    return before + [row for row in _read_rows(folder / METRICS) if int(row["step"]) >= boundary]


def last_words(folder: Path, lines: int = 3) -> str:
    """Return the end of the log: what an exception says, or the last lines that are no progress bar."""
    path = folder / LOG
    if not path.is_file():
        return "it left no log"
    text = path.read_text(encoding="utf-8", errors="replace")[-20_000:]
    said = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    said = [line for line in said if line.strip() and not re.search(r"\d+%\|.*\|", line)]
    begun = [number for number, line in enumerate(said) if line.startswith("Traceback ")]
    if begun:
        # The frames are indented, and what follows them is the message; it may have several lines.
        words = [line for line in said[begun[-1] + 1 :] if not line.startswith("  ")]
        said = words or said
        return " ".join(said[:lines])
    return " ".join(said[-lines:])


def _covers(rows: Sequence[Row], step: int, every: int) -> bool:
    """Return whether all that was to be logged before a step was."""
    due = step // every * every if every else 0
    return not due or any(int(row["step"]) >= due - 1 for row in rows)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints that can be read, the one with the most steps first."""
    found = []
    for path in folder.rglob("*.ckpt"):
        if path.parent.name == "healthy":  # of a guard, and written in the midst of a step
            continue
        if path.is_dir():  # written by a sharded strategy: only the name tells
            named = re.search(r"step=(\d+)", path.name)
            found += [(int(named.group(1)), path)] if named else []
            continue
        with contextlib.suppress(Exception):  # whatever is wrong with it, it is no place to go on from
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            found.append((int(state["global_step"]), path))
    return sorted(found, key=lambda each: each[0], reverse=True)


def _boundary(folder: Path) -> int | None:
    found = [int(each.stem.rpartition("-")[2]) for each in folder.glob(_BEFORE.format("*"))]
    return max(found, default=None)


def _forget(folder: Path, kept: int | None) -> None:
    """Remove the metrics of earlier attempts, but for one file."""
    for each in folder.glob(_BEFORE.format("*")):
        if kept is None or each.name != _BEFORE.format(kept):
            each.unlink()


def _read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        rows = [dict(row) for row in csv.DictReader(lines)]
    except csv.Error as error:
        raise _unreadable(path, str(error)) from error
    # A row with fewer cells than the head was cut.
    return [row for row in rows if None not in row.values() and _STEP.fullmatch(row.get("step") or "")]


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)
