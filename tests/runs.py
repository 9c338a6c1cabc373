"""Small runs of the command line: a recipe to depart from, what was logged, and whether two states are the same."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

#: Figures that depend on the clock begin so.
CLOCK = ("time/", "throughput/")


def write_recipe(
    place: Path, student: str, teacher: str, train: str, validation: Any, model: Mapping = {}, **more: Mapping
) -> Path:
    """Write `recipe.yaml` into a folder, and return the folder.

    Args:
        place: The folder.
        student: Path of a model.
        teacher: Path of another.
        train: Path of its examples.
        validation: Path of others, or the settings of several sets.
        model: Departures from the parts of the model.
        more: Departures from ``data`` (its arguments), ``trainer`` and so on.
    """
    sets = {"path": validation} if isinstance(validation, str) else validation
    data = {"train": {"path": train}, "validation": sets, "task": "ModularChains", **more.pop("data", {})}
    config = {
        "model": {
            "student": student,
            "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher}},
            "divergence": "ReverseKL",
            "mixture": "GoldenMixture",
            "repetition": {"class_path": "PeriodicSuffix", "init_args": {"min_tokens": 3, "max_period": 4}},
            "rollout": {"samples_per_prompt": 2, "max_new_tokens": 10},
            **model,
        },
        "data": {"class_path": "PromptDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, **more.pop("trainer", {})},
        **more,
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(config))
    return place


def logged(folder: Path) -> list[dict[str, str]]:
    """Return the figures of a run that do not depend on the clock; nan is text here, and so equal to itself."""
    with (folder / "metrics.csv").open() as file:
        return [{name: row[name] for name in row if not name.startswith(CLOCK)} for row in csv.DictReader(file)]


def same(one: Any, other: Any, where: str = "state") -> None:
    """Compare whatever a checkpoint holds, bit for bit."""
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (first, second) in enumerate(zip(one, other, strict=True)):
            same(first, second, f"{where}[{place}]")
    else:
        assert one == other, where
