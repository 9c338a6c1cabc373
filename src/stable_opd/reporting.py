"""The figures of a training step: what was measured on its rollouts, and where it is written."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from stable_opd.metrics import LengthInflation
from stable_opd.metrics.collections import training_metrics
from stable_opd.tally import Tally
from stable_opd.types import Author, Repetition, Rollout


class StepReport(nn.Module):
    """Measures a step, and has the figures ready for the loggers.

    Args:
        max_length: Token budget of an answer.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.metrics = training_metrics(max_length)
        self.figures: dict[str, Tensor] = {}

    def measure(
        self,
        rollout: Rollout,
        repetition: Repetition,
        tally: Tally,
        scalars: Mapping[str, Any],
        seconds: Mapping[str, float],
        total: Callable[[Tensor], Tensor],
        engine: Mapping[str, float],
    ) -> None:
        """Take in a step.

        Args:
            rollout: What was written.
            repetition: What the detector said of it.
            tally: What was collected on the way.
            scalars: Figures to log under ``train/``.
            seconds: What the phases took.
            total: Adds up a count over all processes.
            engine: Figures to log under ``engine/``, of this process.
        """
        own = rollout.written_by(Author.STUDENT)
        logged: dict[str, Any] = {f"train/{name}": value for name, value in scalars.items()}
        counts = torch.stack([*onset(rollout, repetition), rollout.lengths[own].sum(), own.new_tensor(len(own))])
        first, looping, tokens, rows = total(counts.float())
        # Metrics add up over processes, so either all of them take part or none, with rows or without.
        if rows:
            self.metrics.update(
                truncated=rollout.truncated[own],
                repetitive=repetition.repetitive[own],
                lengths=rollout.lengths[own],
                **tally.of_students(),
            )
            logged |= self.metrics.compute()
            for metric in self.metrics.values():
                if not isinstance(metric, LengthInflation):  # the others speak about the step alone
                    metric.reset()
            logged["train/repetition_onset"] = first / looping
            logged["throughput/rollout_tokens_per_s"] = tokens / seconds["rollout"]
        compared = tally.compared(total, self.max_length)
        logged |= {f"train/{name}": value for name, value in compared.items()}
        logged |= {f"time/{name}": value for name, value in seconds.items()}
        logged |= {f"engine/{name}": value for name, value in engine.items()}
        self.figures = {name: torch.as_tensor(value) for name, value in logged.items()}

    def show(self, trainer: Trainer) -> None:
        """Have the figures where `LightningModule.log` would have them.

        They belong to one step and are reduced over processes already, so there is nothing left for Lightning to do;
        but for two dozen figures it takes several milliseconds.
        """
        trainer.callback_metrics.update(self.figures)
        trainer.logged_metrics.update(self.figures)

    def numbers(self) -> dict[str, float]:
        """Return the figures as numbers."""
        return {name: value.item() for name, value in self.figures.items()}


def onset(rollout: Rollout, repetition: Repetition) -> tuple[Tensor, Tensor]:
    """Return the sum of the positions at which rows of the student's begin to repeat themselves, and their number.

    These are the rows that count as repetitive; each begins with its first marked token that the student wrote.
    """
    students = repetition.repetitive & (rollout.author == Author.STUDENT)
    marked = repetition.in_loop & (rollout.token_author == Author.STUDENT) & students[rollout.row]
    never = torch.full_like(rollout.lengths, torch.iinfo(rollout.lengths.dtype).max)
    first = never.scatter_reduce(0, rollout.row[marked], rollout.position[marked], "amin")
    begins = first < never
    return first.where(begins, 0).sum(), begins.sum()
