"""From a rollout to gradients: which rows in which micro-batches, with which terms and denominators."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.models import output_head
from stable_opd.reduce import Aggregation, token_shares
from stable_opd.scoring import HiddenStates, body, micro_batches
from stable_opd.streaming import Part, StreamedLoss, streamed_loss
from stable_opd.terms import LossTerm
from stable_opd.types import Author, Evidence, Repetition, Rollout

#: Whose tokens the student may learn from besides its own.
OTHERS = tuple(author for author in Author if author != Author.STUDENT)


@dataclass(frozen=True)
class Objective:
    """The terms, and how they are averaged.

    The tokens of each author are a population with a mean of its own, so the weight of the golden term does not depend
    on how many rollouts, or rows of others, stand beside it.

    Attributes:
        own: Components that speak about the tokens that the student wrote.
        other: Components that speak about the other tokens.
        aggregation: Which mean.
    """

    own: Mapping[str, LossTerm]
    other: Mapping[str, LossTerm]
    aggregation: Aggregation = "sequence_mean"

    @property
    def terms(self) -> dict[str, LossTerm]:
        """All terms."""
        return {**self.own, **self.other}

    def shares(
        self,
        rollout: Rollout,
        total: Callable[[Tensor], Tensor],
        kept: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the share of each completion token in the mean of each term, (N,), by the names of the terms.

        Args:
            rollout: The whole batch of this process.
            total: Adds up a count over all processes.
            kept: The rows that the terms are to speak about, (B,) bool; none means all of them.
            weights: Weight of each token in the terms that are ``weighted``, (N,); none means 1.
        """
        students = rollout.token_author == Author.STUDENT
        read = torch.ones_like(students) if kept is None else kept[rollout.row]
        own = students & read

        def spread(mask: Tensor) -> Tensor:
            return token_shares(rollout.row, len(rollout), mask, self.aggregation, total)

        plain = spread(own)
        others = torch.stack([spread(read & (rollout.token_author == author)) for author in OTHERS]).sum(0)
        weighted = plain if weights is None else spread(own * weights)
        shares = {name: weighted if term.weighted else plain for name, term in self.own.items()}
        return shares | dict.fromkeys(self.other, others)


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of a micro-batch that one set of terms speaks about.

    Attributes:
        rollout: The rows.
        places: Where their completion tokens stand among those of the whole rollout, (n,).
        evidence: The facts about their positions, without scores.
        terms: The components to call.
        on_policy: Whether the student wrote some of the tokens.
    """

    rollout: Rollout
    places: Tensor
    evidence: Evidence
    terms: Mapping[str, LossTerm]
    on_policy: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """One micro-batch: rows that go through the student together.

    Attributes:
        rollout: All rows, those of the groups one after the other.
        groups: The student's rows, the others, and those that somebody else began, as far as there are any.
    """

    rollout: Rollout
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the models that do not learn think of the rows of a group; None where no term needs to know.

    Attributes:
        teacher: The teacher's states.
        reference: The initial student's.
    """

    teacher: HiddenStates | None = None
    reference: HiddenStates | None = None


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a rollout is cut into micro-batches.

    Attributes:
        max_tokens: Tokens of a micro-batch.
        padded: Whether rows will be padded; then padding counts as tokens.
        progress: Share of the training that is over.
        stop: Token ids that end an answer.
    """

    max_tokens: int
    padded: bool = False
    progress: float = 0.0
    stop: tuple[int, ...] = field(default=())


def pieces(
    rollout: Rollout, repetition: Repetition, objective: Objective, cutting: Cutting, rows: Tensor | None = None
) -> Iterator[Piece]:
    """Cut a rollout into micro-batches.

    Args:
        rollout: The whole batch of this process.
        repetition: What the detector said of it.
        objective: The terms.
        cutting: How to cut.
        rows: Numbers of the rows to learn from; none means all. Those without tokens are left out in any case.
    """
    rows = torch.arange(len(rollout), device=rollout.lengths.device) if rows is None else rows
    rows = rows[rollout.lengths[rows] > 0]
    students = rollout.token_author == Author.STUDENT
    counts = torch.zeros_like(rollout.lengths).index_add_(0, rollout.row, students.long())
    whole, none = counts == rollout.lengths, counts == 0
    populations = [
        (whole & ~none, objective.own, True),
        (none, objective.other, False),
        (~whole & ~none, objective.terms, True),
    ]
    for batch in micro_batches(rollout, rows, cutting.max_tokens, cutting.padded):
        ordered, groups = [], []
        for belongs, terms, on_policy in populations:
            some = batch[belongs[batch]]
            if len(some) == 0:
                continue
            part, places = rollout.select(some), rollout.places(some)
            evidence = Evidence(
                tokens=part.completion,
                row=part.row,
                position=part.position,
                in_loop=repetition.in_loop[places],
                author=part.token_author,
                behaviour_logprobs=part.behaviour_logprobs,
                progress=cutting.progress,
                stop=cutting.stop,
            )
            ordered.append(some)
            groups.append(Group(part, places, evidence, terms, on_policy))
        yield Piece(groups[0].rollout if len(groups) == 1 else rollout.select(torch.cat(ordered)), groups)


def part_of(group: Group, reading: Reading, shares: Mapping[str, Tensor]) -> Part:
    """Return what is asked of a group's positions.

    Args:
        group: The rows.
        reading: What the models that do not learn say of them.
        shares: Share of each token of the whole rollout, (N,), by the names of the terms; only these are asked.
    """
    terms = {name: term for name, term in group.terms.items() if name in shares}
    return Part(
        terms,
        group.evidence,
        {name: shares[name][group.places] for name in terms},
        reading.teacher,
        reading.reference,
        diagnose=group.on_policy and reading.teacher is not None,
    )


def evaluate(
    piece: Piece,
    readings: Sequence[Reading],
    shares: Mapping[str, Tensor],
    student: PreTrainedModel,
    vocabulary: int,
) -> StreamedLoss:
    """Let the student read a micro-batch and evaluate the terms.

    Args:
        piece: The micro-batch.
        readings: What the models that do not learn say of its groups (`Readers.read`).
        shares: As for `part_of`.
        student: The model that learns.
        vocabulary: Size of the shared vocabulary.
    """
    parts = [part_of(group, reading, shares) for group, reading in zip(piece.groups, readings, strict=True)]
    return streamed_loss(HiddenStates(body(student, piece.rollout), output_head(student, vocabulary)), parts)
