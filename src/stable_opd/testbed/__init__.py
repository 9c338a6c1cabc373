"""The embedded testbed: a tiny teacher and student, and a task on which the real failure mode occurs.

Its models and data are named by a prefix wherever a path is expected: ``testbed:student``, ``testbed:teacher``,
``testbed:control`` (a teacher that never saw a runaway document), ``testbed:student-other-stop`` (the student, which
ends its answers with another token than the teachers do), ``testbed:train`` and ``testbed:validation``.
"""

from pathlib import Path

PREFIX = "testbed:"
ROOT = Path(__file__).parent / "data"
PLACES = {
    "student": ROOT / "student",
    "student-other-stop": ROOT / "student-other-stop",
    "teacher": ROOT / "teacher",
    "control": ROOT / "control",
    "train": ROOT / "train.jsonl",
    "validation": ROOT / "validation.jsonl",
}


def resolve(path: str) -> str:
    """Return where something of the testbed lies; any other path or hub name comes back as it is.

    Raises:
        ValueError: If the prefix is there but the testbed has no such thing.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in PLACES:
        raise ValueError(f"Expected one of {', '.join(PREFIX + place for place in PLACES)}, but got {path!r}.")
    return str(PLACES[name])
