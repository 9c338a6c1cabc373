"""Reading what `stable-opd fit` left behind."""

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stable_opd.bench.yamls import SpecError, load
from stable_opd.callbacks.samples import SAMPLES
from stable_opd.guard.callback import EVENTS
from stable_opd.jsonl import read_records
from stable_opd.signals.changes import Array

METRICS, CONFIG = "metrics.csv", "config.yaml"

_SEED = re.compile(r"[-_/. ]*(?<![a-z0-9])seed[-_= ]?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Curves:
    """Some rows of a table of metrics.

    Attributes:
        steps: Step of each row, (n,).
        columns: The values of each column, nan where there are none, (n,) each.
    """

    steps: Array
    columns: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        """Return a column; all nan if there is none of that name."""
        return self.columns[name] if name in self.columns else np.full(len(self.steps), np.nan)

    def has(self, name: str) -> bool:
        """Whether a column has a finite value."""
        return bool(np.isfinite(self[name]).any())

    def named(self, prefix: str) -> list[str]:
        """Return the names of the columns with values that begin with a prefix, in order."""
        return [name for name in self.columns if name.startswith(prefix) and self.has(name)]


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: Where.
        name: What tells it from the other runs.
        train: A row per logged training step.
        validation: A row per evaluation.
        config: What it was told, resolved; empty if the file is missing.
        config_text: The same as it was written.
        samples: Some answers of the evaluations, in the order in which they were written.
        events: What the guard noticed and did, in the order in which it happened.
    """

    folder: Path
    name: str
    train: Curves
    validation: Curves
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    samples: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Mapping[str, Any]] = ()

    @property
    def variant(self) -> str:
        """The name without a seed: runs that share it are seeds of one variant."""
        return _SEED.sub("", self.name).strip("/-_ ") or self.name


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read all runs in some folders.

    Args:
        paths: Folders of runs, or folders that hold such folders at any depth.

    Raises:
        ValueError: If a path holds no run, or the file of a run has no metrics.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _folders(Path(path))))
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Read one run; a missing configuration or missing samples leave those empty.

    Raises:
        ValueError: If its metrics cannot be read.
    """
    table = read_metrics(folder / METRICS)
    text, config = _read_config(folder / CONFIG)
    return Run(
        folder,
        name,
        _rows(table, "train/"),
        _rows(table, "val/"),
        config,
        text,
        read_records(folder / SAMPLES),
        read_records(folder / EVENTS),
    )


def read_metrics(path: Path) -> dict[str, Array]:
    """Read a table of metrics, without a row that was cut when the process was killed; a cell without number is nan.

    Raises:
        ValueError: If it has no ``step`` column or no complete row.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # behind the last line break stands what was being written
    try:
        head, *rows = list(csv.reader(whole.replace("\0", "").splitlines())) or [[]]
    except csv.Error as error:
        raise ValueError(
            f"Expected {path} to be a table of metrics, but got {error}. Take it out of the folder."
        ) from error
    rows = [row for row in rows if len(row) == len(head)]
    if "step" not in head or not rows:
        raise ValueError(
            f"Expected {path} to have a step column and at least one complete row, but got "
            f"{', '.join(head[:5]) or 'no columns'} and {len(rows)} rows. Was the run stopped before its first step?"
        )
    cells = np.array([[_number(cell) for cell in row] for row in rows])
    table = dict(zip(head, cells.T, strict=True))
    placed = np.isfinite(table["step"])
    return {name: column[placed] for name, column in table.items()}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested configuration by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the dotted names whose values differ between configurations, with all values; "-" where there is none."""
    leaves = [flat(config) for config in configs]
    names = sorted({name for each in leaves for name in each})
    values = {name: [each.get(name, "-") for each in leaves] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def _rows(table: Mapping[str, Array], prefix: str) -> Curves:
    """Return the rows with a value of the prefix; of two for one step the later, as a run may go on in its folder."""
    columns = {name: column for name, column in table.items() if name != "step"}
    mine = [column for name, column in columns.items() if name.startswith(prefix)]
    there = np.isfinite(np.array(mine)).any(0) if mine else np.zeros(len(table["step"]), dtype=bool)
    places = np.flatnonzero(there)
    latest = dict(zip(table["step"][places].tolist(), places.tolist(), strict=True))
    order = np.array([latest[step] for step in sorted(latest)], dtype=int)
    return Curves(table["step"][order], {name: column[order] for name, column in columns.items()})


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


def _read_config(path: Path) -> tuple[str, Mapping[str, Any]]:
    """Return a configuration as text and as data; what is not YAML is shown as text alone."""
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load(text, str(path))
    except SpecError:
        return text, {}
    return text, config if isinstance(config, dict) else {}


def _folders(path: Path) -> list[Path]:
    """Return the folders of runs in a path.

    Raises:
        ValueError: If there is none.
    """
    found = [path] if (path / METRICS).is_file() else [each.parent for each in sorted(path.rglob(METRICS))]
    if not found:
        state = "it does not exist" if not path.exists() else f"there is no {METRICS} in it"
        raise ValueError(
            f"Expected a folder that `stable-opd fit` left, or one that holds such folders, but got {path}: {state}. "
            "Name the folder that the run printed, or run with CSVLogger, which is the default."
        )
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the paths of the folders without what all begin or end with; the last two parts if there is only one."""
    whole = [folder.resolve() for folder in folders]
    if len(whole) == 1:
        return ["/".join(whole[0].parts[-2:]).lstrip("/")]
    common = Path(os.path.commonpath([folder.parent for folder in whole]))
    parts = [folder.relative_to(common).parts for folder in whole]
    while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    return ["/".join(each) for each in parts]
