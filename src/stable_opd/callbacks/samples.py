"""Keeping a few answers of each evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

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
        self._lines: list[str] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._lines = []

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
        for place, record in enumerate(outputs.get("answers", [])[: self.rows - len(self._lines)]):
            prompt = prompt_text(pl_module, batch, place)
            kept = {"step": trainer.global_step, "prompt": _shortened(prompt), **chosen(record)}
            self._lines.append(json.dumps(kept, ensure_ascii=False, default=str))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the answers of this evaluation, in place of those that an earlier attempt left of it or of later steps.

        The check of the initial student before a run covers the whole set only if it is told to; a part of it shows the
        same answers and is kept as well.
        """
        folder = trainer.log_dir  # processes agree on it, so all of them ask
        if not self._lines or folder is None:
            return
        place = Path(folder) / SAMPLES
        place.parent.mkdir(parents=True, exist_ok=True)
        earlier = _before(place, trainer.global_step)
        # Through a file beside it, so that a run that is killed here leaves the old one.
        draft = place.with_suffix(".part")
        draft.write_text("".join(f"{line}\n" for line in [*earlier, *self._lines]), encoding="utf-8", errors="replace")
        draft.replace(place)
        self._lines = []


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


def _before(place: Path, step: int) -> list[str]:
    """Return the lines of a file that belong to earlier steps; a line that was cut by a crash is dropped."""
    if not place.exists():
        return []
    kept = []
    for line in place.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] < step:
            kept.append(line)
    return kept
