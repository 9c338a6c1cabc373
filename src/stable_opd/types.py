"""The nouns that flow through a training step: Prompts -> Rollout -> Evidence -> TokenLoss.

Letters used everywhere: B rows, T completion length, N completion tokens of all rows together (the sum of their real
lengths), n positions of one piece of evidence (N or a part of it), V vocabulary. Ragged data is *packed*: the tokens of
all rows stand one after the other, without padding, in the order of the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stable_opd.packing import Packing, ragged_arange

if TYPE_CHECKING:
    from stable_opd.options import EvaluationOptions
    from stable_opd.tasks.base import Task


class Author(IntEnum):
    """Who wrote a row."""

    STUDENT = 0
    GOLDEN = 1
    TEACHER = 2
    PAST = 3  # the student of an earlier step, whose row is learnt from once more


class Finish(IntEnum):
    """Why a row ended."""

    STOP = 0  # a stop token
    LENGTH = 1  # the token budget ran out
    LOOP = 2  # stopped early because it repeated itself; counts as truncated


class Prompts:
    """One batch of problems.

    A plain class, because trainers take dataclasses and tuples apart, element by element, to move and to cast tensors.

    Args:
        ids: Token ids of each prompt, ragged.
        golden: Token ids of each prompt's golden solution with its stop token, or None where it has none.
        index: Position of each prompt in its dataset; random choices are keyed by it.
        fields: The task's fields of each prompt (the answer, for instance).
        task: Grades completions of these prompts; None if they cannot be graded.
        evaluation: How an evaluation answers them; None does it in the usual way.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        golden: Sequence[Sequence[int] | None],
        index: Sequence[int],
        fields: Sequence[Mapping[str, Any]],
        task: "Task | None" = None,
        evaluation: "EvaluationOptions | None" = None,
    ) -> None:
        self.ids = ids
        self.golden = golden
        self.index = index
        self.fields = fields
        self.task = task
        self.evaluation = evaluation

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.ids)

    def to(self, device: torch.device) -> "Prompts":
        """Stay here: the engine places what it needs. Trainers move whatever has this method by calling it."""
        return self


class Plan(NamedTuple):
    """Who writes what: one entry for each row of the rollout to come.

    Attributes:
        prompt: Which prompt of the batch the row answers, (B,).
        author: Who writes it, (B,).
        prefix: How many tokens stand before a row of the student's, written by `prefix_author`.
        prefix_author: `Author.GOLDEN` or `Author.TEACHER`.
    """

    prompt: list[int]
    author: list[Author]
    prefix: int = 0
    prefix_author: Author = Author.GOLDEN


