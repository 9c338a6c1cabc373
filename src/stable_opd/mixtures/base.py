"""The contract of a mixture: whose text the student learns from.

`plan` says who writes each row; `forward` is the loss of the tokens that the student did not write. A mixture may also
give the teacher a say in every token of the student's rows (`blends`), and add rows of its own to the rollout
(`revise`). `GoldenMixture` is the pattern to follow.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from stable_opd.divergences.base import AdvantageDivergence, Divergence
from stable_opd.schedules import Schedule, scheduled
from stable_opd.terms import LossTerm
from stable_opd.types import Author, Evidence, Plan, Prompts, Rollout, TokenLoss


class Mixture(LossTerm):
    """Whose text the student learns from; its loss is called on the tokens that the student did not write."""

    kind: ClassVar[str] = "mixture"
    #: Every prompt has to have a golden solution.
    needs_golden: bool = False
    #: The teacher writes, so it has to be in this process.
    needs_writing_teacher: bool = False
    #: `blend` is called for every token of the student's rows.
    blends: bool = False
    #: It puts beginnings of somebody else's before the student's rows (`Plan.prefix`).
    begins: bool = False
    #: Whose tokens, other than the student's, it brings into the rollout. It speaks about these and no others.
    authors: tuple[Author, ...] = ()

    @abstractmethod
    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Say who writes which row.

        Args:
            prompts: The batch.
            samples: Rollouts per prompt that the user asked for.
            progress: Share of the training that is over, from 0 to 1.
            step: Optimizer steps taken so far; random choices are keyed by it (`randomness.key`).

        Returns:
            One entry per row, in the order in which the rows are to stand.
        """

    def blend(self, student: Tensor, teacher: Tensor, progress: float) -> Tensor:
        """Return the logits to draw a token of the student's rows from.

        Args:
            student: Logits of the student, after the sampler, (B, V).
            teacher: Logits of the teacher, (B, V).
            progress: Share of the training that is over, from 0 to 1.
        """
        raise NotImplementedError(f"{type(self).__name__} declares blends = True, but does not define `blend`.")

    def revise(self, rollout: Rollout, step: int) -> Rollout:
        """Return the rollout to learn from: the one that was written, perhaps with rows of the author ``PAST``.

        Args:
            rollout: What was written in this step.
            step: Optimizer steps taken so far.
        """
        return rollout


class WeightedMixture(Mixture):
    """A mixture whose tokens of others are learnt by cross-entropy, or by a divergence from the teacher.

    A subclass declares its `authors`.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        loss: How the tokens are learnt; none takes the cross-entropy.
    """

    #: Whether the tokens were drawn at a log-prob that is known, as a sampled divergence has to know.
    drawn: bool = False

    def __init__(self, weight: float = 1.0, schedule: Schedule | None = None, loss: Divergence | None = None) -> None:
        super().__init__()
        check_weight(weight)
        if loss is not None and _is_estimated(loss) and not self.drawn:
            raise ValueError(
                f"Expected a divergence over the vocabulary as the loss of {type(self).__name__}, but got "
                f"{type(loss).__name__}, which is estimated from tokens that the student drew, and these were not. "
                "Choose another, such as ForwardKL, or leave loss out for the default."
            )
        self.weight = weight
        self.schedule = schedule
        self.loss = loss
        self.support = "sampled" if loss is None else loss.support
        self.positionwise = True if loss is None else loss.positionwise
        self.needs_teacher = loss is not None and loss.needs_teacher
        self.needs_reference = loss is not None and loss.needs_reference

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted loss of each token by one of the `authors`."""
        weight, where = scheduled(self.weight, self.schedule, evidence.progress), brought(evidence, self.authors)
        if self.loss is None:
            loss = -evidence.student.sampled
            return TokenLoss(weight * loss, loss.detach(), where)
        term = self.loss(_as_if_own(evidence))
        return TokenLoss(weight * term.loss, term.value, where & term.where)

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss | None:
        """Return the same, and write its gradient in the logits, if the divergence knows its own."""
        term = None if self.loss is None else self.loss.closed_form(_as_if_own(evidence), out)
        if term is None:
            return None
        weight = scheduled(self.weight, self.schedule, evidence.progress)
        out.mul_(weight)
        return TokenLoss(weight * term.loss, term.value, brought(evidence, self.authors) & term.where)


def brought(evidence: Evidence, authors: Sequence[Author]) -> Tensor:
    """Return the tokens that one of some authors wrote, (n,) bool.

    Raises:
        ValueError: If there are no authors.
    """
    if not authors:
        raise ValueError(
            "Expected a mixture with a loss to name whose tokens it speaks about, but got none. Declare "
            "authors = (Author.GOLDEN,), or whose they are, in its class."
        )
    return torch.stack([evidence.written_by(author) for author in authors]).any(0)


def check_weight(weight: float) -> None:
    """Make sure that a weight pulls in the right direction.

    Raises:
        ValueError: If it is negative.
    """
    if weight < 0:
        raise ValueError(f"Expected a weight of at least 0, but got {weight}. 0 learns nothing from these tokens.")


def nothing(evidence: Evidence) -> TokenLoss:
    """Return the loss of a mixture that has no tokens to speak about."""
    zero = torch.zeros_like(evidence.student.sampled)
    return TokenLoss(zero, zero, torch.zeros_like(evidence.in_loop))


def _is_estimated(loss: Divergence) -> bool:
    # A baseline or a gate reads the whole vocabulary, but what is estimated from the written token stays so.
    parts = [part for part in loss.modules() if isinstance(part, Divergence)]
    return any(part.support == "sampled" or isinstance(part, AdvantageDivergence) for part in parts)


def _as_if_own(evidence: Evidence) -> Evidence:
    """Return the evidence as a divergence wants to see it, which speaks about the student's tokens."""
    return replace(evidence, author=torch.full_like(evidence.author, int(Author.STUDENT)))
