"""Prompts, golden solutions and answers: from files to batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from stable_opd.randomness import global_seed, key
from stable_opd.tasks import Task
from stable_opd.testbed import resolve
from stable_opd.types import Prompts

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """Where examples come from.

    Args:
        path: A JSONL or Parquet file, a folder (of such files, or written by ``Dataset.save_to_disk``), a hub name, or
            one of the testbed's (``testbed:train``).
        split: Which split of a folder or of a hub's dataset.
        subset: Which configuration of a hub's dataset.
    """

    path: str
    split: str = "train"
    subset: str | None = None


@dataclass(frozen=True)
class Columns:
    """Which column holds what; the others travel along for the task.

    Args:
        prompt: The problem as text, or as a list of chat messages.
        golden: The golden solution, where there is one.
        answer: The right answer, where there is one; the task finds it as ``answer``.
    """

    prompt: str = "prompt"
    golden: str = "golden"
    answer: str = "answer"


@dataclass(frozen=True)
class Example:
    """One problem, ready for the models.

    Attributes:
        ids: The prompt's token ids.
        golden: Token ids of the golden solution with its stop token, or None.
        fields: All columns of the example, and its right answer as ``answer``.
    """

    ids: list[int]
    golden: list[int] | None
    fields: Mapping[str, Any]


class PromptDataModule(LightningDataModule):
    """Batches of prompts from files, a dataset folder or a hub.

    Args:
        train: Examples to train on.
        validation: Examples to evaluate on; also those of ``test`` and ``predict``.
        task: Grades answers; none measures everything but accuracy.
        columns: Which column holds what.
        chat_template: Whether prompts are wrapped in the tokenizer's chat template, as a user's message.
        batch_size: Prompts per training step and process.
        eval_batch_size: Prompts per evaluation batch and process.
        max_prompt_tokens: Examples with a longer prompt are dropped, and counted in the log.
        max_golden_tokens: Training examples with a longer golden solution are dropped, and counted in the log.
    """

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        task: Task | None = None,
        columns: Columns = Columns(),
        chat_template: bool = False,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        max_prompt_tokens: int | None = None,
        max_golden_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.validation, self.task, self.columns = train, validation, task, columns
        self.chat_template = chat_template
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

    def setup(self, stage: str) -> None:
        """Read, tokenise and filter what the stage needs.

        Raises:
            ValueError: If a source cannot be used; the message says why and what to change.
        """
        needed = {"validation": self.validation} | ({"train": self.train} if stage == "fit" else {})
        first = "train" if stage == "fit" else "validation"
        if needed[first] is None:
            raise ValueError(
                f"`{stage}` needs examples, but data.{first} is not set: name a file by data.{first}.path."
            )
        module: Any = self.trainer.lightning_module if self.trainer else None
        if module is None:
            raise RuntimeError("The data module tokenises for a module's student: hand both to a Trainer.")
        tokenizer: PreTrainedTokenizerBase = module.tokenizer
        for name, source in needed.items():
            if source is not None and name not in self.examples:
                self.examples[name] = self._load(name, source, tokenizer)
        step, available = self.batch_size * self._world_size, len(self.examples.get("train", []))
        if stage == "fit" and available < step:
            raise ValueError(
                f"A training step takes {step} prompts (data.batch_size={self.batch_size} times {self._world_size} "
                f"processes), but there are only {available} usable examples in {self.train}. Lower data.batch_size."
            )
        if 0 < len(self.examples.get("validation", [])) < self._world_size:
            raise ValueError(
                f"Expected at least one validation example for each of {self._world_size} processes, but there are "
                f"{len(self.examples['validation'])} in {self.validation}. Add some, or use fewer processes."
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
        return self._loader("train", self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> Any:
        """Return the evaluation prompts, each once, or nothing if there are none."""
        if "validation" not in self.examples:
            return []
        trainer = self.trainer
        assert trainer is not None
        mine = range(trainer.global_rank, len(self.examples["validation"]), self._world_size)
        return self._loader("validation", self.eval_batch_size, sampler=list(mine))

    def test_dataloader(self) -> Any:
        """As for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """As for validation."""
        return self.val_dataloader()

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _loader(self, split: str, batch_size: int, sampler: Any, drop_last: bool = False) -> DataLoader[Example]:
        examples = list(enumerate(self.examples[split]))
        return DataLoader(
            examples,  # type: ignore[arg-type]
            batch_size=batch_size,  # by keyword, as trainers that rebuild the loader expect
            sampler=sampler,
            collate_fn=partial(collate, task=self.task),
            drop_last=drop_last,
        )

    def _load(self, name: str, source: Source, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Read one source and say how many examples were dropped, and why."""
        table = read_source(source)
        if self.columns.prompt not in table.column_names:
            raise ValueError(
                f"Expected {source.path} to have a column {self.columns.prompt!r} with the prompts, but it has "
                f"{table.column_names}. Name the column with data.columns.prompt."
            )
        examples: list[Example] = []
        dropped = {"prompts are too long": 0, "golden solutions are too long": 0}
        for row in table:
            example = self._encode(row, tokenizer)
            if self.max_prompt_tokens is not None and len(example.ids) > self.max_prompt_tokens:
                dropped["prompts are too long"] += 1
            elif (
                name == "train"
                and self.max_golden_tokens is not None
                and len(example.golden or []) > self.max_golden_tokens
            ):
                dropped["golden solutions are too long"] += 1
            else:
                examples.append(example)
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        suffix = f" (dropped: {reasons})" if reasons else ""
        rank_zero_info(f"{name}: {len(examples)} examples from {source.path}{suffix}")
        if not examples:
            why = f"all {len(table)} were dropped ({reasons})" if len(table) else "it is empty"
            raise ValueError(f"Expected at least one example in {source.path}, but {why}.")
        return examples

    def text(self, prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a prompt as the text that a model reads, in the tokenizer's chat template if there is to be one.

        Raises:
            ValueError: If it is a list of messages, and there is to be none.
        """
        if self.chat_template:
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if not isinstance(prompt, str):
            raise ValueError(
                f"Expected prompts to be text, but got a {type(prompt).__name__}. Set data.chat_template=true for "
                "lists of chat messages."
            )
        return prompt

    def _encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        prompt = row[self.columns.prompt]
        if not prompt:
            raise ValueError(f"Expected every prompt to have some text, but got {prompt!r} in the example {dict(row)}.")
        prompt = self.text(prompt, tokenizer)
        # A chat template writes its special tokens itself; adding them again would double the start token.
        ids = tokenizer.encode(prompt, add_special_tokens=not self.chat_template)
        if not ids:
            raise ValueError(f"Expected every prompt to have some tokens, but got none for {prompt!r}.")
        golden = row.get(self.columns.golden)
        if golden and tokenizer.eos_token_id is None:
            raise ValueError(
                "Golden solutions end with a stop token, but the student's tokenizer has no eos_token: set it."
            )
        solution = [*tokenizer.encode(golden, add_special_tokens=False), tokenizer.eos_token_id] if golden else None
        answer = {"answer": row[self.columns.answer]} if self.columns.answer in row else {}
        return Example(ids, solution, {**row, **answer})


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


def collate(examples: list[tuple[int, Example]], task: Task | None) -> Prompts:
    """Return examples, each with its place in its dataset, as one batch."""
    return Prompts(
        ids=[example.ids for _, example in examples],
        golden=[example.golden for _, example in examples],
        index=[index for index, _ in examples],
        fields=[example.fields for _, example in examples],
        task=task,
    )


def read_source(source: Source) -> "Dataset":
    """Read a source as a table.

    Raises:
        ValueError: If there is nothing at a local path, if it is empty, or if it cannot be read.
    """
    place = Path(resolve(source.path))
    try:
        return _load_table(place, source)
    except Exception as error:  # whatever a file or a hub may do, the user must learn which source it was
        # The libraries say of a table without rows that its schema or its first file cannot be found.
        if _is_empty(place) or isinstance(error, IndexError) or "corresponds to no data" in str(error):
            raise ValueError(f"Expected at least one example in {source.path}, but it is empty.") from error
        raise ValueError(
            f"Could not read examples from {source.path!r} (split {source.split!r}): {type(error).__name__}: {error}. "
            "Expected a .jsonl, .json or .parquet file, a folder of them or written by save_to_disk, or a hub name."
        ) from error


def _load_table(place: Path, source: Source) -> Any:
    import datasets  # takes a second to import, which only those who load data should pay

    if place.suffix in FORMATS:
        return datasets.load_dataset(FORMATS[place.suffix], data_files=str(place), split="train")
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        stored = datasets.load_from_disk(str(place))
        return stored[source.split] if isinstance(stored, datasets.DatasetDict) else stored
    return datasets.load_dataset(str(place), source.subset, split=source.split)


def _is_empty(place: Path) -> bool:
    return place.is_file() and place.stat().st_size == 0
