"""The half of the module that answers prompts and learns nothing from it."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import LightningModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.evaluation import Evaluation, grades, records
from stable_opd.mixtures.student import student_rows
from stable_opd.repetition import RepetitionDetector
from stable_opd.samplers import Sampler, Temperature
from stable_opd.sharding import InferenceCopy
from stable_opd.types import Plan, Prompts, Rollout


class EvaluatingModule(LightningModule):
    """Validation, test and prediction: the student answers, and the answers are measured.

    Attributes:
        tokenizer: The student's.
        repetition: Says which tokens count as repeated.
        evaluation: Collects what is measured.
        copy: The student while it writes, where its weights are spread over processes.
    """

    tokenizer: PreTrainedTokenizerBase
    repetition: RepetitionDetector
    evaluation: Evaluation
    copy: InferenceCopy | None = None

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The student."""

    @abstractmethod
    def write(
        self, prompts: Prompts, plan: Plan, sampler: Sampler, *key_parts: int | str, learning: bool = False
    ) -> Rollout:
        """Let the planned authors write."""

    def writer(self) -> PreTrainedModel:
        """Return the student as engines need it, whole on each process; if it is sharded, all have to call this."""
        return self.model if self.copy is None else self.copy.fill(self.model)

    def release(self) -> None:
        """Give up the student's weights that were put together."""
        if self.copy is not None:
            self.copy.release()

    def on_validation_start(self) -> None:
        """Have the student's weights together, before one process has more to answer than another."""
        self.writer()

    on_test_start = on_predict_start = on_validation_start

    def validation_step(self, batch: Prompts, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Answer the prompts, greedily and at a temperature, and measure them; return the greedy ``answers``."""
        answers: list[dict[str, Any]] = []
        for each in self.evaluation.sets(batch):
            plan = student_rows(batch, each.samples)
            rollout = self.write(batch, plan, each.sampler, "evaluation", *filter(None, [each.name]))
            found, graded = self.evaluation.measure(each, batch, rollout, self.repetition)
            answers = answers or records(batch, rollout, found, graded, self.tokenizer)
        return {"answers": answers}

    def on_validation_epoch_end(self) -> None:
        """Log the evaluation; the one before the first step is that of the initial student."""
        self.release()
        figures = {f"val/{name}": value for name, value in self.evaluation.compute().items()}
        if not self.trainer.sanity_checking:
            self.log_dict(figures)
        elif self.trainer.num_sanity_val_steps == float("inf"):
            # Lightning logs nothing here, but over the whole validation set it is the yardstick of the run.
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in figures.items()}, step=self.global_step)

    def test_step(self, batch: Prompts, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the evaluation."""
        self.release()
        self.log_dict({f"test/{name}": value for name, value in self.evaluation.compute().items()})

    def predict_step(self, batch: Prompts, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Answer the prompts greedily; one record for each, in their order."""
        rollout = self.write(batch, student_rows(batch, 1), Temperature(0.0), "prediction")
        return records(batch, rollout, self.repetition(rollout), grades(batch, rollout), self.tokenizer)

    def on_predict_end(self) -> None:
        """Give up the student's weights."""
        self.release()
