"""What the processes of a run have to agree on."""

import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors


class Processes:
    """The processes of a trainer; every one has to ask for the same things in the same order.

    Args:
        trainer: Runs the training.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.trainer.world_size

    def total(self, local: Tensor) -> Tensor:
        """Add up over all processes."""
        total: Tensor = self.trainer.strategy.reduce(local, reduce_op="sum")
        return total

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of each number over all processes."""
        own = torch.tensor(list(numbers), device=self.trainer.strategy.root_device)
        found: list[int] = self.trainer.strategy.reduce(own, reduce_op="max").tolist()
        return found

    def some(self, local: bool) -> bool:
        """Return whether it is so on some process."""
        return self.trainer.strategy.reduce_boolean_decision(local, all=False)

    def gather(self, values: Tensor) -> Tensor:
        """Put the values of all processes one after the other, (n,) -> (m,); n may be 0, and differ."""
        return torch.cat(gather_all_tensors(values)) if self.count > 1 else values

    def states(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the states of all processes, by their number; on the first process only, the others get nothing."""
        first = self.trainer.is_global_zero
        states: list[Any] = [None] * self.count if first else []
        torch.distributed.gather_object(move_data_to_device(own, torch.device("cpu")), states if first else None)
        return states

    def together(self, last: bool) -> AbstractContextManager[None]:
        """Let a backward pass add up gradients over processes, if it is the last one of a step."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        return strategy.block_backward_sync()


def end_launched(trainer: Trainer, patience: float = 3.0) -> None:
    """End the processes that this one has launched; one that hangs would keep the device and the terminal for ever.

    Args:
        trainer: Of this process, which ends too.
        patience: Seconds in which they may end by themselves and say why.
    """
    for each in getattr(trainer.strategy.launcher, "procs", []):
        if isinstance(each, subprocess.Popen):
            try:
                each.wait(patience)
            except subprocess.TimeoutExpired:
                each.kill()
