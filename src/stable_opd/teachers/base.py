"""The contract of a teacher: who scores the student's tokens."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.registry import Component
from stable_opd.scoring import HiddenStates
from stable_opd.types import Rollout


class Teacher(Component):
    """Who scores the student's tokens; it serves and does not learn, so it is no module and is in no checkpoint."""

    kind: ClassVar[str] = "teacher"

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

    #: Whether `present` costs time, so that all rows are to be scored in one go.
    offload: bool = False

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
    def stop_ids(self) -> tuple[int, ...] | None:
        """Token ids that end its answers, after `setup`; None if it does not say."""
        return None

    @abstractmethod
    def score(self, rollout: Rollout) -> HiddenStates:
        """Read some rows and return the hidden states from which their completion tokens are predicted."""

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """How many tokens the teacher can read, or None if it does not say."""
