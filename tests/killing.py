"""A plug-in that ends its own process in the middle of something, and processes for it to end."""

import multiprocessing
import os
import sys
from pathlib import Path

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback


class Killer(Callback):
    """Ends the process once: at the first attempt, and not when the same command is run again.

    Args:
        moment: ``rollout``, ``backward``, ``writing`` (half of a checkpoint is written) or ``evaluation``.
        step: In which step; in the first such moment from there on.
        marker: File that says that it was done.
        number: The signal.
        rank: Which process ends itself.
    """

    def __init__(self, moment: str, step: int, marker: str, number: int = 9, rank: int = 0) -> None:
        self.moment, self.step, self.marker = moment, step, Path(marker)
        self.number, self.rank = number, rank

    def strike(self, *_) -> None:
        due = self.trainer.global_step >= self.step and self.trainer.global_rank == self.rank
        if due and not self.trainer.sanity_checking and not self.marker.exists():
            self.marker.write_text(str(self.trainer.global_step))
            os.kill(os.getpid(), self.number)

    def on_fit_start(self, trainer, pl_module) -> None:
        self.trainer = trainer
        if self.moment == "rollout":
            pl_module.sampler.register_forward_pre_hook(self._on_draw)
        if self.moment == "writing":
            trainer.strategy.checkpoint_io = _HalfWriting(self)

    def _on_draw(self, _, inputs) -> None:
        if inputs[1].shape[1] == 2:
            self.strike()

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if self.moment == "backward":
            loss.register_hook(self.strike)

    def on_validation_batch_end(self, *_) -> None:
        if self.moment == "evaluation":
            self.strike()


class _HalfWriting(TorchCheckpointIO):
    def __init__(self, killer: Killer) -> None:
        self.killer = killer

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        self.killer.strike()
        Path(path).write_bytes(whole)


def attempt(arguments: list[str], **environment: str) -> multiprocessing.Process:
    """Start `stable-opd` in a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stable_opd.cli"])
    process = context.Process(
        target=_main, args=(arguments, os.getcwd(), os.environ | {"PL_GLOBAL_SEED": "0"} | environment)
    )
    process.start()
    return process


def _main(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    import torch

    from stable_opd.cli import main

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = ["stable-opd"]
    main(arguments)
