"""What is done where student and teacher end their answers with different tokens, or prefer different ones.

A base model ends an answer with one token, and the teacher that was trained further with another. The teacher gives the
first one next to no probability, so every correct stop of the student is punished, and the student unlearns to stop.

A policy says which tokens end a row, and how the log-probs of either model are read. That happens where log-probs are
made (`stable_opd.streaming`) and where tokens are drawn (`stable_opd.engines`), so no component knows of it.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stable_opd.registry import Component, summary

#: Log-prob of a token that cannot occur. It is the same for all models, and its exponential is 0: so it adds nothing to
#: any mean over the vocabulary, where 0 times infinity would not be a number.
NEVER = -1e4

#: Log-prob that a teacher keeps for a token whose probability was moved to another one.
NEGLIGIBLE = math.log(1e-12)


@dataclass(frozen=True, slots=True)
class TerminalIds:
    """The token ids that end an answer.

    Attributes:
        student: Those that end the student's.
        teacher: Those that end the teacher's.
        own: The one of the student's that its golden solutions end with.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    own: int

    @classmethod
    def of(
        cls, student: Sequence[int], teacher: Sequence[int] | None, tokenizer: PreTrainedTokenizerBase
    ) -> "TerminalIds":
        """Return the ids of the shared vocabulary; a teacher that does not say ends its answers as the student does."""
        ours, theirs = (
            tuple(token for token in some if token < len(tokenizer))
            for some in (student, student if teacher is None else teacher)
        )
        return cls(ours, theirs, ours[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id)

    @property
    def foreign(self) -> tuple[int, ...]:
        """Those that end the teacher's answers and not the student's."""
        return tuple(token for token in self.teacher if token not in self.student)

    @property
    def union(self) -> tuple[int, ...]:
        """Those that end an answer of either."""
        return (*self.student, *self.foreign)


@dataclass(frozen=True, slots=True)
class StopEvent:
    """Several token ids that are read as one.

    Attributes:
        token: The id that stands for all of them.
        others: The ids that it stands for besides; they do not occur any more.
        adds: Whether their probability is added to that of the token. If not, they are ruled out, and all tokens that
            remain share it.
        rest: Log-prob of the others where they are scored.
    """

    token: int
    others: tuple[int, ...]
    adds: bool = True
    rest: float = NEVER

    def merged(self, logits: Tensor) -> Tensor:
        """Return the logits of a distribution to draw from, in which the event is one token, (n, V) -> (n, V)."""
        merged = logits.clone()
        if self.adds:
            merged[:, self.token] = self._columns(logits).logsumexp(-1)
        return self.fill_(merged, -torch.inf)

    def read_(self, logprobs: Tensor) -> Tensor:
        """Turn log-probs into those in which the event is one token, (n, V), in place."""
        if self.adds:
            logprobs[:, self.token] = self._columns(logprobs).logsumexp(-1)
        else:
            logprobs.sub_(self.fill_(logprobs, -torch.inf).logsumexp(-1, keepdim=True))
        return self.fill_(logprobs, self.rest)

    def renamed(self, tokens: Tensor) -> Tensor:
        """Return tokens, (n,), in which `token` stands in the place of the others."""
        for other in self.others:
            tokens = tokens.masked_fill(tokens == other, self.token)
        return tokens

    def within(self, logits: Tensor) -> Tensor:
        """Return the probability of each id, `token` first, given that it is one of them: (n, V) -> (n, ids).

        The event's logit is the logsumexp of theirs, so this is how its gradient spreads over them.
        """
        columns = self._columns(logits)
        if not self.adds:
            columns[:, 1:] = -torch.inf
        return columns.softmax(-1)

    def spread_(self, gradient: Tensor, within: Tensor) -> Tensor:
        """Turn a gradient in the logits with the event into one in the model's own, (n, V), in place."""
        event = gradient[:, self.token].clone()
        for place, token in enumerate((self.token, *self.others)):
            gradient[:, token] = event * within[:, place]
        return gradient

    def fill_(self, values: Tensor, value: float) -> Tensor:
        """Set the entries of the others, (n, V), in place."""
        # Column by column: an index of several would have to be copied to the device, which would have to wait for it.
        for token in self.others:
            values[:, token] = value
        return values

    def _columns(self, values: Tensor) -> Tensor:
        return torch.stack([values[:, token] for token in (self.token, *self.others)], -1)


@dataclass(frozen=True, slots=True)
class StopRule:
    """What ends an answer, and how the models' log-probs of it are read.

    Attributes:
        stop: Token ids that end a row.
        student: What the student (and the initial student) is read with; None reads each id by itself.
        teacher: What the teacher is read with.
    """

    stop: tuple[int, ...]
    student: StopEvent | None = None
    teacher: StopEvent | None = None


#: Every id is read by itself.
SEPARATE = StopRule(())


class TerminalPolicy(Component):
    """What is done where student and teacher end their answers with different tokens."""

    kind: ClassVar[str] = "terminal"

    @abstractmethod
    def rule(self, ids: TerminalIds) -> StopRule:
        """Return what ends a row, and how log-probs are read, for a student and a teacher."""


def _event(token: int, others: tuple[int, ...], adds: bool = True, rest: float = NEVER) -> StopEvent | None:
    """Return the event of several ids; None if there is but one, so that nothing has to be done."""
    others = tuple(each for each in others if each != token)
    return StopEvent(token, others, adds, rest) if others else None


class SemanticClass(TerminalPolicy):
    """Stopping is one event: any terminal id ends a row, and both models are scored by the sum over all of them.

        log p(stop) = logsumexp over v in E of log p(v),    E = the terminal ids of student and teacher

    Every component sees one token in the place of E. The teacher has no say in how the student shares p(stop) among E,
    so a student goes on to end its answers with its own token. It does nothing where E is a single id, and acts, too,
    where both models know the same ids, because they may prefer different ones.

    Source: the semantic class of arXiv 2609.20511.
    """

    def rule(self, ids: TerminalIds) -> StopRule:
        """Return one event for both models."""
        both = _event(ids.own, ids.union)
        return StopRule(ids.union, both, both)


class Baseline(TerminalPolicy):
    """Nothing is done: the student's ids end a row, and the teacher is asked for their probability alone.

    Where the teacher ends its answers with another token, the student unlearns to stop.

    Source: the baseline of arXiv 2609.20511.
    """

    def rule(self, ids: TerminalIds) -> StopRule:
        """Return the student's ids."""
        return StopRule(ids.student)


class TwoStop(TerminalPolicy):
    """Any terminal id ends a row, and the loss is left as it is.

    The student may learn to end its answers as the teacher does, if it ever draws the teacher's token.

    Source: two-stop decoding of arXiv 2609.20511, where it does not suffice.
    """

    def rule(self, ids: TerminalIds) -> StopRule:
        """Return the ids of both."""
        return StopRule(ids.union)


class TeacherMap(TerminalPolicy):
    """The teacher's probability of its own terminal ids counts for the student's.

        log q'(e1) = log(q(e1) + q(e2)),    q'(e2) = 1e-12

    with e1 the student's terminal id and e2 the teacher's. The student is left as it is, and ends with its own.

    Source: the teacher map of arXiv 2609.20511.
    """

    def rule(self, ids: TerminalIds) -> StopRule:
        """Return an event for the teacher."""
        return StopRule(ids.student, teacher=_event(ids.own, ids.foreign, rest=NEGLIGIBLE))


class Canonical(TerminalPolicy):
    """As `TeacherMap`, and the student is kept from the teacher's terminal ids, in the loss and where it writes.

        p'(e2) = 0,  p'(v) = p(v) / (1 - p(e2)),    q'(e1) = q(e1) + q(e2),  q'(e2) = 0

    with e1 the student's terminal id and e2 the teacher's.

    Source: the canonical mode of arXiv 2609.20511.
    """

    def rule(self, ids: TerminalIds) -> StopRule:
        """Return an event for each model."""
        return StopRule(ids.student, _event(ids.own, ids.foreign, adds=False), _event(ids.own, ids.foreign))


def announce(policy: TerminalPolicy, ids: TerminalIds, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say in the log with which tokens student and teacher end their answers, unless it is one token for both."""
    if len(ids.union) == 1:
        return
    student, teacher = (
        ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in some)
        for some in (ids.student, ids.teacher)
    )
    rank_zero_info(
        f"The student ends its answers with {student}, the teacher with {teacher}. model.terminal is "
        f"{type(policy).__name__}: {summary(type(policy))}"
    )
