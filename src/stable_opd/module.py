"""The LightningModule: it lets the student write, collects what the models say of it, and takes one optimizer step.

It coordinates the components and never asks which one it holds.
"""

from contextlib import nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from stable_opd import objective
from stable_opd.constraints import Constraint
from stable_opd.data import PromptDataModule
from stable_opd.divergences import Divergence
from stable_opd.engines import InProcessEngine, RolloutEngine
from stable_opd.evaluation import Evaluation, records
from stable_opd.memory import MemoryPlan, plan_memory
from stable_opd.metrics import LengthInflation
from stable_opd.metrics.collections import training_metrics
from stable_opd.mixtures import Mixture
from stable_opd.mixtures.student import student_rows
from stable_opd.models import context_length, frozen_copy, load_model, load_tokenizer, stop_ids
from stable_opd.offload import move_state
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.packing import packs
from stable_opd.preflight import check_context, check_golden, check_term_names
from stable_opd.randomness import global_seed
from stable_opd.readers import Readers
from stable_opd.repetition import RepetitionDetector
from stable_opd.rollouts import carry_out
from stable_opd.samplers import Sampler, Temperature
from stable_opd.stopwatch import Stopwatch
from stable_opd.teachers import Teacher
from stable_opd.terms import LossTerm
from stable_opd.types import Author, Plan, Prompts, Rollout


