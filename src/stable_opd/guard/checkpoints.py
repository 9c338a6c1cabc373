"""Checkpoints of healthy steps, and the way back to one."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from stable_opd.signals.changes import QUIET

#: The folder in that of the run.
FOLDER = "healthy"
#: How many are kept: a departure is sure some steps after it began, and the last one may be of those.
KEPT = 3


class HealthyCheckpoints:
    """Keeps the last few checkpoints of healthy steps; they are the trainer's own, so any run can start from one.

    Args:
        every: Steps between two of them; the first is made as soon as the signals have a quiet level.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.paths: dict[int, str] = {}

    def save(self, trainer: Trainer) -> None:
        """Save the present state if it is time; every process has to call it."""
        step = trainer.global_step
        if step < max([QUIET, *(each + self.every for each in self.paths)]):
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER / f"step={step}.ckpt"
        trainer.save_checkpoint(path)
        self.paths[step] = str(path)
        self._forget(trainer, sorted(self.paths)[:-KEPT])

    def restore(self, trainer: Trainer, before: int) -> str:
        """Bring back what the last checkpoint before a step holds of the module and of the optimizers.

        The loops of the trainer, the schedule of the learning rate and the options of the optimizer stay as they are.
        Later checkpoints are removed.

        Args:
            trainer: Of the run.
            before: Number of the step in which the first sign began; the weights after as many steps wrote it.

        Returns:
            What was done, in words.
        """
        there = trainer.strategy.broadcast(sorted(step for step, path in self.paths.items() if Path(path).exists()))
        if not there:
            return "there is no healthy checkpoint to go back to"
        step = max([each for each in there if each < before], default=there[0])
        load(trainer, self.paths[step])
        self._forget(trainer, [each for each in self.paths if each > step])
        return f"went back to the weights of step {step} ({self.paths[step]})"

    def state_dict(self) -> dict[str, Any]:
        """Return where they are."""
        return {"paths": dict(self.paths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the files may be gone."""
        self.paths = dict(state["paths"])

    def _forget(self, trainer: Trainer, steps: list[int]) -> None:
        for step in steps:
            trainer.strategy.remove_checkpoint(self.paths.pop(step))


def load(trainer: Trainer, path: str) -> None:
    """Load module and optimizers from a checkpoint in the middle of a run."""
    module, strategy = trainer.lightning_module, trainer.strategy
    options = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    module.on_load_checkpoint(checkpoint)
    strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    strategy.load_optimizer_state_dict(checkpoint)
    # A schedule may reckon with the rate that it set last.
    for optimizer, groups in zip(trainer.optimizers, options, strict=True):
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.update({name: value for name, value in kept.items() if name != "params"})
