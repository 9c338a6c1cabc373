"""Killing a run at random moments, over and over, and comparing what comes out with a run that nobody killed.

    python -m benchmarks.kills

starts `stable-opd fit` on the embedded testbed, ends it by SIGKILL or SIGTERM after a random time, and starts the same
command again until the run is finished; and then the next run, until there were enough kills. The final weights, the
state of the optimizer, the metrics and the sample answers of each run are compared bit for bit. The table goes to
benchmarks/results/reliability/.
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
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from benchmarks.runs import RESULTS, ROOT, STABLE, versions
from tqdm import tqdm

from stable_opd.resume import checkpoints

FLAGS = (
    *("-c", STABLE, "--ckpt_path", "last", "--checkpoint.every_n_steps", "3", "--trainer.max_steps", "24"),
    *("--trainer.val_check_interval", "8", "--trainer.limit_val_batches", "1", "--data.eval_batch_size", "32"),
    *("--data.batch_size", "8", "--model.rollout.max_new_tokens", "32", "--trainer.enable_progress_bar", "false"),
)
#: Parts of a checkpoint that are compared.
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


def start(out: Path, name: str) -> ForkServerProcess:
    """Start the command in a process that has imported the library already."""
    place = ("--trainer.logger.save_dir", str(out), "--trainer.logger.name", name, "--trainer.logger.version", "0")
    process = CONTEXT.Process(target=_fit, args=(["fit", *FLAGS, *place], out / f"{name}.txt"))
    process.start()
    return process


def _fit(arguments: list[str], log: Path) -> None:
    from stable_opd.cli import main

    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = ["stable-opd"]
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


def torture(out: Path, name: str, kills: int, span: float, rng: random.Random, bar: tqdm) -> Counter[str]:
    """Kill a run until it is finished, or until there were enough kills; then let it finish.

    Returns:
        How many attempts ended in which way.
    """
    ends: Counter[str] = Counter()
    while True:
        process = start(out, name)
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        process.join(rng.uniform(0, span) if kills > sum(ends.values()) else None)
        if process.is_alive():
            os.kill(process.pid, number)
            process.join()
        if process.exitcode == 0:
            return ends
        if process.exitcode not in (-signal.SIGKILL, -signal.SIGTERM, 143):
            raise RuntimeError(f"An attempt at {name} failed; see {out / name}.txt")
        found = checkpoints(out / name / "version_0" / "checkpoints")
        ends[f"{number.name} {'before' if not found else 'after'} the first checkpoint"] += 1
        if process.exitcode == 143:
            ends["exit status 143"] += 1
        bar.update()


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
    start(chosen.out, "warm").join()  # whoever is first waits for the imports
    began = time.monotonic()
    start(chosen.out, "whole").join()
    span = time.monotonic() - began
    expected = result(chosen.out, "whole")
    lines, ends, different = [], Counter[str](), 0
    while bar.n < chosen.kills:
        name = f"killed-{len(lines)}"
        before = bar.n
        ends += torture(chosen.out, name, chosen.kills - before, span, rng, bar)
        wrong = [part for part, value in result(chosen.out, name).items() if value != expected[part]]
        different += bool(wrong)
        lines.append(f"| {name} | {bar.n - before} | {', '.join(wrong) or 'none'} |")
        write(chosen, span, lines, ends, different)


def write(chosen: argparse.Namespace, span: float, lines: list[str], ends: Counter[str], different: int) -> None:
    """Write the table; of the runs so far, as a run may take long."""
    path = RESULTS / "reliability" / "kills.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    kills = sum(count for end, count in ends.items() if end.startswith("SIG"))
    text = [
        *("# Runs that were killed at random moments", ""),
        f"Made by `python -m benchmarks.kills --kills {chosen.kills} --seed {chosen.seed}` with {versions()},",
        "on a CPU, one process. An uninterrupted run has 24 steps, a checkpoint after every third, and took",
        f"{span:.0f} s; an attempt was ended after a time drawn uniformly from that, by SIGKILL twice as often as by",
        "SIGTERM.",
        "",
        f"**{kills} kills; {different} of {len(lines)} runs differ from the uninterrupted one**, in weights,",
        "optimizer, schedule of the learning rate, counters, metrics (without times) or sample answers.",
        *("", "| how an attempt ended | times |", "|---|---|"),
        *(f"| {end} | {count} |" for end, count in sorted(ends.items())),
        *("", "| run | kills | what differs |", "|---|---|---|", *lines, ""),
    ]
    path.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
