"""From a rollout to gradients: who scores which rows, in which micro-batches, with which denominators."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.models import output_head
from stable_opd.reduce import Aggregation, token_shares
from stable_opd.scoring import HiddenStates, body, micro_batches
from stable_opd.streaming import StreamedLoss, streamed_loss
from stable_opd.teachers.base import Teacher
from stable_opd.terms import LossTerm
from stable_opd.types import Author, Evidence, Repetition, Rollout


@dataclass(frozen=True, slots=True)
class Piece:
    """One micro-batch: some rows by one kind of author, and the terms that speak about them.

    Attributes:
        rollout: The rows.
        evidence: The facts about their positions, without scores.
        shares: Share of each position in the mean over the global batch, (N,).
        terms: The components to call.
        on_policy: Whether the student wrote the rows.
    """

    rollout: Rollout
    evidence: Evidence
    shares: Tensor
    terms: Mapping[str, LossTerm]
    on_policy: bool


def pieces(
    rollout: Rollout,
    repetition: Repetition,
    own_terms: Mapping[str, LossTerm],
    other_terms: Mapping[str, LossTerm],
    aggregation: Aggregation,
    max_tokens: int,
    progress: float,
    total: Callable[[Tensor], Tensor],
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
        max_tokens: Budget of a micro-batch, padding included.
        progress: Share of the training that is over.
        total: Adds up a count over all processes.
    """
    starts = rollout.lengths.cumsum(0) - rollout.lengths
    for on_policy, terms in ((True, own_terms), (False, other_terms)):
        belongs = (rollout.author == Author.STUDENT) == on_policy
        shares = token_shares(rollout.lengths * belongs, aggregation, total)
        rows_with_tokens = (belongs & (rollout.lengths > 0)).nonzero().squeeze(1)
        for rows in micro_batches(rollout, rows_with_tokens, max_tokens):
            part = rollout.select(rows)
            evidence = Evidence(
                tokens=part.completion,
                row=part.row,
                position=part.position,
                in_loop=repetition.in_loop[starts[rows][part.row] + part.position],
                author=part.author[part.row],
                behaviour_logprobs=part.behaviour_logprobs,
                progress=progress,
            )
            yield Piece(part, evidence, shares[rows][part.row], terms, on_policy)


def evaluate(
    piece: Piece, student: PreTrainedModel, teacher: Teacher, reference: PreTrainedModel | None, vocabulary: int
) -> StreamedLoss:
    """Let the models read a micro-batch and evaluate its terms.

    Args:
        piece: The micro-batch.
        student: The model that learns.
        teacher: Scores the rows if a term needs it.
        reference: The initial student; scores the rows if a term needs it.
        vocabulary: Size of the shared vocabulary.
    """
    needs_teacher = any(term.needs_teacher for term in piece.terms.values())
    needs_reference = any(term.needs_reference for term in piece.terms.values())
    reading = None
    if needs_reference and reference is not None:
        with torch.no_grad():
            reading = HiddenStates(body(reference, piece.rollout), output_head(reference, vocabulary))
    return streamed_loss(
        piece.terms,
        piece.evidence,
        piece.shares,
        HiddenStates(body(student, piece.rollout), output_head(student, vocabulary)),
        teacher.score(piece.rollout) if needs_teacher else None,
        reading,
    )


class Tally:
    """Sums over the micro-batches of one step, and the diagnostics of the student's tokens."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.losses = {name: torch.zeros((), dtype=torch.float32, device=device) for name in names}
        self.values = {name: torch.zeros((), dtype=torch.float32, device=device) for name in names}
        self.diagnostics: dict[str, list[Tensor]] = {}

    def add(self, piece: Piece, result: StreamedLoss) -> None:
        """Add one micro-batch."""
        for name in result.losses:
            self.losses[name] = self.losses[name] + result.losses[name]
            self.values[name] = self.values[name] + result.values[name]
        if piece.on_policy and result.diagnostics:
            for name, values in {**result.diagnostics, "in_loop": piece.evidence.in_loop}.items():
                self.diagnostics.setdefault(name, []).append(values)

    def tokens(self, name: str) -> Tensor:
        """Return a diagnostic of all the student's tokens, (N,)."""
        return torch.cat(self.diagnostics[name])

    def reduced(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the scalars to log, added up over all processes in one go."""
        means = {
            "logprob_student": "student",
            "logprob_teacher": "teacher",
            **{name: name for name in ("entropy_student", "entropy_teacher", "overlap")},
        }
        sums = [self.tokens(name).sum() for name in means.values()] if self.diagnostics else []
        count = [torch.full_like(sums[0], self.tokens("student").numel())] if sums else []
        scalars = total(torch.stack([*self.losses.values(), *self.values.values(), *sums, *count]).float())
        losses, values, rest = scalars.split([len(self.losses), len(self.values), len(sums) + len(count)])
        logged = {f"loss/{name}": loss for name, loss in zip(self.losses, losses, strict=True)}
        logged |= {f"value/{name}": value for name, value in zip(self.values, values, strict=True)}
        logged |= {name: rest[place] / rest[-1] for place, name in enumerate(means) if sums}
        return {"loss": losses.sum(), **logged}
