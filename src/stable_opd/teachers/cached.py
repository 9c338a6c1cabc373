"""A teacher whose scores are kept on disk."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.scoring import HiddenStates, KnownLogprobs
from stable_opd.streaming import known_logprobs
from stable_opd.teachers.base import Teacher
from stable_opd.teachers.store import Entry, Store
from stable_opd.teachers.visits import Visits
from stable_opd.types import Rollout


class CachedTeacher(Teacher):
    """Keeps what a teacher said in a folder, and asks it only about rows that are not there.

    A row is found by its tokens, by what else the teacher reads of its example, and by the teacher's identity, so
    another teacher is never answered for. Golden and replayed rows, runs of the same seed, and runs from a checkpoint
    are read; as long as nothing is missing, the teacher is not even loaded. Fresh rollouts are always missing.

    It keeps the log-prob of each written token and the likeliest tokens with theirs: 4 + 8 k bytes a token, in one
    SQLite file for each process, which therefore never wait for each other.

    Args:
        teacher: Who is asked.
        folder: Where the scores are kept; runs and processes may share it.
        k: How many of the likeliest tokens are kept; with 0, components that read written tokens alone are served. The
            probabilities of several tokens that end an answer are looked for here.
    """

    k: int

    def __init__(self, teacher: Teacher, folder: str, k: int = 0) -> None:
        if k < 0 or (teacher.k is not None and k > teacher.k):
            most = "" if teacher.k is None else f" to {teacher.k}, which is what the teacher tells"
            raise ValueError(f"Expected a k from 0{most}, but got {k}. Change model.teacher.k.")
        self.teacher, self.folder, self.k = teacher, folder, k
        self.support = "topk" if k else "sampled"
        self.columns, self.offload = teacher.columns, teacher.offload
        self._store = Store(folder)
        self._visits = Visits()
        self._ready: tuple[str, PreTrainedTokenizerBase, torch.device] | None = None
        self._loaded = False
        self._whose = b""
        self._facts: dict[str, Any] = {}

    def meet(self, student: PreTrainedModel, tokens: Callable[[str], list[int]]) -> None:
        """Let the teacher get to know the student."""
        self.teacher.meet(student, tokens)

    def setup(self, student: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Look what is there, and get the teacher ready if it never scored for this vocabulary."""
        self._ready = student, tokenizer, device
        if not self._whose:
            vocabulary = sorted(tokenizer.get_vocab().items())
            self._whose = _digest(repr((self.teacher.identity, vocabulary, self.k)).encode())
            self._store.open()
            rank_zero_info(f"{self.folder}: {self._store}")
        known = self._store.fact(self._whose)
        if known is None or self._loaded:
            self._load()
            known = {"stop_ids": self.teacher.stop_ids, "context_length": self.teacher.context_length}
            self._store.note(self._whose, known)
        self._facts = known

    def check(self, examples: Sequence[Mapping[str, Any]], budget: int) -> None:
        """Let the teacher make sure, if it is ready; if not, look at the columns alone.

        Raises:
            ValueError: If these examples cannot be scored.
        """
        (self.teacher.check if self._loaded else super().check)(examples, budget)

    def apart(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        """Cut rows as the teacher wants them."""
        return self.teacher.apart(rollout, rows)

    def present(self) -> AbstractContextManager[None]:
        """Have the teacher in place, once it is asked."""
        return self._visits.open()

    @property
    def footprint(self) -> int:
        """Bytes of the teacher, if it was needed so far."""
        return self.teacher.footprint if self._loaded else 0

    @property
    def identity(self) -> str:
        """The teacher's."""
        return self.teacher.identity

    @property
    def stop_ids(self) -> tuple[int, ...] | None:
        """The teacher's."""
        ids = self._facts.get("stop_ids")
        return None if ids is None else tuple(ids)

    @property
    def context_length(self) -> int | None:
        """How many tokens the teacher can read."""
        length: int | None = self._facts.get("context_length")
        return length

    def score(self, rollout: Rollout) -> KnownLogprobs:
        """Return what is kept of some rows, after the teacher has read those of which nothing is."""
        keys = self._keys(rollout)
        rows = {key: row for row, key in enumerate(keys)}  # equal rows are one
        lengths = rollout.lengths.tolist()
        kept = {key: self._store.get(key, lengths[row], self.k) for key, row in rows.items()}
        missing = [key for key, entry in kept.items() if entry is None]
        if missing:
            asked = dict(zip(missing, self._ask(rollout, [rows[key] for key in missing]), strict=True))
            # What is no number is a fault, which may have passed by the next run.
            self._store.put({key: entry for key, entry in asked.items() if not entry[0].isnan().any()})
            kept |= asked
        entries = [entry for key in keys if (entry := kept[key]) is not None]
        sampled, tokens, logprobs = (torch.cat(each).to(rollout.tokens.device) for each in zip(*entries, strict=True))
        return KnownLogprobs(rollout.completion, sampled, tokens.long(), logprobs)

    def _ask(self, whole: Rollout, rows: list[int]) -> list[Entry]:
        """Let the teacher read some rows; return what is kept of each, on the host."""
        if not self._loaded:
            self._load()
        rollout = whole.select(torch.tensor(rows, device=whole.lengths.device))
        opinion = self._visits.score(self.teacher, rollout)
        if isinstance(opinion, HiddenStates):
            with torch.autocast(opinion.states.device.type, enabled=False):  # as in the loss
                opinion = known_logprobs(opinion, rollout.completion, self.k)
        parts = opinion.sampled, opinion.tokens[:, : self.k].int(), opinion.logprobs[:, : self.k]
        sampled, tokens, logprobs = (each.cpu().split(rollout.lengths.tolist()) for each in parts)
        return list(zip(sampled, tokens, logprobs, strict=True))

    def _load(self) -> None:
        if self._ready is None:
            raise RuntimeError("The teacher was asked for scores before its `setup` was called.")
        self.teacher.setup(*self._ready)
        self._loaded = True

    def _keys(self, rollout: Rollout) -> list[bytes]:
        """Return by what each row is found."""
        totals = (rollout.prompt_lengths + rollout.lengths).tolist()
        ids = [row.numpy().tobytes() for row in rollout.tokens.cpu().int().split(totals)]
        rest = zip(rollout.prompt_lengths.tolist(), rollout.fields, strict=True)
        texts = [json.dumps(each, sort_keys=True, default=str).encode() for each in rest]
        return [_digest(self._whose, *each) for each in zip(texts, ids, strict=True)]


def _digest(*parts: bytes) -> bytes:
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.digest()