@dataclass(frozen=True)
class Rollout:
    """Completions, packed.

    Attributes:
        tokens: Prompt and completion of each row, one row after the other, (sum of both,).
        prompt_lengths: Prompt tokens of each row, (B,).
        lengths: Completion tokens of each row, its stop token included, (B,).
        prompt: Which prompt of the batch each row answers, (B,); -1 for one of an earlier batch.
        author: `Author` of each row, that of its last token, (B,).
        finish: `Finish` of each row, (B,).
        behaviour_logprobs: Log-prob of each completion token under whoever drew it, after the sampler; 0 for tokens
            that were not drawn, (N,).
        token_author: `Author` of each completion token; a row may have begun with somebody else's, (N,).
        texts: Completion of each row as text, without special tokens.
        fields: What the teacher reads of each row's example (`Teacher.columns`).
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    prompt: Tensor
    author: Tensor
    finish: Tensor
    behaviour_logprobs: Tensor
    token_author: Tensor
    texts: list[str]
    fields: list[Mapping[str, Any]]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @cached_property
    def row(self) -> Tensor:
        """Row of each completion token, (N,)."""
        rows = torch.arange(len(self), device=self.lengths.device)
        return rows.repeat_interleave(self.lengths)

    @cached_property
    def position(self) -> Tensor:
        """Position of each completion token in its completion, from 0, (N,)."""
        return ragged_arange(self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """Where each row's prompt starts in `tokens`, (B,)."""
        totals = self.prompt_lengths + self.lengths
        return totals.cumsum(0) - totals

    @cached_property
    def completion(self) -> Tensor:
        """Completion tokens, (N,)."""
        return self.tokens[(self.starts + self.prompt_lengths)[self.row] + self.position]

    @cached_property
    def packing(self) -> Packing:
        """Where the rows are when models read them packed: each without its last token, which predicts nothing."""
        return Packing(self.prompt_lengths + self.lengths - 1)

    @property
    def truncated(self) -> Tensor:
        """Rows that did not end by a stop token, (B,) bool."""
        return self.finish != Finish.STOP

    def written_by(self, author: Author) -> Tensor:
        """Numbers of the rows that ``author`` wrote, (rows,)."""
        return (self.author == author).nonzero().squeeze(1)

    def places(self, rows: Tensor) -> Tensor:
        """Return where the completion tokens of some rows stand among all, row after row in the order given."""
        starts = self.lengths.cumsum(0) - self.lengths
        return starts[rows].repeat_interleave(self.lengths[rows]) + ragged_arange(self.lengths[rows])

    def select(self, rows: Tensor) -> "Rollout":
        """Return the rollout of some rows only, in the order given."""
        totals = self.prompt_lengths + self.lengths
        places = self.places(rows)
        return replace(
            self,
            tokens=self.tokens[self.starts[rows].repeat_interleave(totals[rows]) + ragged_arange(totals[rows])],
            prompt_lengths=self.prompt_lengths[rows],
            lengths=self.lengths[rows],
            prompt=self.prompt[rows],
            author=self.author[rows],
            finish=self.finish[rows],
            behaviour_logprobs=self.behaviour_logprobs[places],
            token_author=self.token_author[places],
            texts=[self.texts[row] for row in rows.tolist()],
            fields=[self.fields[row] for row in rows.tolist()],
        )


class Repetition(NamedTuple):
    """What a detector found.

    Attributes:
        in_loop: Completion tokens that sit inside a loop, (N,) bool.
        repetitive: Rows that count as repetitive, (B,) bool.
    """

    in_loop: Tensor
    repetitive: Tensor


