"""Carrying out a plan: student and teacher write their rows, golden rows are copied, and all stand in one rollout."""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.engines.base import Blend, Completions, Request, RolloutEngine
from stable_opd.engines.in_process import InProcessEngine
from stable_opd.models import context_length
from stable_opd.randomness import key
from stable_opd.samplers import Sampler, Temperature
from stable_opd.teachers.base import Teacher
from stable_opd.terminal import SEPARATE, StopEvent, StopRule
from stable_opd.types import Author, Finish, Plan, Prompts, Rollout

#: Runs the teacher's generation; one for all steps, so that what it has to say is said once.
_TEACHERS_ENGINE = InProcessEngine()


def row_keys(plan: Plan, prompts: Prompts, rows: list[int], *parts: int | str) -> list[int]:
    """Return the random key of each row: the parts, the prompt's place in its dataset, and the sample's number."""
    seen: Counter[int] = Counter()
    keys = []
    for row in rows:
        prompt = plan.prompt[row]
        keys.append(key(*parts, prompts.index[prompt], seen[prompt]))
        seen[prompt] += 1
    return keys


@dataclass(frozen=True)
class Writers:
    """Who writes, and under which conditions.

    Attributes:
        student: The model that learns.
        tokenizer: Its tokenizer.
        engine: Runs the student's generation.
        max_new_tokens: Token budget of a row.
        stop: Token ids that end a row.
        teacher: Writes the rows that are planned for it, at temperature 1, in this process.
        rule: Which of the stop tokens are drawn as one.
        columns: Fields of the prompts that go with their rows.
    """

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    max_new_tokens: int
    stop: Sequence[int]
    teacher: Teacher | None = None
    rule: StopRule = SEPARATE
    columns: Sequence[str] = ()

    def carry_out(
        self,
        plan: Plan,
        prompts: Prompts,
        sampler: Sampler,
        key_parts: tuple[int | str, ...],
        blend: Blend | None = None,
    ) -> Rollout:
        """Return the rollout that a plan asks for.

        Args:
            plan: Who writes which row.
            prompts: What is answered.
            sampler: How the student draws.
            key_parts: What the random choices are keyed by, besides prompt and sample.
            blend: A model that has a say in every token of the student's. If it is the teacher, the teacher has to be
                `present` all the time.

        Raises:
            ValueError: If the plan is empty, or names an author who does not write here.
        """
        check_authors(plan, self.teacher)
        rows: list[_Row | None] = [None] * len(plan.author)
        for row, (prompt, author) in enumerate(zip(plan.prompt, plan.author, strict=True)):
            if author == Author.GOLDEN:
                rows[row] = self._golden(prompts, prompt)
        theirs = [row for row, author in enumerate(plan.author) if author == Author.TEACHER]
        own = [row for row, author in enumerate(plan.author) if author == Author.STUDENT]
        with self._teacher_present(plan, blend):
            taught = self._teach(plan, prompts, theirs, self.max_new_tokens, (*key_parts, "teacher"))
            prefixes = self._prefixes(plan, prompts, own, (*key_parts, "prefix"))
        written = self._write(plan, prompts, own, prefixes, sampler, key_parts, blend)
        for row, text in zip([*theirs, *own], [*taught, *written], strict=True):
            rows[row] = text
        return self._pack(plan, prompts, [row for row in rows if row is not None])

    def _golden(self, prompts: Prompts, prompt: int) -> "_Row":
        tokens = list(prompts.golden[prompt] or [])
        stopped = bool(tokens) and tokens[-1] in self.stop
        return _Row.copied(tokens, Author.GOLDEN, Finish.STOP if stopped else Finish.LENGTH, self.student.device)

    def _teach(
        self, plan: Plan, prompts: Prompts, rows: list[int], budget: int, key_parts: tuple[int | str, ...]
    ) -> list["_Row"]:
        """Let the teacher write rows."""
        if not rows or self.teacher is None:
            return []
        keys = row_keys(plan, prompts, rows, *key_parts)
        request = self._request(prompts.ids, [plan.prompt[row] for row in rows], keys, budget, self.rule.teacher)
        written = _TEACHERS_ENGINE.generate(self.teacher.language_model, request, Temperature(1.0))
        return _Row.split(written, Author.TEACHER)

    def _prefixes(
        self, plan: Plan, prompts: Prompts, rows: list[int], key_parts: tuple[int | str, ...]
    ) -> list["_Row"]:
        """Return what stands before each of the student's rows, if anything is to."""
        # The last token is the student's, so that there is something to learn.
        longest = min(plan.prefix, self.max_new_tokens - 1)
        if longest == 0:
            return []
        if plan.prefix_author == Author.TEACHER:
            return self._teach(plan, prompts, rows, longest, key_parts)
        golden = [list(prompts.golden[plan.prompt[row]] or [])[:-1][:longest] for row in rows]
        return [_Row.copied(tokens, plan.prefix_author, Finish.LENGTH, self.student.device) for tokens in golden]

    def _write(
        self,
        plan: Plan,
        prompts: Prompts,
        rows: list[int],
        prefixes: list["_Row"],
        sampler: Sampler,
        key_parts: tuple[int | str, ...],
        blend: Blend | None,
    ) -> list["_Row"]:
        """Let the student go on where each prefix ends, unless it ended the answer."""
        keys, whole = row_keys(plan, prompts, rows, *key_parts), list(prefixes)
        extra = {} if blend is None else {"blend": blend}  # an engine that runs one model need not know of it
        if rows and not prefixes:
            asked = [plan.prompt[row] for row in rows]
            request = self._request(prompts.ids, asked, keys, self.max_new_tokens, self.rule.student)
            return _Row.split(self.engine.generate(self.student, request, sampler, **extra), Author.STUDENT)
        going = [place for place, prefix in enumerate(prefixes) if prefix.finish != Finish.STOP]
        heads = {place: (*prompts.ids[plan.prompt[rows[place]]], *prefixes[place].tokens.tolist()) for place in going}
        budgets = {place: self.max_new_tokens - len(prefixes[place].tokens) for place in going}
        for places in self._together(heads, budgets, blend):
            distinct = list(dict.fromkeys(heads[place] for place in places))  # rows with one head share its prefill
            numbers = {head: number for number, head in enumerate(distinct)}
            request = self._request(
                distinct,
                [numbers[heads[place]] for place in places],
                [keys[place] for place in places],
                max(budgets[place] for place in places),
                self.rule.student,
            )
            written = _Row.split(self.engine.generate(self.student, request, sampler, **extra), Author.STUDENT)
            for place, text in zip(places, written, strict=True):
                whole[place] = prefixes[place].followed_by(text, self.max_new_tokens)
        return whole

    def _together(
        self, heads: dict[int, tuple[int, ...]], budgets: dict[int, int], blend: Blend | None
    ) -> list[list[int]]:
        """Return which rows are written together.

        A request has one budget, so rows with a long prefix are asked for more than will be kept. Where that would go
        beyond what a model can read, rows are written with their equals.
        """
        if not heads:
            return []
        contexts = [context_length(each) for each in (self.student, *(() if blend is None else (blend.model,)))]
        asked = max(map(len, heads.values())) + max(budgets.values())
        if all(context is None or asked <= context for context in contexts):
            return [list(heads)]
        return [[place for place in heads if budgets[place] == budget] for budget in sorted(set(budgets.values()))]

    def _teacher_present(self, plan: Plan, blend: Blend | None) -> AbstractContextManager[None]:
        writes = Author.TEACHER in plan.author or (plan.prefix > 0 and plan.prefix_author == Author.TEACHER)
        # With a blend it is there already, and one that comes twice would leave too early.
        return self.teacher.present() if self.teacher and writes and blend is None else nullcontext()

    def _request(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[int],
        keys: list[int],
        budget: int,
        event: StopEvent | None,
    ) -> Request:
        return Request(prompts, rows, keys, budget, self.stop, len(self.tokenizer), event)

    def _pack(self, plan: Plan, prompts: Prompts, rows: list["_Row"]) -> Rollout:
        device = self.student.device
        heads = {index: torch.tensor(prompts.ids[index], device=device) for index in set(plan.prompt)}
        fields = [{name: each[name] for name in self.columns if name in each} for each in prompts.fields]
        return Rollout(
            tokens=torch.cat(
                [part for prompt, row in zip(plan.prompt, rows, strict=True) for part in (heads[prompt], row.tokens)]
            ),
            prompt_lengths=torch.tensor([len(prompts.ids[prompt]) for prompt in plan.prompt], device=device),
            lengths=torch.tensor([len(row.tokens) for row in rows], device=device),
            prompt=torch.tensor(plan.prompt, device=device),
            author=torch.tensor([int(row.last_author) for row in rows], device=device),
            finish=torch.tensor([int(row.finish) for row in rows], device=device),
            behaviour_logprobs=torch.cat([row.logprobs for row in rows]),
            token_author=torch.cat([row.authors for row in rows]),
            texts=self.tokenizer.batch_decode([row.tokens.tolist() for row in rows], skip_special_tokens=True),
            fields=[fields[prompt] for prompt in plan.prompt],
        )


