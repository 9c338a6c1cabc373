"""Killing a run at random moments, over and over, and comparing what comes out with a run that nobody killed.

    python -m benchmarks.kills

starts a short `stable-opd fit` on the embedded testbed, ends it by SIGKILL or SIGTERM at a random moment of a random
phase, and starts the same command again, until the run is finished; and then the next run, until there were enough
kills. What each run leaves is compared bit for bit with what a run leaves that nobody killed. The table goes to
benchmarks/results/reliability/. 100 kills take some five minutes on one core.
"""

import argparse
import csv
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from benchmarks.runs import RESULTS, ROOT, STABLE, versions
from tqdm import tqdm

from stable_opd.resume import checkpoints

STEPS = 24
FLAGS = (
    *("-c", STABLE, "--ckpt_path", "last", "--checkpoint.every_n_steps", "2", "--trainer.max_steps", str(STEPS)),
    *("--trainer.val_check_interval", "6", "--trainer.limit_val_batches", "1", "--data.eval_batch_size", "8"),
    *("--data.batch_size", "6", "--model.rollout.max_new_tokens", "32", "--trainer.enable_progress_bar", "false"),
    *("--model.reference", "MovingAverage", "--model.constraints.anchor.controller", "DualAscent"),
)
#: What a run does, in the words of the table.
PHASES = ("start", "evaluation", "rollout", "scoring", "backward", "update", "checkpoint", "between", "end")
#: Those that are aimed at; the rest is met on the way.
AIMS = ("start", "evaluation", "rollout", "scoring", "backward", "update", "checkpoint", "between")
#: Steps after a start within which the signal comes; two of them are from one checkpoint to the next.
WITHIN = 5
#: Parts of a checkpoint that are compared.
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "reference", "global_step", "epoch")


@dataclass
class Kill:
    """A signal that a run got.

    Attributes:
        name: Of the signal.
        phase: What the run was doing.
        end: How the process ended.
    """

    name: str
    phase: str
    end: str


@dataclass
class Attempts:
    """The kills of one run.

    Attributes:
        name: Its folder.
        kills: What it got.
        different: What it left that a run without kills leaves otherwise.
    """

    name: str
    kills: list[Kill] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


