"""Files of one JSON object per line that belong to a run and go on with it."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Bytes at the end of a file in which its last line is looked for.
LONGEST = 2**20


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that have a whole-numbered ``step``.

    A line that is no such object, as one that was cut by a crash, is left out; so is a file that is not there.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def write_records(path: Path, step: int, records: Iterable[Mapping[str, Any]]) -> None:
    """Append the records of a step, in place of those that an earlier attempt left of it or of later steps.

    A run that is resumed in its folder so writes no record twice.
    """
    if _last_step(path) < step:  # as always, but where a run was resumed; so the time does not grow with the file
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(_lines(records))
        return
    earlier = [record for record in read_records(path) if record["step"] < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through a file beside it, so that a run that is killed here leaves the old one.
    draft = path.with_suffix(".part")
    draft.write_text(_lines([*earlier, *records]), encoding="utf-8", errors="replace")
    draft.replace(path)


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)


def _last_step(path: Path) -> float:
    """Return the step of the last line; infinity if there is none, or none that is whole."""
    if not path.is_file():
        return math.inf
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST))
        *_, last, rest = [b"", *file.read().split(b"\n")]
    try:
        step = json.loads(last)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return math.inf if rest or not isinstance(step, int) else step
