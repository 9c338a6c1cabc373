"""Runs of `stable-opd fit` beside each other, each in a process and a folder of its own, and what became of them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OPD, STABLE = "configs/collapse.yaml", "configs/quickstart.yaml"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Folder of its variant.
        flags: The arguments of `stable-opd fit` that make the variant.
        seed: Its seed.
    """

    name: str
    flags: tuple[str, ...]
    seed: int = 0

    def command(self, out: Path) -> list[str]:
        """Return the command; it can be pasted."""
        logger = ["--trainer.logger.save_dir", str(out), "--trainer.logger.name", self.name]
        place = ["--seed_everything", str(self.seed), *logger, "--trainer.logger.version", f"seed-{self.seed}"]
        return ["stable-opd", "fit", *self.flags, *place]

    def folder(self, out: Path) -> Path:
        """Return where its files are."""
        return out / self.name / f"seed-{self.seed}"

    def execute(self, out: Path) -> None:
        """Run it, unless the same command was run to its end already.

        Raises:
            RuntimeError: If it fails.
        """
        folder, command = self.folder(out), self.command(out)
        done = folder / "done"
        if done.exists() and done.read_text(encoding="utf-8") == " ".join(command):
            return
        folder.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "stable_opd", *command[1:]]
        # Tiny models gain nothing from a second thread; runs side by side do.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            ended = subprocess.run(argv, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(argv)} failed; see {folder / 'log.txt'}")
        done.write_text(" ".join(command), encoding="utf-8")

    def curves(self, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the training and the validation rows."""
        table = pd.read_csv(self.folder(out) / "metrics.csv")
        return table[table["train/loss"].notna()], table[table["val/accuracy"].notna()]


def execute_all(work: Sequence[Run], out: Path, jobs: int | None) -> dict[str, str]:
    """Run everything, some side by side; return the reason of each run that failed, by its name."""
    failed = {}

    def attempt(run: Run) -> None:
        try:
            run.execute(out)
        except RuntimeError as error:
            failed[run.name] = str(error)

    with ThreadPoolExecutor(jobs) as pool:
        for _ in tqdm(pool.map(attempt, work), total=len(work), desc="runs"):
            pass
    return failed


def onset(train: pd.DataFrame) -> dict[str, float]:
    """Return when a training gets loud and when it has collapsed.

    ``quiet_steps``: steps before truncation first reaches 0.1 or repetition 0.02. ``onset_steps``: from then until
    truncation first exceeds 0.9 and repetition has exceeded 0.3; nan if they never do.
    """
    truncation, repetition = (train[f"train/{name}_rate"].dropna().to_numpy() for name in ("truncation", "repetition"))
    loud = (truncation >= 0.1) | (repetition >= 0.02)
    collapsed = (truncation > 0.9) & (np.maximum.accumulate(repetition) > 0.3)
    start = int(loud.argmax()) if loud.any() else len(loud)
    return {
        "max_truncation": truncation.max(),
        "max_repetition": repetition.max(),
        "quiet_steps": start,
        "onset_steps": collapsed.argmax() - start if collapsed.any() else np.nan,
        "final_truncation": truncation[-10:].mean(),
        "final_repetition": repetition[-10:].mean(),
    }


def versions() -> str:
    """Return the versions that the numbers belong to."""
    return ", ".join(f"{name} {version(name)}" for name in ("stable-opd", "torch", "lightning", "transformers"))
