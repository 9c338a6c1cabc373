"""The half of a training step in which the student learns from a rollout that is there."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from stable_opd.constraints import Constraint
from stable_opd.gradients import compare_gradients
from stable_opd.look import Look, glance
from stable_opd.models import trained
from stable_opd.objective import Cutting, Objective, Piece, Reading, evaluate, idle_piece, in_step
from stable_opd.objective import pieces as cut
from stable_opd.offload import move_state
from stable_opd.options import UpdateOptions
from stable_opd.packing import packs
from stable_opd.policies import Policies
from stable_opd.processes import Processes
from stable_opd.readers import Readers
from stable_opd.references import Reference
from stable_opd.schedules import Schedule
from stable_opd.sharding import is_sharded, reshard, whole
from stable_opd.stopwatch import Stopwatch
from stable_opd.tally import Tally
from stable_opd.terminal import StopRule
from stable_opd.types import Author, Repetition, Rollout
from stable_opd.weightings import Weighting


class Moment(NamedTuple):
    """Where the training is.

    Attributes:
        progress: Share of it that is over, from 0 to 1.
        step: Optimizer steps taken so far.
    """

    progress: float
    step: int


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be learnt in a step.

    Attributes:
        pieces: The micro-batches.
        readings: What the models that do not learn say of each.
        shares: Share of each token in the mean of each term, (N,), by the names of the terms.
        diagnose: Whether to compare student and teacher on the way.
    """

    pieces: list[Piece]
    readings: Iterable[list[Reading]]
    shares: dict[str, Tensor]
    diagnose: bool


