"""Writing answers to a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class AnswerWriter(BasePredictionWriter):
    """Writes what `predict` answers to a JSONL file, one line per prompt: its columns, the answer, its grade.

    Every process writes a file of its own if there are several.

    Args:
        path: The file; none writes ``answers.jsonl`` into the run folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._place: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the file, so that answers of an earlier run do not stay in it."""
        place = Path(self.path) if self.path else Path(trainer.log_dir or ".") / "answers.jsonl"
        if trainer.world_size > 1:
            place = place.with_name(f"{place.stem}-{trainer.global_rank}{place.suffix}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("", encoding="utf-8")
        self._place = place

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the answers of a batch."""
        assert self._place is not None
        with self._place.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the answers are."""
        rank_zero_info(f"Answers written to {self._place}")
