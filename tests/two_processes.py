"""What each of two processes does; spawned processes must be able to import it."""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from stable_opd.metrics import (
    LengthInflation,
    LogRatioTail,
    PassAtK,
    RepeatedAdvantage,
    RepetitionRate,
    ResponseLength,
    TruncationRate,
)
from stable_opd.metrics.collections import training_metrics

LIMIT = 20
STEPS = 3
SAMPLES = 4


def batch(rank: int, step: int) -> dict[str, Tensor]:
    """Answers of one process in one step; the processes differ in everything, the number of rows included."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    rows = 3 + 2 * rank + step
    lengths = torch.randint(1, LIMIT - 5 + 5 * rank, (rows,), generator=generator)
    tokens = int(lengths.sum())
    return {
        "truncated": torch.rand(rows, generator=generator) < 0.2 + 0.6 * rank,
        "repetitive": torch.rand(rows, generator=generator) < 0.8 - 0.6 * rank,
        "lengths": lengths,
        "advantage": (1 + rank) * torch.randn(tokens, generator=generator),
        "in_loop": torch.rand(tokens, generator=generator) < 0.2 + 0.2 * rank,
        "grades": (torch.rand(rows, SAMPLES, generator=generator) < 0.1 + 0.5 * rank).float(),
    }


def joined(step: int) -> dict[str, Tensor]:
    """What both processes together have in one step."""
    first, second = batch(0, step), batch(1, step)
    return {name: torch.cat([first[name], second[name]]) for name in first}


def metrics(step_wise: bool) -> dict[str, tuple[Metric, list[str]]]:
    """Every metric with the names of its inputs."""
    return {
        "TruncationRate": (TruncationRate(dist_sync_on_step=step_wise), ["truncated"]),
        "RepetitionRate": (RepetitionRate(dist_sync_on_step=step_wise), ["repetitive"]),
        "ResponseLength": (ResponseLength(LIMIT, dist_sync_on_step=step_wise), ["lengths"]),
        "LengthInflation": (LengthInflation(baseline_steps=2), ["lengths"]),
        "RepeatedAdvantage": (RepeatedAdvantage(dist_sync_on_step=step_wise), ["advantage", "in_loop"]),
        "PassAtK": (PassAtK(SAMPLES, dist_sync_on_step=step_wise), ["grades"]),
        "LogRatioTail": (LogRatioTail(dist_sync_on_step=step_wise), ["advantage"]),
    }


def run(source) -> dict[str, list]:
    """Feed all steps to all metrics, by update and by forward, and to the collection that the module uses."""
    record: dict[str, list] = {}
    for name, (metric, inputs) in metrics(step_wise=False).items():
        for step in range(STEPS):
            metric.update(**{each: source(step)[each] for each in inputs})
        # The second compute must not add up what has already been added up.
        record[f"{name}.compute"] = [metric.compute(), metric.compute()]
    for name, (metric, inputs) in metrics(step_wise=True).items():
        record[f"{name}.forward"] = [metric(**{each: source(step)[each] for each in inputs}) for step in range(STEPS)]
    collection = training_metrics(LIMIT)
    record["collection"] = [report(collection, source(step)) for step in range(STEPS)]
    return record


def report(collection: MetricCollection, facts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Report one step as the module does: only the inflation of the length remembers the steps before."""
    collection.update(**facts)
    found = collection.compute()
    for metric in collection.values():
        if not isinstance(metric, LengthInflation):
            metric.reset()
    return found


def worker(rank: int, folder: str) -> None:
    """Run as one of two processes, and leave the results behind."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.save(run(lambda step: batch(rank, step)), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def fit(commands: list[list[str]], folder: str, port: int) -> list[list[str]]:
    """Run commands in two processes, one after the other in the same two, which takes less time than to start each.

    Returns:
        For each process, what each command raised, or nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stable_opd.cli"])
    inboxes = [context.Queue() for _ in range(2)]
    workers = [context.Process(target=_fit, args=(rank, commands, folder, port, inboxes[rank])) for rank in range(2)]
    for each in workers:
        each.start()
    try:
        return [each.get(timeout=100) for each in inboxes]
    finally:
        for each in workers:
            each.join(10)
            each.kill()


def _fit(rank: int, commands: list[list[str]], folder: str, port: int, inbox) -> None:
    from stable_opd.cli import main
    from stable_opd.skips import NonFiniteError

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"TORCHELASTIC_RUN_ID": "tests"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.chdir(folder)
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    sys.argv = ["stable-opd"]
    raised = []
    for command in commands:
        raised.append("")
        try:
            main(command)
        except Exception as error:
            raised[-1] = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            if not isinstance(error, NonFiniteError):  # the other one would wait
                break
    inbox.put(raised)
