"""The parts of the benchmark: each starts workers, lets them take turns, and returns what goes into the results."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.speed.losses import LossCell
from benchmarks.speed.roofline import decode_roofline
from benchmarks.speed.stats import Interval, Side, fit, rate, ratio, summary, typical
from benchmarks.speed.turns import Job, Worker, ask, enter_all, interleave
from benchmarks.speed.workload import PROMPT_TOKENS, Cell, Grid, Workshop, expected_longest

WARM_UP = 3
#: The least that our default engine must reach over `TransformersEngine`, in tokens per second. Loose, because it is
#: checked on shared machines.
SMOKE_FLOOR = 1.1
SMOKE_CELL = Cell(16, 32, 16)
GATE_CELL = Cell(8, 48, 48)

Result = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all parts share.

    Attributes:
        shop: Makes models and prompts.
        grid: What is measured.
        logs: Folder for the output of the workers.
        device: ``cpu`` or ``cuda``.
        precision: Lightning's name for it.
        threads: Threads of a worker.
        seconds: How long the turns of one cell go on, at least.
        rounds: How many rounds of turns a cell has, at least.
        samples: Answers per prompt.
    """

    shop: Workshop
    grid: Grid
    logs: Path
    device: str = "cpu"
    precision: str = "32-true"
    threads: int = 2
    seconds: float = 60.0
    rounds: int = 5
    samples: int = 4

    def job(self, contestant: str, cell: Cell, **options: Any) -> Job:
        """Return the job of training on a cell."""
        settings = {
            "student": str(self.shop.student(cell)),
            "teacher": str(self.shop.teacher()),
            "prompts": str(self.shop.prompts(cell)),
            "rows": cell.rows,
            "samples": self.samples,
            "limit": cell.limit,
            "precision": self.precision,
        }
        return Job(contestant, settings | options, self.threads, self.device)

    def loss_job(self, loss: str, cell: LossCell) -> Job:
        """Return the job of taking the loss alone."""
        return Job("loss", {"loss": loss, **asdict(cell)}, self.threads, self.device)

    def take_turns(self, workers: Sequence[Worker], steps: int = 2) -> list[list[Side]]:
        """Let workers take turns for as long as a cell lasts."""
        return interleave(workers, self.seconds, steps, least=self.rounds)


def gate(bench: Bench) -> Result:
    """Compare what both sides compute.

    Raises:
        SystemExit: If it is not the same; then no timing would mean anything.
    """
    models = {"student": str(bench.shop.peaked("student")), "teacher": str(bench.shop.peaked("teacher"))}
    job = bench.job("gate", GATE_CELL, **models)
    found = ask(job, bench.logs / "gate.log")
    if not found["passed"]:
        raise SystemExit(f"The two sides do not compute the same, so nothing was timed: {found}")
    return found


def faster_cache(bench: Bench, cell: Cell, stack: ExitStack) -> tuple[dict[str, float], Worker]:
    """Return the tokens per second of TRL with either of its caches, and the faster one, ready to go on."""
    jobs = {"dynamic": bench.job("trl", cell), "static": bench.job("trl", cell, cache="static")}
    workers = enter_all(stack, jobs, bench.logs / f"{cell.name}-trl", WARM_UP)
    sides = interleave(list(workers.values()), seconds=0, least=1)
    speeds = {name: rate(rounds[0]) for name, rounds in zip(workers, sides, strict=True)}
    slower, faster = sorted(speeds, key=lambda name: speeds[name])
    workers[slower].close()
    return speeds, workers[faster]


def compare_steps(bench: Bench, cell: Cell) -> Result:
    """Time whole training steps of both sides."""
    with ExitStack() as stack:
        caches, peer = faster_cache(bench, cell, stack)
        mine = enter_all(stack, {"ours": bench.job("ours", cell)}, bench.logs / cell.name, WARM_UP)["ours"]
        ours, theirs = bench.take_turns([mine, peer])
        peaks = {"ours": mine.peak, "trl": peer.peak}
    check_lengths(cell, {"ours": ours, "trl": theirs})
    return {
        "cell": cell.name,
        **asdict(cell),
        "cache": max(caches, key=lambda name: caches[name]),
        "caches": caches,
        "ours": summary(ours) | {"peak_bytes": peaks["ours"]},
        "trl": summary(theirs) | {"peak_bytes": peaks["trl"]},
        "throughput": asdict(ratio(ours, theirs, rate)),
        "rollout": asdict(ratio(ours, theirs, lambda steps: rate(steps, "rollout"))),
        "median_step": asdict(ratio(theirs, ours, typical)),
        "memory": peaks["trl"] / peaks["ours"],
        "raw": {"ours": ours, "trl": theirs},
    }


def check_lengths(cell: Cell, sides: dict[str, list[Side]]) -> None:
    """Make sure that fixed lengths were fixed.

    Raises:
        RuntimeError: If an answer was shorter than the cell says.
    """
    if cell.mean is not None:
        return
    for name, rounds in sides.items():
        found = {step["tokens"] for side in rounds for step in side}
        if found != {cell.rows * cell.limit}:
            raise RuntimeError(f"Expected {cell.rows * cell.limit} tokens in every step of {name}, but got {found}.")


def compare_objectives(bench: Bench, cell: Cell) -> Result:
    """Time our step with plain distillation and with the whole objective of Stable-OPD."""
    jobs = {"plain": bench.job("ours", cell), "whole": bench.job("ours", cell, whole=True)}
    with ExitStack() as stack:
        workers = enter_all(stack, jobs, bench.logs / f"objective-{cell.name}", WARM_UP)
        plain, whole = bench.take_turns(list(workers.values()))
    return {
        "cell": cell.name,
        "plain": summary(plain),
        "whole": summary(whole),
        "cost": asdict(ratio(plain, whole, rate)),
        "raw": {"plain": plain, "whole": whole},
    }


