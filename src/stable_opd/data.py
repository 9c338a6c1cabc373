"""Prompts, golden solutions and answers: from files to batches."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from stable_opd.examples import Example, Reader
from stable_opd.options import EvaluationOptions
from stable_opd.randomness import global_seed, key
from stable_opd.sources import Columns, EvaluationSet, Source
from stable_opd.tasks import Task
from stable_opd.types import Prompts

#: Names of evaluation sets become parts of metric names, in which they must not be mistaken for others.
_NAME = re.compile(r"(?!sampled$)[A-Za-z0-9][A-Za-z0-9_.-]*")


class PromptDataModule(LightningDataModule):
    """Batches of prompts from files, a dataset folder or a hub.

    Args:
        train: Examples to train on.
        validation: Examples to evaluate on, or several sets of them by name; also those of ``test`` and ``predict``.
        task: Grades answers; none measures everything but accuracy.
        columns: Which column holds what.
        chat_template: Whether prompts are wrapped in the tokenizer's chat template, as a user's message.
        instruction: Text that follows every problem, on a line of its own.
        batch_size: Prompts per training step and process.
        eval_batch_size: Answers per evaluation batch and process; at least those to one prompt.
        max_prompt_tokens: Examples with a longer prompt are dropped, and counted in the log.
        max_golden_tokens: Training examples with a longer golden solution are dropped, and counted in the log.

    Raises:
        ValueError: If the name of an evaluation set cannot be part of a metric's name.
    """

    def __init__(
        self,
        train: Source | None = None,
        validation: EvaluationSet | dict[str, EvaluationSet] | None = None,
        task: Task | None = None,
        columns: Columns = Columns(),
        chat_template: bool = False,
        instruction: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        max_prompt_tokens: int | None = None,
        max_golden_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.task, self.columns = train, task, columns
        self.validation: Mapping[str, EvaluationSet] = _named(validation)
        self.chat_template, self.instruction = chat_template, instruction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_prompt_tokens, self.max_golden_tokens = max_prompt_tokens, max_golden_tokens
        self.examples: dict[str, list[Example]] = {}

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that was loaded; 0 before that."""
        return max((len(example.ids) for examples in self.examples.values() for example in examples), default=0)

    @property
    def golden_count(self) -> tuple[int, int]:
        """How many training examples have a golden solution, and how many there are."""
        examples = self.examples.get("train", [])
        return sum(example.golden is not None for example in examples), len(examples)

    @property
    def longest_golden(self) -> int:
        """Tokens of the longest golden solution that was loaded, its stop token included; 0 before that."""
        return max((len(example.golden or ()) for example in self.examples.get("train", [])), default=0)

    def text(self, prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a prompt as the text that a model with that tokenizer reads.

        Raises:
            ValueError: If it is a list of messages, and there is to be no chat template.
        """
        return self._reader(tokenizer, self.columns).text(prompt)

    def tokens(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return a prompt as the token ids that a model with that tokenizer reads."""
        return self._reader(tokenizer, self.columns).tokens(prompt)

    @property
    def most_answers(self) -> int:
        """Answers of the largest evaluation batch; 0 before the sets are loaded."""
        sizes = [
            min(self._prompts(source), len(self.examples.get(self._split(name), []))) * max(1, source.samples)
            for name, source in self.validation.items()
        ]
        return max(sizes, default=0)

    def setup(self, stage: str) -> None:
        """Read, tokenise and filter what the stage needs.

        Raises:
            ValueError: If a source cannot be used; the message says why and what to change.
        """
        fits = stage == "fit"
        if not (self.train if fits else self.validation):
            first = "train" if fits else "validation"
            raise ValueError(
                f"`{stage}` needs examples, but data.{first} is not set: name a file by data.{first}.path."
            )
        module: Any = self.trainer.lightning_module if self.trainer else None
        if module is None:
            raise RuntimeError("The data module tokenises for a module's student: hand both to a Trainer.")
        for name, source in self.validation.items():
            self._load(self._split(name), source, source.columns or self.columns, module.tokenizer)
        if fits and self.train is not None:
            self._load("train", self.train, self.columns, module.tokenizer)
        step, available = self.batch_size * self._world_size, len(self.examples.get("train", []))
        if fits and available < step:
            raise ValueError(
                f"A training step takes {step} prompts (data.batch_size={self.batch_size} times {self._world_size} "
                f"processes), but there are only {available} usable examples in {self.train}. Lower data.batch_size."
            )
        for name, source in self.validation.items():
            if len(self.examples[self._split(name)]) < self._world_size:
                raise ValueError(
                    f"Expected at least one validation example for each of {self._world_size} processes, but there are "
                    f"{len(self.examples[self._split(name)])} in {source}. Add some, or use fewer processes."
                )

    def train_dataloader(self) -> DataLoader[Example]:
        """Return shuffled batches; the order follows from the seed, the epoch and the global step."""
        trainer = self.trainer
        assert trainer is not None
        sampler = ResumableSampler(
            self.examples["train"],
            self.batch_size,
            num_replicas=self._world_size,
            rank=trainer.global_rank,
            steps_done=lambda: trainer.global_step,
        )
        return self._loader("train", self.batch_size, sampler, partial(collate, task=self.task), drop_last=True)

    def val_dataloader(self) -> list[DataLoader[Example]]:
        """Return the evaluation prompts, each once: a loader for each set."""
        trainer = self.trainer
        assert trainer is not None
        loaders = []
        for name, source in self.validation.items():
            mine = range(trainer.global_rank, len(self.examples[self._split(name)]), self._world_size)
            options = EvaluationOptions(name, source.samples, source.temperature)
            batched = partial(collate, task=source.task or self.task, evaluation=options)
            loaders.append(self._loader(self._split(name), self._prompts(source), list(mine), batched))
        return loaders

    def test_dataloader(self) -> Any:
        """As for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """As for validation."""
        return self.val_dataloader()

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _load(self, split: str, source: Source, columns: Columns, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read a source, once."""
        if split not in self.examples:
            self.examples[split] = self._reader(tokenizer, columns, split == "train").read(split, source)

    def _reader(self, tokenizer: PreTrainedTokenizerBase, columns: Columns, trains: bool = False) -> Reader:
        limits = self.max_prompt_tokens, self.max_golden_tokens
        return Reader(tokenizer, columns, self.chat_template, self.instruction, *limits, trains=trains)

    def _loader(
        self, split: str, batch_size: int, sampler: Any, batched: Any, drop_last: bool = False
    ) -> DataLoader[Example]:
        return DataLoader(
            list(enumerate(self.examples[split])),  # type: ignore[arg-type]
            batch_size=batch_size,  # by keyword, as trainers that rebuild the loader expect
            sampler=sampler,
            collate_fn=batched,
            drop_last=drop_last,
        )

    def _prompts(self, source: EvaluationSet) -> int:
        """Return how many prompts of a set make a batch."""
        return max(1, self.eval_batch_size // max(1, source.samples))

    @staticmethod
    def _split(name: str) -> str:
        """Return under which name the examples of an evaluation set are kept, and logged."""
        return f"validation/{name}" if name else "validation"


def _named(validation: EvaluationSet | Mapping[str, EvaluationSet] | None) -> Mapping[str, EvaluationSet]:
    """Return evaluation sets by name; a single one has none."""
    if not isinstance(validation, Mapping):
        return {} if validation is None else {"": validation}
    for name in validation:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "Expected names of evaluation sets to be letters, digits, '_', '.' and '-', and not `sampled`, but got "
                f"{name!r}. Rename it: it becomes a part of the names of its metrics."
            )
    return validation


class ResumableSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) and starts an epoch where the global step says, so a resumed run goes on.

    Args:
        examples: What is sampled.
        batch_size: Examples per step and process.
        num_replicas: Number of processes.
        rank: Number of this process.
        steps_done: Tells the global step.
    """

    def __init__(self, examples: Any, batch_size: int, num_replicas: int, rank: int, steps_done: Any) -> None:
        super().__init__(examples, num_replicas, rank, shuffle=True, seed=0, drop_last=True)
        self.batch_size = batch_size
        self.steps_done = steps_done

    def __iter__(self) -> Iterator[int]:
        """Yield the rest of the epoch in which the global step lies."""
        count = len(self.dataset)  # type: ignore[arg-type]
        steps = count // (self.batch_size * self.num_replicas)
        epoch, done = divmod(self.steps_done(), steps)
        generator = torch.Generator().manual_seed(key(global_seed(), "order", epoch))
        order = torch.randperm(count, generator=generator).tolist()
        start = done * self.batch_size * self.num_replicas
        return iter(order[start + self.rank : steps * self.batch_size * self.num_replicas : self.num_replicas])

    def __len__(self) -> int:
        """Examples of a whole epoch on this process."""
        return len(self.dataset) // (self.batch_size * self.num_replicas) * self.batch_size  # type: ignore[arg-type]


def collate(
    examples: list[tuple[int, Example]], task: Task | None = None, evaluation: EvaluationOptions | None = None
) -> Prompts:
    """Return examples, each with its place in its dataset, as one batch."""
    return Prompts(
        ids=[example.ids for _, example in examples],
        golden=[example.golden for _, example in examples],
        index=[index for index, _ in examples],
        fields=[example.fields for _, example in examples],
        task=task,
        evaluation=evaluation,
    )
