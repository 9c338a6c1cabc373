"""From a rollout to gradients: which rows in which micro-batches, with which terms and denominators."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.models import output_head
from stable_opd.reduce import Aggregation, numerators
from stable_opd.scoring import HiddenStates, Opinion, body, micro_batches
from stable_opd.sharding import inside
from stable_opd.streaming import Part, StreamedLoss, streamed_loss
from stable_opd.terminal import StopEvent
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

    def awake(self) -> "Objective":
        """Return the objective without the terms that rest."""
        own, other = ({name: term for name, term in each.items() if term.strength} for each in (self.own, self.other))
        return replace(self, own=own, other=other)

    def shares(
        self,
        rollout: Rollout,
        total: Callable[[Tensor], Tensor],
        kept: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the share of each completion token in the mean of each term, (N,), by the names of the terms.

        A share is multiplied by the `strength` of its term.

        Args:
            rollout: The whole batch of this process.
            total: Adds up a count over all processes.
            kept: The rows that the terms are to speak about, (B,) bool; none means all of them.
            weights: Weight of each token in the terms that are ``weighted``, (N,); none means 1.
        """
        students = rollout.token_author == Author.STUDENT
        read = torch.ones_like(students) if kept is None else kept[rollout.row]
        own = students & read

        masks = [own, *(read & (rollout.token_author == author) for author in OTHERS)]
        masks += [] if weights is None else [own * weights]
        found = [numerators(rollout.row, len(rollout), each, self.aggregation) for each in masks]
        counts = total(torch.stack([count for _, count in found])).clamp(min=1)
        plain, *others = (each / count for (each, _), count in zip(found, counts, strict=True))
        weighted = plain if weights is None else others.pop()
        shares = {name: (weighted if term.weighted else plain) * term.strength for name, term in self.own.items()}
        theirs = torch.stack(others).sum(0)
        return shares | {name: theirs * term.strength for name, term in self.other.items()}


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
        readings: How often teacher and reference have to read it, because they do on another process.
    """

    rollout: Rollout
    groups: list[Group]
    readings: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the models that do not learn think of the rows of a group; None where no term needs to know.

    Attributes:
        teacher: What the teacher thinks.
        reference: The initial student's states.
    """

    teacher: Opinion | None = None
    reference: HiddenStates | None = None


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a rollout is cut into micro-batches.

    Attributes:
        max_tokens: Tokens of a micro-batch.
        padded: Whether rows will be padded; then padding counts as tokens.
        progress: Share of the training that is over.
        stop: Token ids that end an answer.
        event: The terminal ids that the student's log-probs have as one.
    """

    max_tokens: int
    padded: bool = False
    progress: float = 0.0
    stop: tuple[int, ...] = ()
    event: StopEvent | None = None


def pieces(
    rollout: Rollout, repetition: Repetition, objective: Objective, cutting: Cutting, rows: Tensor | None = None
) -> Iterator[Piece]:
    """Cut a rollout into micro-batches.

    Args:
        rollout: The whole batch of this process.
        repetition: What the detector said of it.
        objective: The terms.
        cutting: How to cut.
        rows: Numbers of the rows to learn from, each with a token at least; none means all that have one.
    """
    if rows is None:
        rows = (rollout.lengths > 0).nonzero().squeeze(1)
    students = (rollout.token_author == Author.STUDENT).long()
    counts = torch.zeros_like(rollout.lengths).index_add_(0, rollout.row, students)
    # Rows of the student's, of others, and those that somebody else began.
    kinds = torch.where(counts == 0, 1, torch.where(counts == rollout.lengths, 0, 2)).tolist()
    populations = [(objective.own, True), (objective.other, False), (objective.terms, True)]
    for batch in micro_batches(rollout, rows, cutting.max_tokens, cutting.padded):
        ordered, groups, numbers = [], [], batch.tolist()
        for kind, (terms, on_policy) in enumerate(populations):
            mine = [number for number in numbers if kinds[number] == kind]
            if not mine:
                continue
            some = batch if len(mine) == len(numbers) else torch.tensor(mine, device=batch.device)
            part, places = rollout.select(some), rollout.places(some)
            evidence = Evidence(
                tokens=part.completion if cutting.event is None else cutting.event.renamed(part.completion),
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


def in_step(
    pieces: Sequence[Piece],
    idle: Piece,
    readings: Callable[[Piece], tuple[int, int]],
    largest: Callable[[Sequence[int]], list[int]],
) -> list[Piece]:
    """Let all processes have equally many micro-batches, and read each of them equally often.

    Gathering a block needs all processes, but rows have different lengths and authors on each of them.

    Args:
        pieces: The micro-batches of this process.
        idle: One that no term speaks about, to fill up with.
        readings: How often the teacher and the reference would read a micro-batch.
        largest: Returns the largest numbers over all processes.
    """
    (count,) = largest([len(pieces)])
    filled = [*pieces, *[idle] * (count - len(pieces))]
    often = iter(largest([each for piece in filled for each in readings(piece)]))
    return [replace(piece, readings=(next(often), next(often))) for piece in filled]


def idle_piece(rollout: Rollout, repetition: Repetition, cutting: Cutting, row: int) -> Piece:
    """Return a micro-batch of one row that no term speaks about."""
    only = torch.tensor([row], device=rollout.lengths.device)
    (piece,) = pieces(rollout, repetition, Objective({}, {}), cutting, only)
    return replace(piece, groups=[replace(group, on_policy=False) for group in piece.groups])


def part_of(group: Group, reading: Reading, shares: Mapping[str, Tensor], diagnose: bool = True) -> Part:
    """Return what is asked of a group's positions.

    Args:
        group: The rows.
        reading: What the models that do not learn say of them.
        shares: Share of each token of the whole rollout, (N,), by the names of the terms; only these are asked.
        diagnose: Whether to compare student and teacher on the way, where the student wrote.
    """
    terms = {name: term for name, term in group.terms.items() if name in shares}
    return Part(
        terms,
        group.evidence,
        {name: shares[name][group.places] for name in terms},
        reading.teacher,
        reading.reference,
        diagnose=diagnose and group.on_policy and reading.teacher is not None,
    )


def evaluate(
    piece: Piece,
    readings: Sequence[Reading],
    shares: Mapping[str, Tensor],
    student: PreTrainedModel,
    vocabulary: int,
    diagnose: bool = True,
    event: StopEvent | None = None,
) -> StreamedLoss:
    """Let the student read a micro-batch and evaluate the terms.

    Args:
        piece: The micro-batch.
        readings: What the models that do not learn say of its groups (`Readers.read`).
        shares: As for `part_of`.
        student: The model that learns.
        vocabulary: Size of the shared vocabulary.
        diagnose: As for `part_of`.
        event: The terminal ids that the student's log-probs have as one.
    """
    parts = [part_of(group, reading, shares, diagnose) for group, reading in zip(piece.groups, readings, strict=True)]

    def read() -> StreamedLoss:
        states = HiddenStates(body(student, piece.rollout), output_head(student, vocabulary), event)
        return streamed_loss(states, parts)

    return inside(student, read)
