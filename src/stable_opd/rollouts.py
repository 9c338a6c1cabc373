"""Carrying out a plan: student and teacher write their rows, golden rows are copied, and all stand in one rollout."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.engines.base import Blend, Completions, Request, RolloutEngine
from stable_opd.engines.in_process import InProcessEngine
from stable_opd.randomness import key
from stable_opd.samplers import Sampler, Temperature
from stable_opd.teachers.base import Teacher
from stable_opd.types import Author, Finish, Plan, Prompts, Rollout


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
    """

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    max_new_tokens: int
    stop: Sequence[int]
    teacher: Teacher | None = None

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
            blend: A model that has a say in every token of the student's.

        Raises:
            ValueError: If the plan is empty, or names an author who does not write here.
        """
        check_authors(plan, self.teacher)
        rows: list[_Row | None] = [None] * len(plan.author)
        for row, (prompt, author) in enumerate(zip(plan.prompt, plan.author, strict=True)):
            if author == Author.GOLDEN:
                rows[row] = self._golden(prompts, prompt)
        theirs = [row for row, author in enumerate(plan.author) if author == Author.TEACHER]
        for row, text in zip(theirs, self._teach(plan, prompts, theirs, self.max_new_tokens, key_parts), strict=True):
            rows[row] = text
        own = [row for row, author in enumerate(plan.author) if author == Author.STUDENT]
        prefixes = self._prefixes(plan, prompts, own, key_parts)
        for row, text in zip(own, self._write(plan, prompts, own, prefixes, sampler, key_parts, blend), strict=True):
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
        keys = row_keys(plan, prompts, rows, *key_parts, "teacher")
        request = self._request(prompts.ids, [plan.prompt[row] for row in rows], keys, budget)
        with self.teacher.present():
            written = InProcessEngine().generate(self.teacher.language_model, request, Temperature(1.0))
        return _Row.split(written, Author.TEACHER)

    def _prefixes(
        self, plan: Plan, prompts: Prompts, rows: list[int], key_parts: tuple[int | str, ...]
    ) -> list["_Row"]:
        """Return what stands before the student's rows."""
        if plan.prefix == 0:
            return []
        if plan.prefix_author == Author.TEACHER:
            return self._teach(plan, prompts, rows, min(plan.prefix, self.max_new_tokens), key_parts)
        # The last token is the student's, so that there is something to learn.
        golden = [list(prompts.golden[plan.prompt[row]] or [])[:-1][: plan.prefix] for row in rows]
        return [_Row.copied(tokens, Author.GOLDEN, Finish.LENGTH, self.student.device) for tokens in golden]

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
        """Let the student write rows, or go on where a prefix ends."""
        keys = row_keys(plan, prompts, rows, *key_parts)
        if not rows:
            return []
        extra = {} if blend is None else {"blend": blend}  # an engine that runs one model need not know of it
        if not prefixes:
            request = self._request(prompts.ids, [plan.prompt[row] for row in rows], keys, self.max_new_tokens)
            return _Row.split(self.engine.generate(self.student, request, sampler, **extra), Author.STUDENT)
        begun = [each.finish != Finish.STOP and len(each.tokens) < self.max_new_tokens for each in prefixes]
        going = [place for place, goes in enumerate(begun) if goes]
        if not going:
            return prefixes
        heads = [[*prompts.ids[plan.prompt[rows[place]]], *prefixes[place].tokens.tolist()] for place in going]
        budget = self.max_new_tokens - min(len(prefixes[place].tokens) for place in going)
        request = self._request(heads, list(range(len(heads))), [keys[place] for place in going], budget)
        written = _Row.split(self.engine.generate(self.student, request, sampler, **extra), Author.STUDENT)
        whole = list(prefixes)
        for place, text in zip(going, written, strict=True):
            whole[place] = prefixes[place].followed_by(text, self.max_new_tokens)
        return whole

    def _request(self, prompts: Sequence[Sequence[int]], rows: list[int], keys: list[int], budget: int) -> Request:
        return Request(prompts, rows, keys, budget, self.stop, len(self.tokenizer))

    def _pack(self, plan: Plan, prompts: Prompts, rows: list["_Row"]) -> Rollout:
        device = self.student.device
        heads = {index: torch.tensor(prompts.ids[index], device=device) for index in set(plan.prompt)}
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
        return cls(ids, torch.zeros(len(ids), device=device), torch.full_like(ids, int(author)), finish, author)

    @classmethod
    def split(cls, written: Completions, author: Author) -> list["_Row"]:
        """Return the rows of what was generated."""
        lengths, reasons = written.lengths.tolist(), written.finish.tolist()
        parts = zip(written.tokens.split(lengths), written.logprobs.split(lengths), reasons, strict=True)
        return [
            cls(tokens, logprobs, torch.full_like(tokens, int(author)), Finish(reason), author)
            for tokens, logprobs, reason in parts
        ]

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
