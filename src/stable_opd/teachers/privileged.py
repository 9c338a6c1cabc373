"""A teacher who knows more than the student does."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from string import Formatter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.scoring import Opinion
from stable_opd.teachers.base import Teacher
from stable_opd.types import Rollout


class _Columns(Formatter):
    """Fills in columns by their whole names, which are looked up and nothing else."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return kwargs[field_name], field_name


class PrivilegedTeacher(Teacher):
    """Reads another prompt than the student did, which may tell the solution, and scores the student's tokens after it.

    The template is filled in with the fields of the example, and becomes a prompt as any other does: instruction, chat
    template and tokenizer are those of the student's prompts. It is never cut; what does not fit is refused.

    Around a `LocalTeacher` with the student's path, or a `SelfTeacher`, this is self-distillation: what the student
    could say if it knew the solution teaches it to find one. A solution in the prompt makes answers shorter and surer
    than a student without it can be; a reference KL holds against that.

    Source: OPSD (arXiv 2601.18734), with the initial student and a reference solution; SDPO (arXiv 2601.20802), with
    the current student and feedback.

    Args:
        teacher: Who reads it.
        template: The prompt, with columns in braces, as in ``{problem} A correct solution: {solution}``; braces of its
            own are doubled.
    """

    def __init__(self, teacher: Teacher, template: str) -> None:
        named = tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))
        if not named or not all(named):
            raise ValueError(
                f"Expected a template with columns in braces, such as {{solution}}, but got {template!r}. Name one; "
                "braces of its own are doubled."
            )
        self.teacher, self.template, self._named = teacher, template, named
        self.support, self.k, self.offload = teacher.support, teacher.k, teacher.offload
        self.columns = tuple(dict.fromkeys([*named, *teacher.columns]))
        self.reads_by_student = teacher.reads_by_student
        self._tokens: Callable[[str], list[int]] | None = None

    def meet(self, student: PreTrainedModel, tokens: Callable[[str], list[int]]) -> None:
        """Keep how prompts become tokens."""
        self._tokens = tokens
        self.teacher.meet(student, tokens)

    def setup(self, student: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Get the teacher ready."""
        self.teacher.setup(student, tokenizer, device)

    def check(self, examples: Sequence[Mapping[str, Any]], budget: int) -> None:
        """Make sure that the examples have what the template names, and that the prompts leave room for an answer.

        Raises:
            ValueError: If not.
        """
        super().check(examples, budget)
        self.teacher.check(examples, budget)
        longest = max((len(self._prompt(each)) for each in examples), default=0)
        self._check_room(longest, budget)

    def apart(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        """Cut rows as the teacher wants them."""
        return self.teacher.apart(rollout, rows)

    def shard(self, spread: Callable[[PreTrainedModel], None]) -> None:
        """Spread the teacher's weights; it is asked whenever this one is."""
        self.teacher.shard(spread)
        self.sharded = self.teacher.sharded

    def present(self) -> AbstractContextManager[None]:
        """Have the teacher in place."""
        return self.teacher.present()

    @property
    def footprint(self) -> int:
        """Bytes of the teacher."""
        return self.teacher.footprint

    @property
    def identity(self) -> str:
        """That of the teacher, and what it reads."""
        return repr((self.template, self.teacher.identity))

    @property
    def stop_ids(self) -> tuple[int, ...] | None:
        """The teacher's."""
        return self.teacher.stop_ids

    @property
    def context_length(self) -> int | None:
        """How many tokens the teacher can read."""
        return self.teacher.context_length

    def score(self, rollout: Rollout) -> Opinion:
        """Let the teacher read the completions of some rows, each after its privileged prompt.

        Raises:
            ValueError: If a field is missing, or a row is too long for the teacher.
        """
        prompts = [self._prompt(each) for each in rollout.fields]
        lengths = torch.tensor([len(each) for each in prompts], device=rollout.lengths.device)
        totals = (lengths + rollout.lengths).tolist()
        longest = max(range(len(totals)), key=totals.__getitem__)
        self._check_room(len(prompts[longest]), totals[longest] - len(prompts[longest]))
        answers = rollout.completion.split(rollout.lengths.tolist())
        pairs = zip(prompts, answers, strict=True)
        tokens = [part for ids, answer in pairs for part in (torch.tensor(ids, device=answer.device), answer)]
        return self.teacher.score(replace(rollout, tokens=torch.cat(tokens), prompt_lengths=lengths))

    def _prompt(self, fields: Mapping[str, Any]) -> list[int]:
        """Return the privileged prompt of an example, as tokens."""
        for name in self._named:
            if not isinstance(fields.get(name), str | int | float):
                raise ValueError(
                    f"Expected text or a number in the column {name!r}, because model.teacher.template names it, but "
                    f"got {fields.get(name)!r}. Name another column, or drop the examples without it."
                )
        if self._tokens is None:
            raise RuntimeError("The teacher was asked before it was told by `meet` how prompts become tokens.")
        tokens = self._tokens(_Columns().vformat(self.template, (), fields))
        if not tokens:
            named = {name: fields[name] for name in self._named}
            raise ValueError(
                f"Expected a privileged prompt of some tokens, but got none from {named}. Write more than columns into "
                "model.teacher.template, or drop the examples without a value."
            )
        return tokens

    def _check_room(self, prompt: int, answer: int) -> None:
        length = self.context_length
        if length is not None and prompt + answer > length:
            raise ValueError(
                f"Expected privileged prompts and answers of {length} tokens at most, which is what the teacher reads, "
                f"but got a prompt of {prompt} and answers of up to {answer}. Shorten model.teacher.template, drop "
                "examples with long fields (data.max_golden_tokens, data.max_prompt_tokens), lower "
                "model.rollout.max_new_tokens, or choose a teacher with a longer context."
            )
