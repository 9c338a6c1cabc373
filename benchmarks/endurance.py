"""A long run, and whether it grows: memory, open files, threads, and the time that a step takes.

    python -m benchmarks.endurance

runs `stable-opd fit` on the embedded testbed for 2000 steps, with the whole recipe and all callbacks that a run has by
itself, and looks at its own process after every evaluation. The table and the picture go to
benchmarks/results/reliability/. It takes some ten minutes on one core.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmarks.runs import RESULTS, ROOT, STABLE, versions
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Steps between two evaluations; each is followed by a checkpoint and a look.
EVERY = 20
#: Share of the run that may be used up by what is made once: caches, pools of memory, compiled code.
WARM = 0.1


class Quantity(NamedTuple):
    """Something that must not grow.

    Attributes:
        key: Its name in the records.
        name: What it is called, with its unit.
        bound: How much the trend may add to it in the course of the whole run.
        relative: Whether the bound is a share of the median.
    """

    key: str
    name: str
    bound: float
    relative: bool = False


QUANTITIES = (
    Quantity("memory", "resident memory, MiB", 16.0),
    Quantity("files", "open file handles", 0.5),
    Quantity("threads", "threads", 0.5),
    Quantity("step", "CPU time of a training step per token written, µs", 0.05, relative=True),
    # Every checkpoint holds the metrics so far, which are not quite 1 kB a step.
    Quantity("rest", "CPU time of an evaluation, a checkpoint and the logs, ms", 0.20, relative=True),
)


class Watcher(Callback):
    """Looks at its process after every evaluation, and writes what it sees.

    CPU time is that of the process, so other processes on the machine do not show in it.

    Args:
        path: File that gets one JSON object per line.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.steps = self.tokens = self.began = 0.0
        self.looked = time.process_time()

    def on_train_batch_start(self, *_: Any) -> None:
        """Look at the clock."""
        self.began = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add up the step; every so many steps, look around before the evaluation."""
        self.steps += time.process_time() - self.began
        figures: Any = pl_module.report.figures  # type: ignore[union-attr]
        rows = trainer.datamodule.batch_size * pl_module.rollout_options.samples_per_prompt  # type: ignore
        self.tokens += float(figures["train/length_mean"]) * rows
        if trainer.global_step % EVERY:
            return
        now = time.process_time()
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        seen = {
            "steps": trainer.global_step,
            "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "python_threads": threading.active_count(),
            "step": 1e6 * self.steps / self.tokens,
            "rest": 1e3 * (now - self.looked - self.steps),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(seen) + "\n")
        self.steps = self.tokens = 0.0
        self.looked = now


@dataclass(frozen=True)
class Trend:
    """How a quantity changes over the run.

    Attributes:
        median: Its median.
        growth: What the trend adds to it in the course of the run.
        low: Lower end of the interval of that, 95 %.
        high: Upper end.
    """

    median: float
    growth: float
    low: float
    high: float

    def holds(self, quantity: Quantity) -> bool:
        """Return whether even the upper end is within the bound."""
        return self.high <= quantity.bound * (self.median if quantity.relative else 1.0)


def trend(steps: Array, values: Array) -> Trend:
    """Fit a line by the median of the slopes of all pairs (Theil 1950), with the interval of Sen (1968).

    Outliers, such as a sample in which memory was collected, do not move it. The interval takes samples for
    independent.
    """
    one, two = np.triu_indices(len(steps), 1)
    slopes = np.sort((values[two] - values[one]) / (steps[two] - steps[one]))
    count, samples = len(slopes), len(steps)
    # Of Kendall's statistic; 1.96 standard deviations of it.
    spread = 1.96 * np.sqrt(samples * (samples - 1) * (2 * samples + 5) / 18)
    low, high = int(max((count - spread) / 2, 0)), int(min((count + spread) / 2, count - 1))
    length = steps[-1] - steps[0]
    ends = (float(each * length) for each in (np.median(slopes), slopes[low], slopes[high]))
    return Trend(float(np.median(values)), *ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "endurance")
    parser.add_argument("--results", type=Path, default=RESULTS / "reliability")
    chosen = parser.parse_args()
    records = chosen.out.resolve() / "looks.jsonl"
    command = [
        *("fit", "-c", STABLE, "--seed_everything", str(chosen.seed), "--trainer.max_steps", str(chosen.steps)),
        *("--trainer.val_check_interval", str(EVERY)),
        *("--trainer.logger.save_dir", str(chosen.out), "--trainer.logger.name", "run"),
    ]
    shutil.rmtree(chosen.out, ignore_errors=True)
    records.parent.mkdir(parents=True)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    watcher = {"class_path": "benchmarks.endurance.Watcher", "init_args": {"path": str(records)}}
    began = time.monotonic()
    _fit([*command, "--trainer.callbacks", json.dumps([watcher])])
    looks = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    sys.exit(not write(chosen, command, looks, time.monotonic() - began))


def _fit(command: Sequence[str]) -> None:
    from stable_opd.cli import main as run

    sys.argv = ["stable-opd"]
    run(command)


def write(chosen: argparse.Namespace, command: Sequence[str], looks: list[dict[str, float]], seconds: float) -> bool:
    """Write the table and the picture; return whether nothing grew by more than its bound."""
    warm = [look for look in looks if look["steps"] > WARM * chosen.steps]
    steps = np.array([look["steps"] for look in warm], dtype=np.float64)
    trends = {each: trend(steps, np.array([look[each.key] for look in warm])) for each in QUANTITIES}
    holds = all(found.holds(each) for each, found in trends.items())
    chosen.results.mkdir(parents=True, exist_ok=True)
    _draw(looks, chosen.results / "endurance.png")
    text = [
        *("# A long run", ""),
        f"Made by `python -m benchmarks.endurance --steps {chosen.steps} --seed {chosen.seed}` with {versions()},",
        f"on a CPU, one thread, in {seconds / 60:.0f} minutes. The run is",
        "",
        f"    stable-opd {' '.join(_shown(command, chosen.out))}",
        "",
        f"with all callbacks that a run has by itself. Its process was looked at every {EVERY} steps; the first",
        f"{WARM:.0%} of the run are left out. The trend is the median of the slopes of all pairs of looks (Theil,",
        "Sen), times the length of the run; a quantity passes if even the upper end of its interval is within the",
        "bound. Intervals of a short run are wide: below some 1000 steps the times may fail by chance.",
        "",
        f"**{'PASS' if holds else 'FAIL'}** over {chosen.steps} steps and {len(warm)} looks.",
        "",
        "| quantity | median | the run adds | 95 % interval | bound | |",
        "|---|---|---|---|---|---|",
        *(_row(each, found) for each, found in trends.items()),
        *("", "![The quantities over the run](endurance.png)", ""),
    ]
    (chosen.results / "endurance.md").write_text("\n".join(text), encoding="utf-8")
    return holds


def _shown(command: Sequence[str], out: Path) -> list[str]:
    return ["runs/endurance" if each == str(out) else each for each in command]


def _row(quantity: Quantity, found: Trend) -> str:
    bound = f"{quantity.bound:.0%} of the median" if quantity.relative else f"{quantity.bound:g}"
    verdict = "PASS" if found.holds(quantity) else "FAIL"
    interval = f"{found.low:+.3g} to {found.high:+.3g}"
    return f"| {quantity.name} | {found.median:.4g} | {found.growth:+.3g} | {interval} | {bound} | {verdict} |"


def _draw(looks: list[dict[str, float]], path: Path) -> None:
    """Draw each quantity over the steps, those of the warm-up too."""
    mpl.use("Agg")
    figure, axes = plt.subplots(
        len(QUANTITIES), 1, figsize=(7, 1.5 * len(QUANTITIES)), sharex=True, layout="constrained"
    )
    for axis, quantity in zip(axes, QUANTITIES, strict=True):
        axis.plot([look["steps"] for look in looks], [look[quantity.key] for look in looks], color="#1f6fb2", lw=1)
        axis.set_title(quantity.name, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