class Place:
    """Where a run is; memory that its process shares with this one, so that it can be read after a SIGKILL."""

    def __init__(self) -> None:
        self.numbers = CONTEXT.Array("i", 2, lock=False)

    @property
    def phase(self) -> str:
        """What it does."""
        return PHASES[self.numbers[0]]

    @property
    def step(self) -> int:
        """Steps that this attempt has begun."""
        return int(self.numbers[1])

    def enter(self, phase: str) -> str:
        """Note a phase, and return the one before."""
        before = self.phase
        self.numbers[0] = PHASES.index(phase)
        return before

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Note a phase while it lasts; what an evaluation does is evaluation."""
        before = self.enter(phase)
        if before == "evaluation":
            self.enter(before)
        yield
        self.enter(before)

    def follow(self) -> None:
        """Have the library note where it is, in this process."""
        from stable_opd.callbacks import RunCheckpoint
        from stable_opd.learning import Learner
        from stable_opd.module import OPDModule

        def noted(owner: type, name: str, phase: str) -> None:
            plain: Callable[..., Any] = getattr(owner, name)

            def run(*given: Any, **named: Any) -> Any:
                with self.within(phase):
                    return plain(*given, **named)

            setattr(owner, name, run)

        def begin(*given: Any) -> None:
            self.numbers[1] += 1
            self.enter("between")
            step(*given)

        step = OPDModule.training_step
        OPDModule.training_step = begin
        noted(OPDModule, "write", "rollout")
        noted(OPDModule, "validation_step", "evaluation")
        noted(OPDModule, "on_validation_epoch_end", "evaluation")
        noted(OPDModule, "manual_backward", "backward")
        noted(Learner, "arrange", "scoring")
        noted(Learner, "learn", "scoring")
        noted(Learner, "sum_up", "update")
        noted(Learner, "update", "update")
        noted(RunCheckpoint, "_save", "checkpoint")
        noted(RunCheckpoint, "on_train_end", "end")


def start(out: Path, name: str) -> tuple[ForkServerProcess, Place]:
    """Start the command in a process that has imported the library already."""
    logger = ("--trainer.logger.save_dir", str(out), "--trainer.logger.name", name, "--trainer.logger.version", "0")
    place = Place()
    process = CONTEXT.Process(target=_fit, args=(["fit", *FLAGS, *logger], out / f"{name}.txt", place))
    process.start()
    return process, place


def _fit(arguments: list[str], log: Path, place: Place) -> None:
    from stable_opd.cli import main

    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = ["stable-opd"]
    place.follow()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        main(arguments)


CONTEXT = multiprocessing.get_context("forkserver")


def result(out: Path, name: str) -> dict[str, str]:
    """Return a fingerprint of each thing that a finished run left."""
    folder = out / name / "version_0"
    state = torch.load(checkpoints(folder / "checkpoints")[0], weights_only=True)
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figures = [{key: row[key] for key in row if not key.startswith(("time/", "throughput/"))} for row in rows]
    found = {part: state[part] for part in PARTS}
    found |= {name: each for name, each in state["callbacks"].items() if name.startswith("CollapseGuard")}
    found |= {"metrics.csv": figures, "samples.jsonl": (folder / "samples.jsonl").read_text(encoding="utf-8")}
    return {part: digest(value) for part, value in found.items()}


def digest(value: Any) -> str:
    """Return a fingerprint that two values share only if they are the same bit for bit."""
    if isinstance(value, torch.Tensor):
        content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() + repr(value.shape).encode()
    elif isinstance(value, dict):
        content = "".join(f"{key!r}{digest(each)}" for key, each in value.items()).encode()
    elif isinstance(value, list | tuple):
        content = "".join(map(digest, value)).encode()
    else:
        content = repr(value).encode()
    return hashlib.sha256(content).hexdigest()


def strike(process: ForkServerProcess, place: Place, startup: float, rng: random.Random) -> Kill | None:
    """End an attempt at a random moment of a random phase; return None if it was finished before.

    The moment is some milliseconds after the phase has begun in one of the next steps, so that it lies in it or shortly
    behind.
    """
    number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    aim, step, delay = rng.choice(AIMS), rng.randint(1, WITHIN), rng.random()
    if aim == "start":
        process.join(startup * delay)
    else:
        while process.is_alive() and not (place.step >= step and place.phase == aim):
            time.sleep(0.0005)
        # Rollout and evaluation take longer than the other phases.
        process.join(delay * (0.05 if aim in ("rollout", "evaluation") else 0.01))
    if not process.is_alive():
        return None
    phase = place.phase
    os.kill(process.pid or 0, number)
    process.join()
    if number == signal.SIGKILL:
        phase = place.phase  # it is dead, and this is where it was
    ends = {-signal.SIGKILL: "at once", -signal.SIGTERM: "at once", 143: "after the step, with 143", 0: "finished"}
    if process.exitcode not in ends:
        raise RuntimeError(f"An attempt ended with {process.exitcode}.")
    return Kill(number.name, phase, ends[process.exitcode])


def torture(out: Path, name: str, kills: int, startup: float, rng: random.Random, bar: tqdm) -> Attempts:
    """Kill a run until it is finished, or until there were enough kills; then let it finish."""
    made = Attempts(name)
    while True:
        process, place = start(out, name)
        kill = strike(process, place, startup, rng) if len(made.kills) < kills else None
        process.join()
        if kill is not None:
            made.kills.append(kill)
            bar.update()
        if process.exitcode == 0:
            return made
        if kill is None:
            raise RuntimeError(f"An attempt at {name} failed; see {out / name}.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kills")
    chosen = parser.parse_args()
    shutil.rmtree(chosen.out, ignore_errors=True)
    chosen.out.mkdir(parents=True)
    CONTEXT.set_forkserver_preload(["stable_opd.cli"])
    rng, bar = random.Random(chosen.seed), tqdm(total=chosen.kills, desc="kills")
    start(chosen.out, "warm")[0].join()  # whoever is first waits for the imports
    began = time.monotonic()
    process, place = start(chosen.out, "whole")
    while process.is_alive() and not place.step:
        time.sleep(0.001)
    startup = time.monotonic() - began
    process.join()
    span, expected = time.monotonic() - began, result(chosen.out, "whole")
    made: list[Attempts] = []
    while bar.n < chosen.kills:
        each = torture(chosen.out, f"killed-{len(made)}", chosen.kills - bar.n, startup, rng, bar)
        each.different = [part for part, value in result(chosen.out, each.name).items() if value != expected[part]]
        made.append(each)
        write(chosen, span, made)
    sys.exit(any(each.different for each in made))


def write(chosen: argparse.Namespace, span: float, made: list[Attempts]) -> None:
    """Write the table; of the runs so far, as all of them may take long."""
    path = RESULTS / "reliability" / "kills.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    kills = [kill for each in made for kill in each.kills]
    different = sum(bool(each.different) for each in made)
    counts = Counter((kill.phase, kill.name, kill.end) for kill in kills)
    columns = sorted({(kill.name, kill.end) for kill in kills})
    text = [
        *("# Runs that were killed at random moments", ""),
        f"Made by `python -m benchmarks.kills --kills {chosen.kills} --seed {chosen.seed}` with {versions()},",
        f"on a CPU, one process. An uninterrupted run has {STEPS} steps, a checkpoint after every second, an",
        f"evaluation after every sixth, and took {span:.0f} s. Each attempt got a signal at a random moment of a",
        f"random phase in one of its first {WITHIN} steps, SIGKILL twice as often as SIGTERM, and was then started",
        "again by the same command.",
        "",
        f"**{len(kills)} kills; {different} of {len(made)} runs differ from the uninterrupted one**, bit for bit, in",
        "weights, optimizer, schedule of the learning rate, moving reference, counters, the guard's memory, metrics",
        "(without times) or sample answers.",
        *("", "What the run was doing, and how the process ended:", ""),
        "| phase | " + " | ".join(f"{name}: {end}" for name, end in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(
            f"| {phase} | " + " | ".join(str(counts[phase, *column]) for column in columns) + " |"
            for phase in PHASES
            if any(counts[phase, *column] for column in columns)
        ),
        *("", "| run | kills | what differs |", "|---|---|---|"),
        *(f"| {each.name} | {len(each.kills)} | {', '.join(each.different) or 'none'} |" for each in made),
        "",
    ]
    path.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
