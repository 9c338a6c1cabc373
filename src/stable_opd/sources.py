"""Where examples come from, and reading them as tables."""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_opd.jsonl import read_objects
from stable_opd.tasks import Task
from stable_opd.testbed import resolve

#: Columns of a table; files whose keys are data have more.
MOST_COLUMNS = 1000

#: Characters of a library's message that are passed on; it may quote the data.
LONGEST_REASON = 500


@dataclass(frozen=True)
class Columns:
    """Which column holds what; the others travel along for the task.

    Args:
        prompt: The problem as text, or as a list of chat messages.
        golden: The golden solution, where there is one; of a list, the first that is good enough.
        answer: The right answer, where there is one; the task finds it as ``answer``.
        judged: Whether the golden solution is right, or a list with one verdict for each; none takes all for right.
    """

    prompt: str = "prompt"
    golden: str = "golden"
    answer: str = "answer"
    judged: str | None = None


@dataclass(frozen=True)
class Source:
    """Where examples come from.

    Args:
        path: A JSONL or Parquet file, a folder (of such files, or written by ``Dataset.save_to_disk``), a hub name, or
            one of the testbed's (``testbed:train``).
        split: Which split of a folder or of a hub's dataset.
        subset: Which configuration of a hub's dataset.
        part: Which of the examples that the filters leave, as [start, end): they are shuffled first, always in the same
            way, so parts that do not overlap share nothing, and the last may be shorter than asked for. None takes all,
            in the order of the file.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.part is not None and not 0 <= self.part[0] < self.part[1]:
            raise ValueError(f"Expected a part [start, end) with 0 <= start < end, but got {list(self.part)}.")


@dataclass(frozen=True)
class EvaluationSet(Source):
    """Examples to evaluate on, and how they are answered.

    Args:
        columns: Which column holds what; none takes ``data.columns``.
        task: Grades the answers; none takes ``data.task``.
        samples: Sampled answers to each prompt, beside the greedy one; 0 is greedy alone.
        temperature: Their temperature; none takes ``model.rollout.eval_temperature``.
    """

    columns: Columns | None = None
    task: Task | None = None
    samples: int = 1
    temperature: float | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        super().__post_init__()
        if self.samples < 0 or (self.temperature is not None and self.temperature < 0):
            raise ValueError(
                f"Expected samples and temperature of at least 0, but got {self.samples} and {self.temperature}."
            )


def read_source(source: Source) -> Sequence[Mapping[str, Any]]:
    """Read a source as rows, all with the same columns.

    Raises:
        ValueError: If there is nothing at a local path, if it is empty, or if it cannot be read.
    """
    place = Path(resolve(source.path))
    rows = _rows(place)
    try:
        table: Sequence[Mapping[str, Any]] = _load_table(place, source) if rows is None else rows
    except Exception as error:  # whatever a file or a hub may do, the user must learn which source it was
        # The libraries say of a table without rows that its schema or its first file cannot be found.
        if _is_empty(place) or isinstance(error, IndexError) or "corresponds to no data" in str(error):
            raise ValueError(f"Expected at least one example in {source.path}, but it is empty.") from error
        raise ValueError(
            f"Could not read examples from {source.path!r} (split {source.split!r}): {_reason(error)}. "
            "Expected a .jsonl, .json or .parquet file, a folder of them or written by save_to_disk, or a hub name."
        ) from error
    if not len(table):
        raise ValueError(f"Expected at least one example in {source.path}, but it is empty.")
    return table


def _load_table(place: Path, source: Source) -> Any:
    if place.suffix in (".jsonl", ".json", ".parquet") and not place.exists():
        raise FileNotFoundError(f"there is no file {place.absolute()}")  # and no hub is asked for one
    import datasets  # takes a second to import, which only those who load data should pay

    if place.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(place), split="train")
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        stored = datasets.load_from_disk(str(place))
        return stored[source.split] if isinstance(stored, datasets.DatasetDict) else stored
    return datasets.load_dataset(str(place), source.subset, split=source.split)


def _rows(place: Path) -> list[dict[str, Any]] | None:
    """Return the rows of a file of JSON, each with all columns; None of anything else.

    Such files in a folder are looked at, no more. They are read here because the reader of pyarrow brings the process
    down on some, takes text like 2026-01-01 for a date, and has one type for a column, also for one that nobody reads.
    """
    if place.is_dir():
        for each in sorted(place.rglob("*.jsonl")):
            collections.deque(read_objects(each), maxlen=0)
        return None
    if place.suffix not in (".jsonl", ".json") or not place.is_file():
        return None
    rows = list(read_objects(place))
    blank: dict[str, Any] = dict.fromkeys(name for row in rows for name in row)
    if len(blank) > MOST_COLUMNS:
        raise ValueError(
            f"Expected at most {MOST_COLUMNS} columns in {place}, but got {len(blank)}. Give all rows the same keys."
        )
    return [row if len(row) == len(blank) else blank | row for row in rows]


def _reason(error: BaseException) -> str:
    """Return what went wrong in the first place: the last word of a library is that something did."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"[:LONGEST_REASON]


def _is_empty(place: Path) -> bool:
    return place.is_file() and place.stat().st_size == 0
