"""How near the decoding comes to what the memory could deliver."""

import time

import torch
from benchmarks.speed.turns import Job, Turns
from benchmarks.speed.workload import PROMPT_TOKENS, Cell, Pair

COPY_BYTES = 2**30
REPEATS = 20


def decode_roofline(pair: Pair, cell: Cell, bandwidth: float, size: int) -> float:
    """Return the tokens per second at which a decoding of fixed lengths would saturate the memory.

    Every step reads all weights once, and the keys and values of every row.

    Args:
        pair: The models.
        cell: A cell of fixed lengths.
        bandwidth: Bytes per second.
        size: Bytes of a number.
    """
    student = pair.student
    weights = student.body_parameters + pair.vocabulary * student.width
    context = PROMPT_TOKENS[1] + cell.limit / 2
    step = size * (weights + cell.rows * context * student.cache_entries)
    return cell.rows * bandwidth / step


def measure_bandwidth(job: Job, turns: Turns) -> None:
    """Report the bytes per second of a copy, each byte counted as it is read and as it is written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=job.device).fill_(1)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        if job.device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    turns.report({"bytes_per_s": 2 * COPY_BYTES / fastest})
