"""The LightningModule: it lets the student write, collects what the models say of it, and takes one optimizer step.

It coordinates the components and never asks which one it holds.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel

from stable_opd.constraints import Constraint
from stable_opd.data import PromptDataModule
from stable_opd.divergences import Divergence
from stable_opd.doctor import Patient, examine, refuse
from stable_opd.engines import InProcessEngine, RolloutEngine
from stable_opd.engines.base import Blend
from stable_opd.evaluating import EvaluatingModule
from stable_opd.evaluation import Evaluation
from stable_opd.learning import Learner, Moment
from stable_opd.memory import MemoryPlan, optimizer_bytes, plan_memory
from stable_opd.mixtures import Mixture, StudentOnly
from stable_opd.models import load_tokenizer, stop_ids, trained
from stable_opd.objective import Objective
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.policies import Policies
from stable_opd.processes import Processes
from stable_opd.randomness import global_seed, seed_step
from stable_opd.readers import Readers
from stable_opd.references import InitialStudent, Reference
from stable_opd.repetition import RepetitionDetector
from stable_opd.reporting import StepReport
from stable_opd.rollouts import Writers
from stable_opd.samplers import Sampler, Temperature
from stable_opd.sharding import InferenceCopy, is_sharded, load_state
from stable_opd.skips import Case, Skips, undone_if_it_fails
from stable_opd.stopwatch import Stopwatch
from stable_opd.strategy import ShardedStrategy, check_optimizer, check_recipe, check_strategy
from stable_opd.students import LoRA, check_adapter, describe_adapter, load_student, without_base
from stable_opd.tally import Tally
from stable_opd.teachers import Teacher
from stable_opd.teachers.base import NOBODY, check_served, check_stop
from stable_opd.teachers.introduction import Answers, introduce
from stable_opd.terminal import SEPARATE, SemanticClass, StopRule, TerminalIds, TerminalPolicy, announce
from stable_opd.terms import LossTerm, check_term_names
from stable_opd.types import Author, Plan, Prompts, Rollout
from stable_opd.weightings import Weighting


class OPDModule(EvaluatingModule):
    """On-policy distillation of a language model, composed from components.

    Args:
        student: The model that learns: a folder, a hub name, or ``testbed:student``.
        teacher: Who scores the student's tokens; null where nobody has to, as in fine-tuning alone.
        divergence: What pulls the student to the teacher.
        mixture: Whose text the student learns from.
        repetition: Which tokens count as repeated.
        constraints: What keeps the student stable; the key names the term in the logs, null switches one off.
        sampler: How the student draws its tokens; none draws from the student itself, at temperature 1.
        engine: Who runs generation; none generates in this process.
        adapter: Low-rank adapters that learn in the place of the student's weights; none lets all weights learn.
        optimizer: Makes the optimizer from the student's parameters.
        lr_scheduler: Makes the learning-rate schedule, which advances with every optimizer step.
        weighting: How much each token counts in the divergence; several are multiplied, null switches one off.
        reference: Who the constraints hold the student against; none takes the initial student.
        terminal: What is done where student and teacher end their answers with different tokens; none makes them one.
        rollout: How answers are written.
        policies: What is done with rows that repeat themselves or were cut.
        update: How the student learns from them.
    """

    def __init__(  # noqa: PLR0913  # one for each part of a recipe
        self,
        student: str,
        teacher: Teacher | None,
        divergence: Divergence,
        mixture: Mixture,
        repetition: RepetitionDetector,
        constraints: dict[str, Constraint | None] | None = None,
        sampler: Sampler | None = None,
        engine: RolloutEngine | None = None,
        adapter: LoRA | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        weighting: dict[str, Weighting | None] | None = None,
        reference: Reference | None = None,
        terminal: TerminalPolicy | None = None,
        rollout: RolloutOptions = RolloutOptions(),
        policies: Policies = Policies(),
        update: UpdateOptions = UpdateOptions(),
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # several micro-batches, and a denominator of our own, per optimizer step
        self.student_path = student
        self.tokenizer = load_tokenizer(student)
        self.student: PreTrainedModel | None = None
        self.adapter, self.strict_loading = adapter, adapter is None  # checkpoints of adapters leave the base out
        self.adapter_of: dict[str, Any] | None = None
        check_term_names("model.constraints", constraints or {}, {"divergence", "mixture"})
        check_term_names("model.weighting", weighting or {})
        self.constraints = nn.ModuleDict({name: each for name, each in (constraints or {}).items() if each is not None})
        self.divergence, self.mixture, self.repetition = divergence, mixture, repetition
        self.sampler = sampler or Temperature(1.0)
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.rollout_options, self.policies, self.update_options = rollout, policies, update
        self.weighting = nn.ModuleDict({name: each for name, each in (weighting or {}).items() if each is not None})
        self.reference, self.terminal = reference or InitialStudent(), terminal or SemanticClass()
        self.stop_rule = SEPARATE  # until the models are there
        # What serves and does not learn stays out of the module's parameters and checkpoints.
        self.readers = Readers(teacher or NOBODY, "reference" in update.offload)
        self.engine = engine or InProcessEngine()
        self.report = StepReport(rollout.max_new_tokens)
        self.evaluation = Evaluation(rollout.max_new_tokens, rollout.eval_temperature)
        self.skips = Skips(update.max_skipped)

    @property
    def model(self) -> PreTrainedModel:
        """The student, once `setup` has loaded it."""
        if self.student is None:
            raise RuntimeError("The student is loaded by the trainer's setup; start a Trainer, or call setup first.")
        return self.student

    @property
    def objective(self) -> Objective:
        """The terms: those that speak about the student's tokens, and the one that speaks about the others."""
        own: dict[str, LossTerm] = {"divergence": self.divergence, **self._constraints()}
        return Objective(own, {"mixture": self.mixture}, self.update_options.aggregation)

    @property
    def present_mixture(self) -> Mixture:
        """The mixture, or the student alone while the mixture rests."""
        return self.mixture if self.mixture.strength else StudentOnly()

    @property
    def asks_teacher(self) -> bool:
        """Whether there are rows that the teacher has to score, to write, or to have a say in."""
        terms = [self.mixture, *(self.objective.own.values() if self.rollout_options.samples_per_prompt else ())]
        return any(each.needs_teacher for each in terms) or self.mixture.needs_writing_teacher or self.mixture.blends

    @property
    def progress(self) -> float:
        """Share of the training that is over, from 0 to 1; 0 where the trainer has no end."""
        steps = self.trainer.estimated_stepping_batches
        return 0.0 if steps in (0, float("inf")) else min(1.0, self.global_step / steps)

    def setup(self, stage: str) -> None:
        """Load the models that the stage needs, and refuse what cannot work."""
        check_strategy(self.trainer.strategy, str(self.trainer.precision))
        self.load(stage)
        refuse(examine(Patient.of(self, stage)))

    def load(self, stage: str) -> None:
        """Load the models that the stage needs."""
        if self.student is None:
            self.student = load_student(self.student_path, self.adapter, self.update_options.gradient_checkpointing)
            self.adapter_of = None if self.adapter is None else describe_adapter(self.student, self.adapter)
            self.stop = stop_ids(self.student, self.tokenizer)
            self.stop_rule = StopRule(tuple(self.stop))
        if stage != "fit":
            return
        if any(term.needs_reference or term.keeps_reference for term in self.objective.terms.values()):
            # Before a checkpoint is restored: the reference is the initial student.
            self.readers.keep_reference(self.student, adapted=self.adapter is not None)
        looking = [name for name, each in self.weighting.items() if cast(Weighting, each).needs_scores]
        if self.asks_teacher:
            check_served(self.readers.teacher, self.objective.terms, looking)
            golden = self.mixture.needs_teacher
            answers = Answers(getattr(self._trainer, "datamodule", None), self.rollout_options.max_new_tokens, golden)
            introduce(self.readers.teacher, self.student_path, self.student, self.tokenizer, self.device, answers)
        else:
            self.readers.teacher = NOBODY  # so that none is loaded
        if self.mixture.needs_writing_teacher or self.mixture.blends:
            _ = self.readers.teacher.language_model  # refuses if it cannot write
        ids = TerminalIds.of(self.stop, self.readers.teacher.stop_ids, self.tokenizer)
        self.stop_rule = self.terminal.rule(ids)
        check_stop(self.readers.teacher, self.stop_rule.teacher)
        announce(self.terminal, ids, self.tokenizer)
        self.learner = Learner(
            self.student,
            self.objective,
            self.readers,
            self.policies,
            cast(list[Weighting], list(self.weighting.values())),
            self.reference,
            self.update_options,
            ids.union,
            len(self.tokenizer),
            self.stop_rule,
        )

    def configure_model(self) -> None:
        """Shard the models, if the strategy does."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ShardedStrategy):
            return
        check_recipe(self.adapter, self.update_options, self.readers.teacher)
        self.copy = self.copy or InferenceCopy(self.model, strategy.root_device, str(self.trainer.precision))
        strategy.spread(self.model)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.readers.shard(strategy.spread, not (self.mixture.needs_writing_teacher or self.mixture.blends))

    def place(self) -> None:
        """Move what the module does not own to the device, in the student's precision."""
        self.readers.teacher.setup(self.student_path, self.tokenizer, self.device)
        self.readers.move(self.device, self.model.dtype)
        self.reference.check(self.model.dtype)

    def on_fit_start(self) -> None:
        """Place the models, now that the device is known, and make sure that a step fits on it."""
        self.place()
        if self.device.type == "cuda" and self.trainer.world_size == 1:  # sharded models need less than the plan says
            plan = self.memory_plan()
            rank_zero_info(str(plan))
            plan.check(torch.cuda.get_device_properties(self.device).total_memory)

    def memory_plan(self) -> MemoryPlan:
        """Reckon what a training step needs of a device's memory."""
        data = getattr(self.trainer, "datamodule", None)
        sizes = (1, 0, 0)
        if isinstance(data, PromptDataModule):
            sizes = (data.batch_size, data.most_answers, data.longest_prompt)
        compute = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else self.model.dtype
        kept = optimizer_bytes(self.make_optimizer, trained(self.model)[0].dtype)
        options = self.rollout_options, self.update_options
        return plan_memory(self.model, self.readers, *options, *sizes, len(self.tokenizer), compute, kept)

    def configure_optimizers(self) -> Any:
        """Make the optimizer and its schedule."""
        optimizer = self.make_optimizer(trained(self.model))
        check_optimizer(optimizer, is_sharded(self.model))
        if self.make_lr_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}]

    def write(
        self, prompts: Prompts, plan: Plan, sampler: Sampler, *key_parts: int | str, learning: bool = False
    ) -> Rollout:
        """Let the planned authors write; nothing here has a gradient.

        Args:
            prompts: The batch.
            plan: Who writes which row.
            sampler: How the student draws.
            key_parts: What the random choices are keyed by, besides seed, prompt and sample.
            learning: Whether the teacher may write too, and have a say in the student's tokens.
        """
        self.model.eval()
        teacher = self.readers.teacher if learning else None
        budget = self.rollout_options.max_new_tokens
        rule = self.stop_rule if learning else SEPARATE
        columns = teacher.columns if teacher else ()
        stop = self.stop_rule.stop
        writers = Writers(self.writer(), self.tokenizer, self.engine, budget, stop, teacher, rule, columns)
        mixture = self.present_mixture
        with teacher.present() if teacher and mixture.blends else nullcontext():
            blend = None
            if teacher and mixture.blends:
                blend = Blend(teacher.language_model, partial(mixture.blend, progress=self.progress), rule.teacher)
            return writers.carry_out(plan, prompts, sampler, (global_seed(), *key_parts), blend)

    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        """Write, score, update: one optimizer step."""
        with undone_if_it_fails(self, self._parts()):
            self._step(batch)

    def _step(self, batch: Prompts) -> None:
        seed_step(self.global_step, self.global_rank)
        watch = Stopwatch(self.device)
        with watch("rollout"):
            samples = self.rollout_options.samples_per_prompt
            mixture = self.present_mixture
            plan = mixture.plan(batch, samples, self.progress, self.global_step)
            written = self.write(batch, plan, self.sampler, self.global_step, learning=True)
            self.release()
            written = mixture.revise(written, self.global_step)
            found = self.repetition(written)
            rollout, repetition = self.policies.replace(written, found, batch, self.stop_rule.stop)
        self.model.train()
        moment, processes = Moment(self.progress, self.global_step), Processes(self.trainer)
        with watch("score"):
            work = self.learner.arrange(rollout, repetition, moment, processes)
        compares = self.learner.compares_models and processes.some(Author.STUDENT in plan.author)
        tally = Tally(work.shares, self.device, compares)
        comparison = self.learner.compare(work, self.manual_backward, processes, moment)
        self.learner.learn(work, tally, watch, self.manual_backward, processes)
        with watch("update"):
            scalars = self.learner.sum_up(tally, moment, processes)
            case = Case(self.learner, work, rollout, tuple(batch.index), scalars, moment, self.manual_backward)
            taken = self.skips.take(case, processes)
            self.learner.update(self.optimizers(), self.lr_schedulers(), moment, taken)
        scalars |= comparison | {"skipped": self.skips.total}
        self.report.measure(written, found, tally, scalars, watch.seconds, processes.total, self.engine.figures)
        self.report.show(self.trainer)
        if taken:
            self.learner.adapt(scalars, self.report.numbers)

    def on_train_batch_end(self, outputs: Any, batch: Prompts, batch_idx: int) -> None:
        """Log the step, if it is one to log or the last."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step % every == 0 or self.trainer.should_stop):
            scalars = self.report.numbers() | {"epoch": self.current_epoch}
            for logger in self.loggers:
                logger.log_metrics(scalars, step=self.global_step - 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what ends an answer, a moving reference, and what processes do not share; of adapters nothing else."""
        checkpoint["stop_ids"] = list(self.stop_rule.stop)
        if self.adapter_of is not None:
            checkpoint |= {"adapter": self.adapter_of, "state_dict": without_base(checkpoint["state_dict"])}
        if self.reference.moves and self.readers.reference is not None:
            checkpoint["reference"] = self.readers.reference.state_dict()
        if self.trainer.world_size > 1:
            parts = self._parts().items()
            own = {f"{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}
            checkpoint["processes"] = Processes(self.trainer).states(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what this process had and with a moving reference, and end answers as it was trained to.

        Raises:
            ValueError: If a reference moves and the checkpoint has none, or if its adapters are not of this student.
        """
        check_adapter(checkpoint.get("adapter"), self.adapter_of)
        if self.trainer.state.fn != TrainerFn.FITTING:  # which asks the teacher
            self.stop_rule = StopRule(tuple(checkpoint.get("stop_ids", self.stop_rule.stop)))
        states = checkpoint.get("processes")
        if states:  # of another number of processes, some are taken twice or not at all
            checkpoint["state_dict"].update(states[self.global_rank % len(states)])
        if not self.reference.moves or self.readers.reference is None:
            return
        if "reference" not in checkpoint:
            raise ValueError(
                f"Expected a checkpoint with a reference, because model.reference is {type(self.reference).__name__}, "
                "but got one of a run whose reference did not move. Resume with the reference of that run."
            )
        load_state(self.readers.reference, checkpoint["reference"])

    def _parts(self) -> dict[str, nn.Module]:
        """Return all that may remember something, but for the student."""
        return {name: part for name, part in self.named_children() if part is not self.student}

    def _constraints(self) -> dict[str, Constraint]:
        return {name: cast(Constraint, each) for name, each in self.constraints.items()}
