"""Files of one JSON object per line: data that must be whole, and what a run keeps, whose last line may be cut."""

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

#: Bytes at the end of a file in which its last line is looked for.
LONGEST = 2**20

#: How JSON writes half of a pair of surrogates, by itself or beside the other half.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

#: Bytes of the longest line that is read as an example: a thousand times a long solution.
LONGEST_LINE = 2**26


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, one per line; a file that begins with a bracket is one list of them.

    Raises:
        ValueError: If a line is no object, has a key twice, or is too long; the message says which line.
    """
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if start == b"[":
        yield from _listed(path)
        return
    for number, line in _raw_lines(path):
        if line.strip():
            yield _object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ValueError(
                    f"Expected lines of at most {LONGEST_LINE >> 20} MiB, but got a longer one: {path}, line {number}. "
                    "Write one example per line, with a line break behind each."
                )
            yield number, line


def _listed(path: Path) -> Iterator[dict[str, Any]]:
    for number, each in enumerate(_parsed(path.read_bytes(), str(path)), 1):
        yield _object(each, f"{path}, item {number}")


def _parsed(text: bytes, place: str) -> Any:
    try:
        found = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_without_doubles)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # half of a pair of surrogates is no character
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected JSON in UTF-8, but got what cannot be read: {str(error)[:200]}: {place}. Mend it there."
        ) from error
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name[:60]!r} stands there twice")
    return found


def _object(found: Any, place: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"Expected a JSON object, but got {_shown(found)}: {place}. Write {{...}} there.")
    return found


def _shown(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


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
        except (ValueError, RecursionError):  # a number may be too long, a list too deep
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
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return math.inf if rest or not isinstance(step, int) else step