class OPDModule(LightningModule):
    """On-policy distillation of a language model, composed from components.

    Args:
        student: The model that learns: a folder, a hub name, or ``testbed:student``.
        teacher: Who scores the student's tokens.
        divergence: What pulls the student to the teacher.
        mixture: Whose text the student learns from.
        repetition: Which tokens count as repeated.
        constraints: What keeps the student stable; the key names the term in the logs, null switches one off.
        sampler: How the student draws its tokens; none draws from the student itself, at temperature 1.
        engine: Who runs generation; none generates in this process.
        optimizer: Makes the optimizer from the student's parameters.
        lr_scheduler: Makes the learning-rate schedule, which advances with every optimizer step.
        rollout: How answers are written.
        update: How the student learns from them.
    """

    def __init__(
        self,
        student: str,
        teacher: Teacher,
        divergence: Divergence,
        mixture: Mixture,
        repetition: RepetitionDetector,
        constraints: dict[str, Constraint | None] | None = None,
        sampler: Sampler | None = None,
        engine: RolloutEngine | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        rollout: RolloutOptions = RolloutOptions(),
        update: UpdateOptions = UpdateOptions(),
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # several micro-batches, and a denominator of our own, per optimizer step
        self.student_path = student
        self.tokenizer = load_tokenizer(student)
        self.student: PreTrainedModel | None = None
        check_term_names(constraints or {})
        self.constraints = nn.ModuleDict({name: each for name, each in (constraints or {}).items() if each is not None})
        self.divergence, self.mixture, self.repetition = divergence, mixture, repetition
        self.sampler = sampler or Temperature(1.0)
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.rollout_options, self.update_options = rollout, update
        # What serves and does not learn stays out of the module's parameters and checkpoints.
        self.readers = Readers(teacher, "reference" in update.offload)
        self.engine = engine or InProcessEngine()
        self.train_metrics = training_metrics(rollout.max_new_tokens)
        self.evaluation = Evaluation(rollout.max_new_tokens, rollout.eval_temperature)

    @property
    def model(self) -> PreTrainedModel:
        """The student, once `setup` has loaded it."""
        if self.student is None:
            raise RuntimeError("The student is loaded by the trainer's setup; start a Trainer, or call setup first.")
        return self.student

    @property
    def own_terms(self) -> dict[str, LossTerm]:
        """The terms that speak about the student's rows."""
        return {"divergence": self.divergence, **self._constraints()}

    @property
    def other_terms(self) -> dict[str, LossTerm]:
        """The terms that speak about the rows that the student did not write."""
        return {"mixture": self.mixture}

    @property
    def progress(self) -> float:
        """Share of the training that is over, from 0 to 1; 0 where the trainer has no end."""
        steps = self.trainer.estimated_stepping_batches
        return 0.0 if steps in (0, float("inf")) else min(1.0, self.global_step / steps)

    def setup(self, stage: str) -> None:
        """Load the models that the stage needs, and check that the parts fit together."""
        if self.student is None:
            # In float32 whatever it was saved in: at the learning rates of distillation, an update of a bfloat16 weight
            # rounds to nothing. A precision of "bf16-true" casts it all the same.
            self.student = load_model(self.student_path, torch.float32).train()
            self.stop = stop_ids(self.student, self.tokenizer)
        contexts = {"student": context_length(self.student)}
        if stage == "fit":
            needed = any(term.needs_reference for term in (self.own_terms | self.other_terms).values())
            if needed and self.readers.reference is None:
                # Before a checkpoint is restored: the reference is the initial student.
                self.readers.reference = frozen_copy(self.student)
            self.readers.teacher.setup(self.student_path, self.tokenizer, self.device)
            contexts["teacher"] = self.readers.teacher.context_length
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, PromptDataModule):
            golden = self.mixture.needs_golden and stage == "fit"
            if golden:
                check_golden(type(self.mixture).__name__, *data.golden_count)
            longest = data.longest_golden if golden else 0
            check_context(contexts, data.longest_prompt, longest, self.rollout_options.max_new_tokens)

    def on_fit_start(self) -> None:
        """Move what the module does not own to the device, now that it is known."""
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "The precision 16-mixed scales the gradients, which would be clipped as they are scaled. Use "
                "bf16-mixed, bf16-true or 32-true."
            )
        self.readers.teacher.setup(self.student_path, self.tokenizer, self.device)
        self.readers.move(self.device, self.model.dtype)
        if self.device.type == "cuda" and self.trainer.world_size == 1:  # sharded models need less than the plan says
            plan = self.memory_plan()
            rank_zero_info(str(plan))
            plan.check(torch.cuda.get_device_properties(self.device).total_memory)

    def memory_plan(self) -> MemoryPlan:
        """Reckon what a training step needs of a device's memory."""
        data = getattr(self.trainer, "datamodule", None)
        sizes = (1, 0, 0)
        if isinstance(data, PromptDataModule):
            evaluated = min(data.eval_batch_size, len(data.examples.get("validation", [])))
            sizes = (data.batch_size, evaluated, data.longest_prompt)
        compute = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else self.model.dtype
        return plan_memory(
            self.model, self.readers, self.rollout_options, self.update_options, *sizes, len(self.tokenizer), compute
        )

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule."""
        optimizer = self.make_optimizer(self.model.parameters())
        if self.make_lr_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}]

    def write(self, prompts: Prompts, plan: Plan, sampler: Sampler, *key_parts: int | str) -> Rollout:
        """Let the planned authors write; nothing here has a gradient."""
        self.model.eval()
        return carry_out(
            plan,
            prompts,
            self.model,
            self.tokenizer,
            self.engine,
            sampler,
            self.rollout_options.max_new_tokens,
            self.stop,
            (global_seed(), *key_parts),
        )

    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        """Write, score, update: one optimizer step."""
        watch = Stopwatch(self.device)
        with watch("rollout"):
            plan = self.mixture.plan(batch, self.rollout_options.samples_per_prompt, self.progress)
            rollout = self.write(batch, plan, self.sampler, self.global_step)
            repetition = self.repetition(rollout)
        self.model.train()
        options = self.update_options
        with watch("score"):
            work = list(
                objective.pieces(
                    rollout,
                    repetition,
                    self.own_terms,
                    self.other_terms,
                    options.aggregation,
                    options.micro_batch_tokens,
                    self.progress,
                    self._total,
                    padded=not packs(self.model),
                )
            )
        tally = objective.Tally([*self.own_terms, *self.other_terms], self.device)
        readings = self.readers.read(work, len(self.tokenizer))
        for number, piece in enumerate(work):
            with nullcontext() if number + 1 == len(work) else self._no_sync():
                with watch("score"):
                    result = objective.evaluate(piece, next(readings), self.model, len(self.tokenizer))
                    tally.add(piece, result)
                with watch("update"):
                    # Strategies average gradients over processes; the shares already sum to one over all of them.
                    self.manual_backward(result.loss * self.trainer.world_size)
        with watch("update"):
            gradient_norm = self._step()
        scalars = tally.reduced(self._total)
        for name, constraint in self._constraints().items():
            constraint.adapt(scalars[f"value/{name}"])
        self._log_step(rollout, repetition.repetitive, tally, scalars | {"grad_norm": gradient_norm}, watch.seconds)

    def _step(self) -> Tensor:
        """Clip the gradients, take the optimizer step, and return the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.update_options.gradient_clip)
        optimizer, scheduler = cast(LightningOptimizer, self.optimizers()), self.lr_schedulers()
        resting = "optimizer" in self.update_options.offload
        if resting:
            move_state(optimizer.optimizer, self.device)
        optimizer.step()
        optimizer.zero_grad()
        if resting:
            move_state(optimizer.optimizer, torch.device("cpu"))
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]
        return norm

    def _log_step(
        self,
        rollout: Rollout,
        repetitive: Tensor,
        tally: objective.Tally,
        scalars: dict[str, Tensor],
        seconds: dict[str, float],
    ) -> None:
        own = rollout.written_by(Author.STUDENT)
        logged: dict[str, Any] = {f"train/{name}": value for name, value in scalars.items()}
        if len(own):
            advantage = tally.tokens("teacher") - tally.tokens("student")
            self.train_metrics.update(
                truncated=rollout.truncated[own],
                repetitive=repetitive[own],
                lengths=rollout.lengths[own],
                advantage=advantage,
                in_loop=tally.tokens("in_loop"),
            )
            logged |= self.train_metrics.compute()
            for metric in self.train_metrics.values():
                if not isinstance(metric, LengthInflation):  # the others speak about the step alone
                    metric.reset()
            tokens = self._total(rollout.lengths[own].sum().float())
            logged["throughput/rollout_tokens_per_s"] = tokens / seconds["rollout"]
        logged |= {f"time/{name}": value for name, value in seconds.items()}
        self._log(logged)

    def _log(self, figures: dict[str, Any]) -> None:
        """Have the figures of a step ready where `self.log` would have them.

        They belong to one step and are reduced over processes already, so there is nothing left for Lightning to do;
        but for two dozen figures it takes several milliseconds.
        """
        self.figures = {name: torch.as_tensor(value) for name, value in figures.items()}
        self.trainer.callback_metrics.update(self.figures)
        self.trainer.logged_metrics.update(self.figures)

    def on_train_batch_end(self, outputs: Any, batch: Prompts, batch_idx: int) -> None:
        """Log the step, if it is one to log or the last."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step % every == 0 or self.trainer.should_stop):
            scalars = {name: value.item() for name, value in self.figures.items()} | {"epoch": self.current_epoch}
            for logger in self.loggers:
                logger.log_metrics(scalars, step=self.global_step - 1)

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Answer the prompts, greedily and at a temperature, and measure the answers."""
        for sampler, metrics in self.evaluation.sets():
            rollout = self.write(batch, student_rows(batch, 1), sampler, "evaluation")
            self.evaluation.measure(metrics, batch, rollout, self.repetition)

    def on_validation_epoch_end(self) -> None:
        """Log the evaluation; the one before the first step is that of the initial student."""
        figures = {f"val/{name}": value for name, value in self.evaluation.compute().items()}
        if not self.trainer.sanity_checking:
            self.log_dict(figures)
        elif self.trainer.num_sanity_val_steps == float("inf"):
            # Lightning logs nothing here, but over the whole validation set it is the yardstick of the run.
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in figures.items()}, step=self.global_step)

    def test_step(self, batch: Prompts, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the evaluation."""
        self.log_dict({f"test/{name}": value for name, value in self.evaluation.compute().items()})

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Answer the prompts greedily; one record for each, in their order."""
        rollout = self.write(batch, student_rows(batch, 1), Temperature(0.0), "prediction")
        return records(batch, rollout, self.repetition(rollout))

    def _constraints(self) -> dict[str, Constraint]:
        return {name: cast(Constraint, each) for name, each in self.constraints.items()}

    def _total(self, local: Tensor) -> Tensor:
        """Add up over all processes."""
        total: Tensor = self.trainer.strategy.reduce(local, reduce_op="sum")
        return total

    def _no_sync(self) -> Any:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
