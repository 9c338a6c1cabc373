"""A teacher meets the student and the data, before the first step."""

from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.data import PromptDataModule
from stable_opd.teachers.base import Teacher


class Answers(NamedTuple):
    """What the teacher will have to score.

    Attributes:
        data: Where the prompts come from; only those of a `PromptDataModule` can be looked at.
        budget: Tokens of the student's longest answer.
        golden: Whether it scores golden solutions, too.
    """

    data: Any
    budget: int
    golden: bool = False


def introduce(
    teacher: Teacher,
    name: str,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    answers: Answers,
) -> None:
    """Let a teacher get to know the student and get ready, and make sure that it can score what is to come.

    Args:
        teacher: Who is to score.
        name: Name of the student, for messages.
        student: The model that learns.
        tokenizer: Its tokenizer.
        device: Where the rollouts will be.
        answers: What is to come.

    Raises:
        ValueError: If it cannot score this student or these examples.
    """
    data = answers.data if isinstance(answers.data, PromptDataModule) else None
    teacher.meet(student, tokenizer.encode if data is None else partial(data.tokens, tokenizer=tokenizer))
    teacher.setup(name, tokenizer, device)
    if data is not None and teacher.columns:
        longest = max(answers.budget, data.longest_golden if answers.golden else 0)
        teacher.check([each.fields for each in data.examples.get("train", [])], longest)
