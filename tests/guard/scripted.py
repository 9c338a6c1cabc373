"""A callback that puts a script in the place of what is measured; spawned processes must be able to import it."""

import torch
from lightning.pytorch import Callback

#: What the figures are while a run is healthy, and while it is not.
LOOPS = ("repeated_share", "repetition_rate", "truncation_rate", "advantage_mean")
HEALTHY = dict.fromkeys((f"train/{name}" for name in LOOPS), 0.0) | {
    "train/length_mean": 20.0,
    "train/stop_hazard": 0.05,
}
INFLATED = HEALTHY | {"train/length_mean": 60.0, "train/stop_hazard": 0.01}


class Scripted(Callback):
    """Says that the answers are inflated in some steps; it has to stand before the guard.

    Args:
        inflated: Pairs of the first such step and the first that is none any more.
    """

    def __init__(self, inflated: list[list[int]]) -> None:
        super().__init__()
        self.inflated = inflated

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        """Change the figures of the step."""
        step = trainer.global_step - 1
        there = any(first <= step < end for first, end in self.inflated)
        written = INFLATED if there else HEALTHY
        pl_module.report.figures |= {name: torch.tensor(value) for name, value in written.items()}
