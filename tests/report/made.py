"""Folders as `stable-opd fit` leaves them, with curves made by hand."""

import json
import math
from pathlib import Path

import numpy as np


def noise(count, level=0.0, size=1.0, seed=0):
    return level + size * np.random.default_rng(seed).standard_normal(count)


def ramp(count, start, before, after, over=10):
    """Quiet until a step, then a straight way to another level."""
    return np.interp(np.arange(count), [start, start + over], [before, after])


def collapsing(count=100, start=40):
    """The curves of a collapse: the stop hazard falls first, then length, truncation and repetition rise."""
    return {
        "train/loss": noise(count, 0.5, 0.02, 1),
        "train/loss/divergence": noise(count, 0.5, 0.02, 2),
        "train/truncation_rate": ramp(count, start, 0.0, 1.0),
        "train/repetition_rate": ramp(count, start + 5, 0.0, 0.9, 20),
        "train/length_mean": ramp(count, start - 3, 20.0, 96.0) + noise(count, 0, 0.3, 3),
        "train/stop_hazard": ramp(count, start - 8, 0.05, 0.0) + noise(count, 0, 0.0005, 4),
        "train/repeated_share": ramp(count, start + 4, 0.0, 0.6, 20),
    }


def quiet(count=100):
    """The curves of a run in which nothing happens."""
    return {
        "train/loss": noise(count, 0.5, 0.02, 1),
        "train/truncation_rate": np.zeros(count),
        "train/repetition_rate": np.zeros(count),
        "train/length_mean": noise(count, 20, 0.3, 3),
        "train/stop_hazard": noise(count, 0.05, 0.0005, 4),
        "train/repeated_share": np.zeros(count),
    }


def write_run(folder: Path, train, validation=None, config="model: {lr: 1.0}\n", samples=None, events=None) -> Path:
    """Write a folder as a run does: training rows, and a validation row every 20 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    validation = {"val/accuracy": [0.3, 0.4, 0.5]} if validation is None else validation
    names = ["epoch", "step", *train, *validation]
    rows = []
    for place in range(len(next(iter(validation.values()), []))):
        rows.append({"epoch": 0, "step": 20 * place} | {name: values[place] for name, values in validation.items()})
    for step in range(len(next(iter(train.values()), []))):
        rows.append({"epoch": 0, "step": step} | {name: values[step] for name, values in train.items()})
    rows.sort(key=lambda row: row["step"])
    lines = [",".join(names), *(",".join(_cell(row.get(name)) for name in names) for row in rows)]
    (folder / "metrics.csv").write_text("".join(f"{line}\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    if events is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    return folder


def _cell(value):
    return "" if value is None or (isinstance(value, float) and math.isinf(value)) else str(value)
