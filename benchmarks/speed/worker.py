"""The process of one contestant: ``python -m benchmarks.speed.worker JOB``, started by the driver."""

import json
import sys
from collections.abc import Callable
from importlib import import_module

import torch
from benchmarks.speed.turns import Job, Turns

#: Who does a job; imported when it is needed, because one side's library is an optional one.
CONTESTANTS = {
    "ours": "benchmarks.speed.ours:train",
    "trl": "benchmarks.speed.peer:train",
    "gate": "benchmarks.speed.gate:compare",
    "loss": "benchmarks.speed.losses:work",
    "bandwidth": "benchmarks.speed.roofline:measure_bandwidth",
}


def main() -> None:
    """Do the job given as an argument."""
    job = Job(**json.loads(sys.argv[1]))
    turns = Turns(job)
    torch.set_num_threads(job.threads)
    module, name = CONTESTANTS[job.contestant].split(":")
    work: Callable[[Job, Turns], None] = getattr(import_module(module), name)
    work(job, turns)


if __name__ == "__main__":
    main()
