"""The contract of a teacher: who scores the student's tokens."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.registry import Component
from stable_opd.scoring import Opinion
from stable_opd.terminal import StopEvent
from stable_opd.terms import SUPPORTS, LossTerm, Support
from stable_opd.types import Rollout


class Teacher(Component):
    """Who scores the student's tokens; it serves and does not learn, so it is no module and is in no checkpoint."""

    kind: ClassVar[str] = "teacher"

    #: The most that its scores tell (`LossTerm.support`); likeliest tokens come with the written ones.
    support: Support = "full"
    #: How many of its likeliest tokens it tells; None for all.
    k: int | None = None
    #: Fields of the examples that it reads, besides the tokens; they come with the rows (`Rollout.fields`).
    columns: tuple[str, ...] = ()

    def meet(self, student: PreTrainedModel, tokens: Callable[[str], list[int]]) -> None:
        """Get to know the student, before `setup`; most teachers need not.

        Args:
            student: The model that learns.
            tokens: Turns a prompt into token ids as the data module does, chat template and instruction included.
        """

    @abstractmethod
    def setup(self, student: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Get ready: load what is needed and make sure that the student's token ids mean the same here.

        Args:
            student: Name of the student, for messages.
            tokenizer: The student's tokenizer.
            device: Where the rollouts will be.

        Raises:
            ValueError: If this teacher cannot score that student.
        """

    def check(self, examples: Sequence[Mapping[str, Any]], budget: int) -> None:
        """Make sure that answers to some examples can be scored, after `setup`.

        Args:
            examples: Their fields.
            budget: Tokens of the longest answer.

        Raises:
            ValueError: If not; here, if a column is missing.
        """
        missing = sorted({name for name in self.columns for each in examples if each.get(name) is None})
        if missing:
            raise ValueError(
                f"Expected examples with {' and '.join(map(repr, missing))}, because {type(self).__name__} reads it, "
                "but some have none. Drop them, or name another column in model.teacher."
            )

    def apart(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        """Cut rows, whose numbers are given, into those that may be scored together; all of them may here."""
        return [rows]

    #: Whether `present` costs time, so that all rows are to be scored in one go.
    offload: bool = False

    #: Whether it is the student that reads, or one of its teachers is, so that the student has to be whole.
    reads_by_student: bool = False

    #: Whether its weights are spread over processes, so that all of them have to ask it equally often.
    sharded: bool = False

    def shard(self, spread: Callable[[PreTrainedModel], None]) -> None:
        """Spread its weights over processes, after `setup`; does nothing here.

        Args:
            spread: Does it to a model, in place.
        """

    def present(self) -> AbstractContextManager[None]:
        """Have what scoring needs in place for the time of a context; nothing has to be moved here."""
        return nullcontext()

    @property
    def footprint(self) -> int:
        """Bytes that it occupies on the device; 0 for one that runs elsewhere."""
        return 0

    @property
    def language_model(self) -> PreTrainedModel:
        """The model itself, for mixtures in which the teacher writes; it is on the device while it is `present`.

        Raises:
            ValueError: If it is not in this process.
        """
        raise ValueError(
            f"{type(self).__name__} scores tokens but does not write any. Use a LocalTeacher, or a mixture in which "
            "the teacher writes nothing, such as GoldenMixture."
        )

    @property
    def identity(self) -> str:
        """What tells it from any teacher that would score otherwise; it is known before `setup`.

        Raises:
            ValueError: If nothing does.
        """
        raise ValueError(
            f"Expected a teacher whose scores can be kept, but nothing tells a {type(self).__name__} from another one. "
            "Leave out the CachedTeacher around it."
        )

    @property
    def stop_ids(self) -> tuple[int, ...] | None:
        """Token ids that end its answers, after `setup`; None if it does not say."""
        return None

    @abstractmethod
    def score(self, rollout: Rollout) -> Opinion:
        """Read some rows.

        Returns:
            The hidden states from which their completion tokens are predicted, or what is known of a model elsewhere.
        """

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """How many tokens the teacher can read, or None if it does not say."""


class _Nobody(Teacher):
    """Scores nothing, where no row is for a teacher."""

    context_length = None

    def setup(self, student: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Do nothing."""

    def score(self, rollout: Rollout) -> Opinion:
        """Refuse."""
        raise RuntimeError("Rows of the student's were written though none were asked for, so no teacher was loaded.")


#: Stands where no row is for a teacher, so that none is loaded.
NOBODY: Teacher = _Nobody()


def check_served(teacher: Teacher, terms: Mapping[str, LossTerm], comparing: Sequence[str] = ()) -> None:
    """Make sure that a teacher tells what the terms read.

    Args:
        teacher: Who is asked.
        terms: Who asks, by name.
        comparing: Names of weightings that compare whole distributions.

    Raises:
        ValueError: If it does not; the message says who reads more.
    """
    if teacher is NOBODY:
        raise ValueError(
            "Expected a teacher, because there are rows for it to score or to write, but got none. Set model.teacher; "
            "only fine-tuning (GoldenMixture with model.rollout.samples_per_prompt: 0) does without."
        )
    name, most = type(teacher).__name__, SUPPORTS.index(teacher.support)
    for key, term in terms.items():
        what = f"{type(term).__name__} ({key})"
        if term.needs_teacher and SUPPORTS.index(term.support) > most:
            raise ValueError(
                f"Expected a teacher that tells what {what} reads, which is {_READS[term.support]}, but {name} tells "
                f"{_READS[teacher.support]}. Choose a component of another support (`stable-opd list` has a column "
                "for it), or a LocalTeacher."
            )
        parts = [each for each in term.modules() if isinstance(each, LossTerm) and each.support == "topk"]
        k = max((each.k for each in parts if each.needs_teacher), default=0)
        if teacher.k is not None and k > teacher.k:
            raise ValueError(
                f"Expected a teacher that tells its {k} likeliest tokens, for {what}, but {name} tells "
                f"{teacher.k}. Raise model.teacher.k, or lower the k of the component."
            )
    if comparing and teacher.support != "full":
        raise ValueError(
            f"Expected a teacher that tells {_READS['full']}, because {' and '.join(comparing)} compares the student "
            f"with it, but {name} tells {_READS[teacher.support]}. Leave the weighting out, or use a LocalTeacher."
        )


def check_stop(teacher: Teacher, event: StopEvent | None) -> None:
    """Make sure that a teacher tells how likely the end of an answer is, where several tokens end it.

    Args:
        teacher: Who is asked.
        event: The terminal ids that its log-probs have as one.

    Raises:
        ValueError: If it tells of fewer tokens than there are to add up.
    """
    told = 0 if teacher.support == "sampled" else teacher.k
    count = 1 if event is None else 1 + len(event.others)
    if count > 1 and told is not None and told < count:
        raise ValueError(
            f"Expected a teacher that tells its {count} likeliest tokens at least, because {count} tokens end an "
            f"answer and are read as one (model.terminal), but {type(teacher).__name__} tells {told}, and the others "
            "would count for nothing. Raise model.teacher.k, to 16 for instance, or read each by itself, with "
            "model.terminal: TwoStop."
        )


_READS = {
    "sampled": "the log-probs of the written tokens",
    "topk": "the likeliest tokens",
    "full": "the whole vocabulary",
}
