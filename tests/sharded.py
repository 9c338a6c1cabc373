"""A plug-in that looks at a sharded run from the inside, and the start of several processes as by torchrun."""

import json
import os
import socket
from pathlib import Path

from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from killing import attempt


def kept(model) -> int:
    """Bytes of the parameters that this process keeps."""
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)


class Probe(Callback):
    """Writes down, for each process, what it keeps of each model, and its micro-batches in each step.

    Args:
        file: Where to write to; the number of the process is added.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def on_fit_start(self, trainer, pl_module) -> None:
        readers = pl_module.readers
        teacher = getattr(readers.teacher, "teacher", readers.teacher)
        models = {"student": pl_module.model, "teacher": teacher.model, "reference": readers.reference}
        self.found = {"pieces": [], "padded": []} | {name: kept(model) for name, model in models.items()}
        learner, path = pl_module.learner, Path(f"{self.file}-{trainer.global_rank}.json")
        arrange = learner.arrange

        def watched(*args):
            work = arrange(*args)
            idle = [not any(group.terms for group in piece.groups) for piece in work.pieces]
            self.found["pieces"].append(len(idle) - sum(idle))
            self.found["padded"].append(len(idle))
            self.found["copy"] = kept(pl_module.copy.model)
            path.write_text(json.dumps(self.found))
            return work

        learner.arrange = watched


def run(arguments: list[str], count: int, timeout: float = 120) -> list[int]:
    """Run `stable-opd` on several processes, and return their exit codes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(count):
        mine = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": os.getpid(), "GLOO_SOCKET_IFNAME": "lo"}
        started.append(attempt(arguments, **{name: str(value) for name, value in (shared | mine).items()}))
    for each in started:
        each.join(timeout)
        if each.is_alive():  # it waits for the others in vain
            each.kill()
    return [each.exitcode for each in started]
