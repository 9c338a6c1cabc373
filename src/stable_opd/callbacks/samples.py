"""Keeping a few answers of each evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from stable_opd.jsonl import write_records
from stable_opd.types import Prompts

#: The file in the run's folder.
SAMPLES = "samples.jsonl"

#: What is kept of a record, if it has it.
FIELDS = ("set", "index", "completion", "grade", "truncated", "repetitive", "repeated_from")

#: Characters of a prompt or an answer that are kept: a run of thousands of steps must not fill a disk.
LONGEST = 8000


class RolloutSamples(Callback):
    """Appends the first greedy answers of each evaluation to ``samples.jsonl`` in the run's folder.

    The prompts are the same each time, so the lines of one ``index`` show how an answer changes in the course of a run;
    ``step`` is the number of optimizer steps before the evaluation. Only the first process writes, and only in `fit`. A
    run that is resumed in its folder writes no line twice: what the file holds of later steps is dropped.

    Args:
        rows: Answers that are kept of each evaluation.

    Raises:
        ValueError: If ``rows`` is below 1.
    """

    def __init__(self, rows: int = 8) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"Expected rows of at least 1, but got {rows}. Leave RolloutSamples out to keep none.")
        self.rows = rows
        self._records: list[dict[str, Any]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._records = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Prompts,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the records of a batch until there are enough; a module that returns no ``answers`` leaves none."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero or not isinstance(outputs, Mapping):
            return
        for place, record in enumerate(outputs.get("answers", [])[: self.rows - len(self._records)]):
            prompt = prompt_text(pl_module, batch, place)
            self._records.append({"step": trainer.global_step, "prompt": _shortened(prompt), **chosen(record)})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the answers of this evaluation, in place of those that an earlier attempt left of it or of later steps.

        The check of the initial student before a run covers the whole set only if it is told to; a part of it shows the
        same answers and is kept as well.
        """
        folder = trainer.log_dir  # processes agree on it, so all of them ask
        if self._records and folder is not None:
            write_records(Path(folder) / SAMPLES, trainer.global_step, self._records)
            self._records = []


def prompt_text(module: LightningModule, batch: Prompts, place: int) -> str:
    """Return a prompt as the model reads it, special tokens included."""
    text: str = module.tokenizer.decode(batch.ids[place])  # type: ignore[operator, union-attr]
    return text


def chosen(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a record."""
    kept = {name: record[name] for name in FIELDS if name in record}
    return kept | {"completion": _shortened(str(record.get("completion", "")))}


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