def check_authors(plan: Plan, teacher: Teacher | None) -> None:
    """Make sure that there are rows, and somebody to write each of them.

    Raises:
        ValueError: If not.
    """
    writers = {Author.STUDENT, Author.GOLDEN} | ({Author.TEACHER} if teacher is not None else set())
    strangers = {author.name for author in {*plan.author, plan.prefix_author} - writers}
    if strangers:
        known = ", ".join(sorted(author.name for author in writers))
        raise ValueError(f"Expected a plan with rows by {known}, but got {', '.join(sorted(strangers))}.")
    if not plan.author:
        raise ValueError(
            "There is no row to learn from: the mixture plans none, and model.rollout.samples_per_prompt is 0. Set it "
            "to 1 or more, or choose a mixture with rows of its own, such as GoldenMixture."
        )


@dataclass(frozen=True)
class _Row:
    """A completion: tokens, log-probs and authors, (T,) each, and why it ended."""

    tokens: Tensor
    logprobs: Tensor
    authors: Tensor
    finish: Finish
    last_author: Author = field(default=Author.STUDENT)

    @classmethod
    def copied(cls, tokens: list[int], author: Author, finish: Finish, device: torch.device) -> "_Row":
        """Return tokens that nobody drew."""
        ids = torch.tensor(tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=device)
        return cls(ids, logprobs, torch.full_like(ids, int(author)), finish, author)

    @classmethod
    def split(cls, written: Completions, author: Author) -> list["_Row"]:
        """Return the rows of what was generated."""
        lengths, reasons = written.lengths.tolist(), written.finish.tolist()
        authors = torch.full_like(written.tokens, int(author))
        tokens, logprobs, authors_ = (each.split(lengths) for each in (written.tokens, written.logprobs, authors))
        rows = zip(tokens, logprobs, authors_, map(Finish, reasons), strict=True)
        return [cls(*row, author) for row in rows]

    def followed_by(self, rest: "_Row", budget: int) -> "_Row":
        """Return this row and what comes after it, up to the budget."""
        room = budget - len(self.tokens)
        return _Row(
            torch.cat([self.tokens, rest.tokens[:room]]),
            torch.cat([self.logprobs, rest.logprobs[:room]]),
            torch.cat([self.authors, rest.authors[:room]]),
            rest.finish if len(rest.tokens) <= room else Finish.LENGTH,
            rest.last_author,
        )