class Scores:
    """What one model says about some positions; reading what was not asked for is an error.

    Args:
        sampled: Log-prob of the token that was written, (n,) float32.
        logprobs: Log-probs of the whole vocabulary, (n, V) float32; its memory is that of the next tile too, so it is
            not to be kept.
        room: Memory for the probabilities, (n, V); none takes new.
        top: The likeliest tokens and their log-probs, (n, K) each, likeliest first, where these are all that is known.
    """

    def __init__(
        self,
        sampled: Tensor | None = None,
        logprobs: Tensor | None = None,
        room: Tensor | None = None,
        top: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._sampled = sampled
        self._logprobs = logprobs
        self._room = room
        self._top = top

    @property
    def whole(self) -> bool:
        """Whether the whole vocabulary is known."""
        return self._logprobs is not None

    @property
    def known(self) -> int:
        """How many of the likeliest tokens are known."""
        if self._top is not None:
            return self._top[0].shape[-1]
        return 0 if self._logprobs is None else self._logprobs.shape[-1]

    def at(self, places: slice) -> "Scores":
        """Return the scores of some of the positions."""
        sampled, logprobs = (None if each is None else each[places] for each in (self._sampled, self._logprobs))
        return Scores(sampled, logprobs, top=self._top and (self._top[0][places], self._top[1][places]))

    @property
    def sampled(self) -> Tensor:
        """Log-prob of the token that was written, (n,)."""
        if self._sampled is None:
            raise ValueError(
                "This model did not score these positions. Declare needs_teacher = True or needs_reference = True in "
                "the component's class."
            )
        return self._sampled

    @property
    def logprobs(self) -> Tensor:
        """Log-probs of the whole vocabulary, (n, V)."""
        if self._logprobs is None:
            raise ValueError(
                "The log-probs of the whole vocabulary were not computed for this component. Declare "
                'support = "full" (and needs_teacher or needs_reference) in its class, or read `sampled`.'
            )
        return self._logprobs

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k likeliest tokens, likeliest first, and their log-probs, (n, k) each; all V if k is larger.

        Raises:
            ValueError: If fewer are known.
        """
        if self._top is None:
            logprobs, tokens = self.logprobs.topk(min(k, self.logprobs.shape[-1]), -1)
            return tokens, logprobs
        tokens, logprobs = self._top
        if k > tokens.shape[-1]:
            raise ValueError(
                f"Expected the {k} likeliest tokens, but {tokens.shape[-1]} are known of this model. Lower the k of "
                "the component, or raise that of model.teacher."
            )
        return tokens[:, :k], logprobs[:, :k]

    def mass(self, tokens: Sequence[int], written: Tensor) -> Tensor:
        """Return the probability of some tokens together, (n,); of those that are not known, nothing is counted.

        Args:
            tokens: Their ids.
            written: The token that was written at each position, (n,), which is known in any case.
        """
        if self._top is None:
            # Column by column: an index of several would have to be copied to the device, which would have to wait.
            known = [self.logprobs[:, token].exp() for token in tokens if token < self.logprobs.shape[-1]]
            return torch.stack(known).sum(0) if known else torch.zeros_like(self.logprobs[:, 0])
        ids, logprobs = self._top
        some = torch.tensor(list(tokens), dtype=ids.dtype, device=ids.device)
        apart = torch.isin(written, some) & ~(ids == written[:, None]).any(-1)
        return (logprobs.exp() * torch.isin(ids, some)).sum(-1) + self.sampled.exp() * apart

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities of the whole vocabulary, (n, V), computed once for all who ask."""
        return torch.exp(self.logprobs, out=self._room)


NOT_SCORED = Scores()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a component sees: n positions, whose tokens were written and then scored.

    A component with ``support = "sampled"`` sees all positions of some whole rows at once, so it may follow a row from
    token to token; one with ``support = "full"`` sees tiles, so it must treat each position by itself.

    Attributes:
        tokens: The token that was written, (n,).
        row: Its row, (n,); rows are contiguous.
        position: Its position in the completion, from 0, (n,).
        in_loop: Whether the detector says that it sits inside a loop, (n,) bool.
        author: `Author` of the token, (n,).
        behaviour_logprobs: Its log-prob under whoever drew it, (n,).
        progress: Share of the training that is over, from 0 to 1.
        stop: Token ids that end an answer, of the student or of the teacher.
        student: Scores of the student; the only ones through which a gradient flows.
        teacher: Scores of the teacher, for components that declare ``needs_teacher``.
        reference: Scores of the initial student, for components that declare ``needs_reference``.
    """

    tokens: Tensor
    row: Tensor
    position: Tensor
    in_loop: Tensor
    author: Tensor
    behaviour_logprobs: Tensor
    progress: float
    stop: tuple[int, ...] = ()
    student: Scores = NOT_SCORED
    teacher: Scores = NOT_SCORED
    reference: Scores = NOT_SCORED

    def written_by(self, author: Author) -> Tensor:
        """Positions whose token ``author`` wrote, (n,) bool."""
        return self.author == author

    def seen(self, tile: slice, student: Scores, teacher: Scores, reference: Scores) -> "Evidence":
        """Return the evidence on a tile of the positions, with the scores that the models gave there."""
        return Evidence(
            self.tokens[tile],
            self.row[tile],
            self.position[tile],
            self.in_loop[tile],
            self.author[tile],
            self.behaviour_logprobs[tile],
            self.progress,
            self.stop,
            student,
            teacher,
            reference,
        )


class TokenLoss(NamedTuple):
    """One term of the objective, per position, unreduced and unmasked.

    Attributes:
        loss: What is minimised, (n,), differentiable, with the term's weight already applied.
        value: What is reported, (n,), without gradient and without weight. The number of a surrogate loss means
            nothing, so a sampled divergence reports the divergence here.
        where: The positions that this term speaks about, (n,) bool. The others add nothing to the mean, but are counted
            in its denominator, which is known before the loss is.
    """

    loss: Tensor
    value: Tensor
    where: Tensor
