"""From rows of a table to examples: tokens, the golden solution, and what is dropped on the way."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from stable_opd.randomness import key
from stable_opd.sources import Columns, Source, read_source

#: Characters of the longest text that is tokenised: more tokens than any student reads.
LONGEST = 2**20


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


class Dropped(Exception):
    """An example that is not used, for the reason given."""


@dataclass(frozen=True)
class Reader:
    """Makes examples of rows.

    Attributes:
        tokenizer: The student's tokenizer.
        columns: Which column holds what.
        chat_template: Whether prompts are wrapped in the tokenizer's chat template.
        instruction: What follows every problem, on a line of its own.
        max_prompt_tokens: Longest prompt that is kept.
        max_golden_tokens: Longest golden solution that is kept, its stop token included.
        trains: Whether the golden solutions are needed: examples without a good one are dropped.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: Columns
    chat_template: bool = False
    instruction: str | None = None
    max_prompt_tokens: int | None = None
    max_golden_tokens: int | None = None
    trains: bool = False

    def read(self, name: str, source: Source) -> list[Example]:
        """Read a source, and say in the log how many examples were dropped, and why.

        Args:
            name: What it is called there.
            source: Where the examples are.

        Raises:
            ValueError: If it lacks a column, or no example is left.
        """
        table = read_source(source)
        self._check_columns(source, list(table[0]))
        examples: list[tuple[int, Example]] = []
        dropped: Counter[str] = Counter()
        for number, row in enumerate(table):
            try:
                examples.append((number, self.encode(row)))
            except Dropped as reason:
                dropped[str(reason)] += 1
            except ValueError as error:
                raise ValueError(f"{source.path}, row {number + 1}: {error}") from error
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items(), reverse=True))
        suffix = f" (dropped: {reasons})" if reasons else ""
        found = taken(examples, source.part)
        whole = f"{len(found)} of {len(examples)}" if source.part else str(len(examples))
        rank_zero_info(f"{name}: {whole} examples from {source.path}{suffix}")
        if not examples:
            raise ValueError(
                f"Expected at least one example in {source.path}, but all {len(table)} were dropped ({reasons})."
            )
        if not found:
            raise ValueError(
                f"Expected some examples of {source.path} in the part {list(source.part or ())}, but there are only "
                f"{len(examples)}{suffix}. Take an earlier part, or loosen the filters."
            )
        return found

    def encode(self, row: Mapping[str, Any]) -> Example:
        """Return a row as an example.

        Raises:
            Dropped: If it is not to be used.
            ValueError: If its prompt cannot be.
        """
        ids = self._prompt(row)
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise Dropped("prompts are too long")
        text, solution = self._golden(row)
        fields = dict(row)
        if text is not None:
            fields[self.columns.golden] = text  # and not all of those that there were to choose from
        if self.columns.answer in row:
            fields["answer"] = row[self.columns.answer]
        return Example(ids, solution, fields)

    def text(self, prompt: str | list[dict[str, str]]) -> str:
        """Return a prompt as the text that a model reads, with the instruction and in the chat template.

        Raises:
            ValueError: If it is a list of messages, and there is to be no chat template.
        """
        after = f"\n{self.instruction}" if self.instruction else ""
        if self.chat_template:
            messages = _messages(prompt)
            if after:
                messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + after}]
            try:
                return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except Exception as error:  # whatever a template does with messages of other roles than it knows
                raise ValueError(
                    f"Expected messages that the student's chat template takes, but it says {str(error)[:200]!r}. "
                    "Change the messages, or set data.chat_template=false."
                ) from error
        if not isinstance(prompt, str):
            raise ValueError(
                f"Expected prompts to be text, but got a {type(prompt).__name__}. Set data.chat_template=true for "
                "lists of chat messages."
            )
        return prompt + after

    def tokens(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Return a prompt as the token ids that a model reads.

        Raises:
            Dropped: If it is far too long, and prompts have a limit.
            ValueError: If it cannot be encoded.
        """
        text = self.text(prompt)
        if len(text) > LONGEST:
            if self.max_prompt_tokens is not None:
                raise Dropped("prompts are too long")
            raise ValueError(_too_long("prompt", text, "prompt"))
        # A chat template writes its special tokens itself; adding them again would double the start token.
        return self._tokens(text, add_special_tokens=not self.chat_template)

    def _check_columns(self, source: Source, present: list[str]) -> None:
        """Refuse a table without the columns that cannot be done without."""
        needed = {"prompt": self.columns.prompt} | ({"judged": self.columns.judged} if self.trains else {})
        for use, column in needed.items():
            if column is not None and column not in present:
                what = "prompts" if use == "prompt" else "verdicts on the golden solutions"
                raise ValueError(
                    f"Expected {source.path} to have a column {column!r} with the {what}, but it has {present}. Name "
                    f"the column with data.columns.{use}."
                )

    def _prompt(self, row: Mapping[str, Any]) -> list[int]:
        prompt = row[self.columns.prompt]
        if not prompt:
            raise ValueError(f"Expected every prompt to have some text, but got {prompt!r}. Add it, or drop the row.")
        ids = self.tokens(prompt)
        if not ids:
            raise ValueError(f"Expected every prompt to have some tokens, but got none for {prompt!r:.200}.")
        return ids

    def _golden(self, row: Mapping[str, Any]) -> tuple[str | None, list[int] | None]:
        """Return the first golden solution that is good enough, as text and as tokens with the stop token."""
        candidates, right = _listed(row.get(self.columns.golden)), None
        if self.columns.judged is not None:
            right = _listed(row.get(self.columns.judged))
            if right != [None] and len(right) != len(candidates):
                raise ValueError(
                    f"Expected a verdict on each golden solution, but got {len(right)} on {len(candidates)}. "
                    "Name other columns with data.columns.golden and data.columns.judged."
                )
            candidates = [text for text, verdict in zip(candidates, right, strict=False) if verdict]
        candidates = [text for text in candidates if text]
        for text in candidates:
            if self.max_golden_tokens is not None and isinstance(text, str) and len(text) > LONGEST:
                continue
            solution = self._solution(text)
            if not self.trains or self.max_golden_tokens is None or len(solution) <= self.max_golden_tokens:
                return text, solution
        if self.trains and (candidates or right is not None):
            raise Dropped("golden solutions are too long" if candidates else "golden solutions are judged wrong")
        return None, None

    def _solution(self, text: str) -> list[int]:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "Golden solutions end with a stop token, but the student's tokenizer has no eos_token: set it."
            )
        if not isinstance(text, str):
            raise ValueError(
                f"Expected golden solutions to be text, but got a {type(text).__name__}. Name the column that "
                "holds them with data.columns.golden."
            )
        if len(text) > LONGEST:
            raise ValueError(_too_long("golden solution", text, "golden"))
        return [*self._tokens(text, add_special_tokens=False), self.tokenizer.eos_token_id]

    def _tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # of whatever type; a vocabulary of words alone has none for an unknown word
            raise ValueError(
                f"Expected text that the student's tokenizer can encode, but it says {str(error)[:200]!r} of "
                f"{text[:200]!r}. Change the text, or the student."
            ) from error
        return ids


def taken(examples: list[tuple[int, Example]], part: tuple[int, int] | None) -> list[Example]:
    """Return a part of numbered examples, from an order that follows from their numbers; all, as they are, if None."""
    if part is not None:
        examples = sorted(examples, key=lambda each: key("part", each[0]))[slice(*part)]
    return [example for _, example in examples]


def _messages(prompt: Any) -> list[dict[str, str]]:
    """Return a prompt as chat messages."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    for each in messages:
        if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ("role", "content")):
            raise ValueError(
                "Expected a prompt to be text or a list of chat messages, each with a role and a content of text, but "
                f"got {str(each)[:200]!r}. Name the column of the prompts with data.columns.prompt."
            )
    return messages


def _too_long(what: str, text: str, option: str) -> str:
    return (
        f"Expected a {what} of at most {LONGEST} characters, but got one of {len(text)}. Drop the row, or let "
        f"data.max_{option}_tokens drop it."
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
