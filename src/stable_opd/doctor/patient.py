"""What the checks look at."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.data import PromptDataModule
from stable_opd.examples import Example
from stable_opd.learning import Learner
from stable_opd.memory import MemoryPlan
from stable_opd.mixtures import Mixture
from stable_opd.models import context_length, load_tokenizer, stop_ids
from stable_opd.samplers import Sampler
from stable_opd.teachers import Teacher
from stable_opd.terminal import StopRule

if TYPE_CHECKING:
    from stable_opd.doctor.measure import Measured
    from stable_opd.module import OPDModule

#: Examples whose tokens are looked at, one by one; of all the others the lengths alone are.
EXAMPLES = 1000


@dataclass(frozen=True)
class Speaker:
    """A language model of this process, with its tokenizer.

    Attributes:
        name: What messages call it: student or teacher.
        path: Where it comes from.
        model: The model.
        tokenizer: The tokenizer that stands beside it.
    """

    name: str
    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def stop(self) -> frozenset[int]:
        """Token ids that end an answer; none if none is configured."""
        try:
            return frozenset(stop_ids(self.model, self.tokenizer))
        except ValueError:
            return frozenset()

    def words(self, tokens: frozenset[int]) -> str:
        """Return tokens as they are written, with their ids."""
        return (
            ", ".join(f"{self.tokenizer.convert_ids_to_tokens(each)!r} ({each})" for each in sorted(tokens)) or "none"
        )


@dataclass(frozen=True)
class Patient:
    """A run before its first step; what is None cannot be looked at.

    Attributes:
        student: The model that learns.
        teacher: The teacher, if it is in this process.
        contexts: Tokens that each of both can read, by its name; None if it does not say.
        data: Prompts and golden solutions.
        learner: The terms, and what belongs to them; only for training.
        stop_rule: What ends an answer, and how the models are read there.
        sampler: How the student draws in training.
        budget: Token budget of an answer.
        precision: Of the trainer; only for training.
        adapted: Whether adapters learn, and the reference is the student without them.
        measured: What the models said of some prompts.
        memory: What a training step needs, if all of it is on one device.
        capacity: Bytes of that device.
    """

    student: Speaker
    contexts: Mapping[str, int | None]
    stop_rule: StopRule
    sampler: Sampler | None
    budget: int
    precision: str | None
    teacher: Speaker | None = None
    data: PromptDataModule | None = None
    learner: Learner | None = None
    adapted: bool = False
    measured: "Measured | None" = None
    memory: MemoryPlan | None = None
    capacity: int | None = None

    @property
    def mixture(self) -> Mixture | None:
        """Whose text the student learns from; only for training."""
        if self.learner is None:
            return None
        found = self.learner.objective.other["mixture"]
        assert isinstance(found, Mixture)
        return found

    @property
    def examples(self) -> list[Example] | None:
        """Examples whose tokens are looked at: those for training, if there are some."""
        if self.data is None:
            return None
        loaded = self.data.examples
        # Sets for evaluation may have columns of their own, and nobody learns from them.
        return (loaded.get("train") or [each for examples in loaded.values() for each in examples])[:EXAMPLES]

    @classmethod
    def of(cls, module: "OPDModule", stage: str) -> "Patient":
        """Return a run whose models and data are loaded, as far as they are."""
        data = getattr(module.trainer, "datamodule", None)
        learner = getattr(module, "learner", None) if stage == "fit" else None
        contexts = {"student": context_length(module.model)}
        return cls(
            student=Speaker("student", module.student_path, module.model, module.tokenizer),
            contexts=contexts | ({"teacher": module.readers.teacher.context_length} if learner else {}),
            stop_rule=module.stop_rule,
            sampler=module.sampler if learner else None,
            budget=module.rollout_options.max_new_tokens,
            precision=str(module.trainer.precision) if learner else None,
            teacher=_in_this_process(module.readers.teacher) if learner else None,
            data=data if isinstance(data, PromptDataModule) and data.examples else None,
            learner=learner,
            adapted=module.adapter is not None,
        )


def _in_this_process(teacher: Teacher) -> Speaker | None:
    try:
        model = teacher.language_model
        path = str(model.name_or_path)
        return Speaker("teacher", path, model, load_tokenizer(path))
    except (ValueError, OSError):  # it is elsewhere, or has no tokenizer of its own
        return None