class Learner:
    """Puts a rollout in order, adds up the gradients of all terms, and takes the optimizer step.

    It coordinates the components and never asks which one it holds.

    Args:
        model: The student.
        objective: The terms.
        readers: The models that read and do not learn.
        policies: What is done with loops and truncated rows.
        weightings: How much each token counts.
        reference: What becomes of the reference after a step.
        options: How the student learns.
        stop: Token ids that end an answer, of the student or of the teacher.
        vocabulary: Size of the shared vocabulary.
        rule: Which of them the models' log-probs have as one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        readers: Readers,
        policies: Policies,
        weightings: Sequence[Weighting],
        reference: Reference,
        options: UpdateOptions,
        stop: Sequence[int],
        vocabulary: int,
        rule: StopRule,
    ) -> None:
        self.model, self.objective, self.readers, self.policies = model, objective, readers, policies
        self.weightings, self.reference, self.options = list(weightings), reference, options
        self.stop, self.vocabulary, self.rule = tuple(stop), vocabulary, rule
        terms = nn.ModuleList(objective.terms.values())
        #: Whether student and teacher are compared on the student's rows.
        self.compares_models = any(term.needs_teacher for term in objective.own.values())
        self.observers = [each for each in terms.modules() if isinstance(each, Schedule) and each.observes]

    def arrange(self, rollout: Rollout, repetition: Repetition, moment: Moment, processes: Processes) -> Work:
        """Cut the rollout into micro-batches, let the others read them, and spread the denominators."""
        kept = ~self.policies.dropped(rollout)
        rows = (kept & (rollout.lengths > 0)).nonzero().squeeze(1)
        learnt = len(rows) > 0
        if not learnt:  # one row, though it has no share: processes wait for each other in the backward pass
            rows = rollout.lengths.argmax()[None]
        objective, padded, event = self.objective.awake(), not packs(self.model), self.rule.student
        cutting = Cutting(self.options.micro_batch_tokens, padded, moment.progress, self.stop, event)
        parts = self.readers.teacher.apart(rollout, rows)  # a micro-batch is for one model of the teacher's
        pieces = [piece for part in parts for piece in cut(rollout, repetition, objective, cutting, part)]
        if is_sharded(self.model):
            idle = idle_piece(rollout, repetition, cutting, int(rows[0]))
            pieces = in_step(pieces, idle, self.readers.readings, processes.largest)
        readings: Iterable[list[Reading]] = self.read(pieces)
        looking = any(each.needs_scores for each in self.weightings)
        if looking or self._compares(moment):  # they are read more than once
            readings = list(readings)
        weights = self.policies.weights(rollout, repetition)
        if self.weightings:
            count = len(rollout.row)
            seen = glance(pieces, readings, self.model, self.vocabulary, count, event) if looking else None
            own = (rollout.token_author == Author.STUDENT) & kept[rollout.row]
            look = Look(rollout, repetition, moment.progress, own, processes.gather, seen)
            for weighting in self.weightings:
                weights = weighting(look) if weights is None else weights * weighting(look)
        return Work(pieces, readings, objective.shares(rollout, processes.total, kept, weights), learnt)

    def read(self, pieces: Sequence[Piece]) -> Iterable[list[Reading]]:
        """Let the models that do not learn read micro-batches."""
        return self.readers.read(pieces, self.vocabulary, self.rule)

    def learn(
        self,
        work: Work,
        tally: Tally,
        watch: Stopwatch,
        backward: Callable[[Tensor], None],
        processes: Processes,
        only: str | None = None,
    ) -> None:
        """Evaluate the terms, or one of them, micro-batch by micro-batch, and add up their gradients."""
        shares = work.shares if only is None else {only: work.shares[only]}
        readings = iter(work.readings)
        for number, piece in enumerate(work.pieces):
            with processes.together(last=number + 1 == len(work.pieces)):
                with watch("score"):
                    diagnose = work.diagnose and only is None
                    result = evaluate(
                        piece, next(readings), shares, self.model, self.vocabulary, diagnose, self.rule.student
                    )
                    tally.add(result)
                with watch("update"):
                    # Strategies average gradients over processes; the shares already sum to one over all of them.
                    backward(result.loss * processes.count)

    def compare(
        self, work: Work, backward: Callable[[Tensor], None], processes: Processes, moment: Moment
    ) -> dict[str, Tensor]:
        """Return norms and cosines of the terms' gradients, in the steps in which that was asked for."""
        if not self._compares(moment):
            return {}

        def gradient(name: str) -> None:
            self.differentiate(work, work.readings, name, backward, processes)

        return compare_gradients(list(work.shares), gradient, trained(self.model))

    def differentiate(
        self,
        work: Work,
        readings: Iterable[list[Reading]],
        name: str,
        backward: Callable[[Tensor], None],
        processes: Processes,
    ) -> None:
        """Add up the gradient of one term by itself."""
        tally = Tally({name: work.shares[name]}, self.model.device)
        watch = Stopwatch(self.model.device)
        self.learn(replace(work, readings=readings), tally, watch, backward, processes, only=name)

    def sum_up(self, tally: Tally, moment: Moment, processes: Processes) -> dict[str, Any]:
        """Add the gradient of the penalties on weights, clip the whole, and return what is logged of the step.

        Returns:
            What `Tally.reduced` returns, and the norm of the gradient before clipping, ``grad_norm``.
        """
        scalars: dict[str, Any] = {}
        reshard(self.readers.reference)
        for name, constraint in self._constraints():
            penalty = constraint.pull(self.model, self.readers.reference, moment.progress)
            if penalty is not None:
                scalars |= {f"loss/{name}": penalty[0], f"value/{name}": penalty[1]}
        scalars["grad_norm"] = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip))
        return tally.reduced(processes.total, scalars)

    def update(self, optimizer: Any, scheduler: Any, moment: Moment, taken: bool = True) -> None:
        """Take the optimizer step, and let learning rate and reference follow.

        Without gradients, optimizers of torch change neither weights nor state. So a step that is skipped is counted
        like any other: the next one has other prompts and other random choices, the learning rate is that of its step,
        and a run that is resumed is where it would be.

        Args:
            optimizer: Lightning's, around that of torch.
            scheduler: Of the learning rate, or None.
            moment: Before the step.
            taken: Whether it is taken. If not, there are no gradients.
        """
        inner: Optimizer = optimizer.optimizer
        resting = taken and "optimizer" in self.options.offload
        if resting:
            move_state(inner, self.model.device)
        optimizer.step()
        optimizer.zero_grad()
        if resting:
            move_state(inner, torch.device("cpu"))
        if scheduler is not None:
            scheduler.step()
        if taken and self.readers.reference is not None:
            self.reference.update(self.readers.reference, self.model, moment.step + 1)

    def _asleep(self) -> dict[str, float]:
        """Return the figures of terms that rest, which have nothing to measure."""
        resting = self.objective.terms.keys() - self.objective.awake().terms.keys()
        return {f"train/{kind}/{name}": math.nan for name in resting for kind in ("loss", "value")}

    def adapt(self, scalars: Mapping[str, Any], figures: Callable[[], Mapping[str, float]]) -> None:
        """Let constraints and schedules learn of the step.

        Args:
            scalars: What is logged of it, under names without ``train/``.
            figures: Returns all figures of it as numbers.
        """
        for name, constraint in self._constraints():
            constraint.adapt(scalars[f"value/{name}"])
        if self.observers:
            # Those of the step, which all processes agree on; times are each process's own.
            seen = self._asleep() | {name: value for name, value in figures().items() if name.startswith("train/")}
            for schedule in self.observers:
                schedule.observe(seen)

    def _compares(self, moment: Moment) -> bool:
        every = self.options.compare_gradients_every
        return every > 0 and (moment.step + 1) % every == 0

    def _constraints(self) -> list[tuple[str, Constraint]]:
        return [(name, each) for name, each in self.objective.awake().own.items() if isinstance(each, Constraint)]