def linearity(bench: Bench) -> Result:
    """Time our step over two decades of tokens, with lengths that differ widely within a batch."""
    points: list[Result] = []
    for cell in bench.grid.linearity:
        with Worker(bench.job("ours", cell), bench.logs / f"linearity-{cell.name}-{cell.law}.log") as worker:
            worker.run(WARM_UP)
            rounds = interleave([worker], bench.seconds / 6, steps=1, least=bench.rounds)[0]
        steps = [step for side in rounds for step in side]
        points.append(
            {
                "cell": f"{cell.name}-{cell.law}",
                "tokens": sum(step["real"] for step in steps) / len(steps),
                "longest": expected_longest(cell, bench.shop.pair.vocabulary),
                "padded": cell.rows * (PROMPT_TOKENS[1] + expected_longest(cell, bench.shop.pair.vocabulary)),
                "seconds": sum(step["seconds"] for step in steps) / len(steps),
                "raw": steps,
            }
        )
    seconds = [point["seconds"] for point in points]
    (per_longest, per_token), error = fit([(point["longest"], point["tokens"]) for point in points], seconds)
    _, padded_error = fit([(point["longest"], point["padded"]) for point in points], seconds)
    return {
        "points": points,
        "ms_per_decoding_step": 1e3 * per_longest,
        "us_per_token": 1e6 * per_token,
        "largest_error": error,
        "largest_error_padded": padded_error,
    }


def loss_cells(bench: Bench) -> list[LossCell]:
    """Return the sizes of the loss that are compared."""
    grid, pair = bench.grid, bench.shop.pair
    return [
        LossCell(positions, size, pair.student.width, pair.teacher.width)
        for size in grid.vocabularies
        for positions in grid.positions
    ]


def compare_losses(bench: Bench, cell: LossCell) -> Result:
    """Time the loss alone and take its memory: ours, TRL's, the sampled form, and the bare matrix products."""
    names = ("ours", "trl", "sampled", "bare")
    with ExitStack() as stack:
        jobs = {name: bench.loss_job(name, cell) for name in names}
        workers = enter_all(stack, jobs, bench.logs / f"loss-{cell.name}", warm_up=0)
        sides = dict(zip(names, bench.take_turns(list(workers.values()), steps=1), strict=True))
        scratch = {name: scratch_bytes(bench, cell, worker) for name, worker in workers.items()}
    return {
        "cell": cell.name,
        **asdict(cell),
        **{name: summary(sides[name]) | {"scratch_bytes": scratch[name]} for name in names},
        "time": asdict(ratio(sides["trl"], sides["ours"], typical)),
        "exact_over_sampled": asdict(ratio(sides["ours"], sides["sampled"], typical)),
        "over_bare": asdict(ratio(sides["ours"], sides["bare"], typical)),
        "memory": scratch["trl"] / max(1, scratch["ours"]),
        "raw": sides,
    }


def scratch_bytes(bench: Bench, cell: LossCell, worker: Worker) -> int:
    """Return a loss's highest memory use beyond its inputs and the gradients that it must return."""
    return worker.peak - cell.outputs * (2 if bench.device == "cuda" else 4)


def loss_memory(bench: Bench, positions: Sequence[int] = (2048, 8192, 32768)) -> list[Result]:
    """Take the memory of our loss at a large vocabulary; the width is small, so that a CPU gets through."""
    points = []
    for count in positions:
        cell = LossCell(count, 151_936, 16, 16)
        with Worker(bench.loss_job("ours", cell), bench.logs / f"memory-{cell.name}.log") as worker:
            worker.run(1, fresh=True)
        scratch = scratch_bytes(bench, cell, worker)
        points.append({"cell": cell.name, "scratch_bytes": scratch, "share_of_logits": scratch / cell.logits})
    return points


def roofline(bench: Bench, cells: Sequence[Cell], results: Sequence[Result]) -> list[Result]:
    """Return which share of the memory's bandwidth our decoding uses, for cells of fixed lengths."""
    bandwidth = ask(Job("bandwidth", {}, bench.threads, bench.device), bench.logs / "bandwidth.log")["bytes_per_s"]
    size = 4 if bench.precision == "32-true" else 2
    shares = []
    for cell, result in zip(cells, results, strict=True):
        if cell.mean is None:
            most = decode_roofline(bench.shop.pair, cell, bandwidth, size)
            reached = result["ours"]["rollout_tokens_per_s"]
            shares.append({"cell": cell.name, "bytes_per_s": bandwidth, "most": most, "share": reached / most})
    return shares


def smoke(bench: Bench) -> Result:
    """Compare our default engine with `TransformersEngine` on one ragged cell, without TRL.

    Raises:
        SystemExit: If the default engine falls below the floor.
    """
    quick = replace(bench, seconds=0.0, rounds=3)
    jobs = {
        "default": quick.job("ours", SMOKE_CELL),
        "fallback": quick.job("ours", SMOKE_CELL, engine="TransformersEngine"),
    }
    with ExitStack() as stack:
        workers = enter_all(stack, jobs, quick.logs / "smoke", WARM_UP)
        ours, fallback = quick.take_turns(list(workers.values()))
    rollout: Interval = ratio(ours, fallback, lambda steps: rate(steps, "rollout"))
    if rollout.value < SMOKE_FLOOR:
        raise SystemExit(f"The default engine reached {rollout} of the fallback's speed; the floor is {SMOKE_FLOOR}.")
    return {
        "cell": SMOKE_CELL.name,
        "default": summary(ours),
        "fallback": summary(fallback),
        "rollout": asdict(rollout),
    }
