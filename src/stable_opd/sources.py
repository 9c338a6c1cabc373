"""Where examples come from, and reading them as tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_opd.tasks import Task
from stable_opd.testbed import resolve

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


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


def read_source(source: Source) -> "Dataset":
    """Read a source as a table.

    Raises:
        ValueError: If there is nothing at a local path, if it is empty, or if it cannot be read.
    """
    place = Path(resolve(source.path))
    try:
        return _load_table(place, source)
    except Exception as error:  # whatever a file or a hub may do, the user must learn which source it was
        # The libraries say of a table without rows that its schema or its first file cannot be found.
        if _is_empty(place) or isinstance(error, IndexError) or "corresponds to no data" in str(error):
            raise ValueError(f"Expected at least one example in {source.path}, but it is empty.") from error
        raise ValueError(
            f"Could not read examples from {source.path!r} (split {source.split!r}): {type(error).__name__}: {error}. "
            "Expected a .jsonl, .json or .parquet file, a folder of them or written by save_to_disk, or a hub name."
        ) from error


def _load_table(place: Path, source: Source) -> Any:
    import datasets  # takes a second to import, which only those who load data should pay

    if place.suffix in FORMATS:
        return datasets.load_dataset(FORMATS[place.suffix], data_files=str(place), split="train")
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        stored = datasets.load_from_disk(str(place))
        return stored[source.split] if isinstance(stored, datasets.DatasetDict) else stored
    return datasets.load_dataset(str(place), source.subset, split=source.split)


def _is_empty(place: Path) -> bool:
    return place.is_file() and place.stat().st_size == 0
