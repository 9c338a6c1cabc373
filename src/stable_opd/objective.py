"""From a rollout to gradients: which rows in which micro-batches, with which terms and denominators."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.diagnostics import Diagnostics
from stable_opd.models import output_head
from stable_opd.reduce import Aggregation, token_shares
from stable_opd.scoring import HiddenStates, body, micro_batches
from stable_opd.streaming import Part, StreamedLoss, streamed_loss
from stable_opd.terms import LossTerm
from stable_opd.types import Author, Evidence, Repetition, Rollout


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of a micro-batch that one set of terms speaks about.

    Attributes:
        rollout: The rows.
        evidence: The facts about their positions, without scores.
        shares: Share of each position in the mean over the global batch, (n,).
        terms: The components to call.
        on_policy: Whether the student wrote the rows.
    """

    rollout: Rollout
    evidence: Evidence
    shares: Tensor
    terms: Mapping[str, LossTerm]
    on_policy: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """One micro-batch: rows that go through the student together.

    Attributes:
        rollout: All rows, those of the groups one after the other.
        groups: The student's rows and the others, as far as there are any.
    """

    rollout: Rollout
    groups: list[Group]


def pieces(
    rollout: Rollout,
    repetition: Repetition,
    own_terms: Mapping[str, LossTerm],
    other_terms: Mapping[str, LossTerm],
    aggregation: Aggregation,
    max_tokens: int,
    progress: float,
    total: Callable[[Tensor], Tensor],
    padded: bool = False,
) -> Iterator[Piece]:
    """Cut a rollout into micro-batches.

    The student's rows and the others are two populations with a mean each, so the weight of the golden term does not
    depend on how many rollouts stand beside it.

    Args:
        rollout: The whole batch of this process.
        repetition: What the detector said of it.
        own_terms: Components that speak about the rows that the student wrote.
        other_terms: Components that speak about the other rows.
        aggregation: Which mean.
        max_tokens: Tokens of a micro-batch.
        progress: Share of the training that is over.
        total: Adds up a count over all processes.
        padded: Whether the student's rows will be padded; then padding counts as tokens.
    """
    own = rollout.author == Author.STUDENT
    populations = [
        (own, own_terms, token_shares(rollout.lengths * own, aggregation, total), True),
        (~own, other_terms, token_shares(rollout.lengths * ~own, aggregation, total), False),
    ]
    starts = rollout.lengths.cumsum(0) - rollout.lengths
    with_tokens = (rollout.lengths > 0).nonzero().squeeze(1)
    for rows in micro_batches(rollout, with_tokens, max_tokens, padded):
        ordered, groups = [], []
        for belongs, terms, shares, on_policy in populations:
            some = rows[belongs[rows]]
            if len(some) == 0:
                continue
            part = rollout.select(some)
            evidence = Evidence(
                tokens=part.completion,
                row=part.row,
                position=part.position,
                in_loop=repetition.in_loop[starts[some][part.row] + part.position],
                author=part.author[part.row],
                behaviour_logprobs=part.behaviour_logprobs,
                progress=progress,
            )
            ordered.append(some)
            groups.append(Group(part, evidence, shares[some][part.row], terms, on_policy))
        yield Piece(groups[0].rollout if len(groups) == 1 else rollout.select(torch.cat(ordered)), groups)


def evaluate(piece: Piece, parts: Sequence[Part], student: PreTrainedModel, vocabulary: int) -> StreamedLoss:
    """Let the student read a micro-batch and evaluate the terms.

    Args:
        piece: The micro-batch.
        parts: What the models that do not learn say of it (`Readers.read`).
        student: The model that learns.
        vocabulary: Size of the shared vocabulary.
    """
    return streamed_loss(HiddenStates(body(student, piece.rollout), output_head(student, vocabulary)), parts)


class Tally:
    """Sums over the micro-batches of one step, and the diagnostics of the student's tokens."""

    #: Means over the student's tokens that are logged, and what they are means of.
    MEANS: ClassVar = {
        "logprob_student": "student",
        "logprob_teacher": "teacher",
        "entropy_student": "entropy_student",
        "entropy_teacher": "entropy_teacher",
        "overlap": "overlap",
    }

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.losses = {name: torch.zeros((), dtype=torch.float32, device=device) for name in names}
        self.values = {name: torch.zeros((), dtype=torch.float32, device=device) for name in names}
        self.diagnostics = Diagnostics()

    def add(self, piece: Piece, result: StreamedLoss) -> None:
        """Add one micro-batch."""
        for name in result.losses:
            self.losses[name] = self.losses[name] + result.losses[name]
            self.values[name] = self.values[name] + result.values[name]
        self.diagnostics.extend(result.diagnostics)
        for group in piece.groups:
            if group.on_policy:
                self.diagnostics.put("in_loop", group.evidence.in_loop)

    def tokens(self, name: str) -> Tensor:
        """Return a diagnostic of all the student's tokens, (N,)."""
        return self.diagnostics[name]

    def reduced(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the scalars to log, added up over all processes in one go."""
        found = [self.tokens(name) for name in self.MEANS.values()] if "student" in self.diagnostics else []
        weights = [self.tokens("stands_for") if len(each) < len(found[0]) else torch.ones_like(each) for each in found]
        sums = [(weight * each).sum() for weight, each in zip(weights, found, strict=True)]
        counts = [weight.sum() for weight in weights]
        scalars = total(torch.stack([*self.losses.values(), *self.values.values(), *sums, *counts]).float())
        losses, values, sums_, counts_ = scalars.split([len(self.losses), len(self.values), len(sums), len(counts)])
        logged = {f"loss/{name}": loss for name, loss in zip(self.losses, losses, strict=True)}
        logged |= {f"value/{name}": value for name, value in zip(self.values, values, strict=True)}
        logged |= dict(zip(self.MEANS if found else [], sums_ / counts_.clamp(min=1), strict=True))
        return {"loss": losses.sum(), **logged}
