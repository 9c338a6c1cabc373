"""Rollouts of earlier steps, learnt from once more."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.sampled import SampledReverseKL
from stable_opd.mixtures.base import WeightedMixture
from stable_opd.mixtures.student import student_rows
from stable_opd.randomness import global_seed, key, uniforms
from stable_opd.schedules import Schedule
from stable_opd.types import Author, Plan, Prompts, Rollout


class ReplayMixture(WeightedMixture):
    """Some rows of earlier steps beside the rollouts, with the log-probs at which they were drawn.

        weight * divergence on rows y ~ p_old, for an advantage-shaped one with the ratio p / p_old

    It gets more out of rollouts that were expensive to write; the older the rows, the less the student would write
    them. Rows are kept in the order in which they were written, the oldest leave first, and are saved in checkpoints;
    each process has its own.

    The ratio is that of the token: it corrects for who wrote it, and not for who wrote what stands before it.

    Source: the replay buffer of DistiLLM (Ko et al. 2024, arXiv 2402.03898), with a capacity of 1000.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        loss: How the rows are learnt; none takes `SampledReverseKL`.
        rate: Rows of earlier steps for each row of the student's in this step; rounded, but at least one row unless it
            is 0.
        capacity: Rows that are kept.
    """

    drawn: bool = True
    authors: tuple[Author, ...] = (Author.PAST,)

    def __init__(
        self,
        weight: float = 1.0,
        schedule: Schedule | None = None,
        loss: Divergence | None = None,
        rate: float = 0.25,
        capacity: int = 1000,
    ) -> None:
        super().__init__(weight, schedule, loss or SampledReverseKL())
        if rate < 0 or capacity < 1:
            raise ValueError(
                f"Expected a rate of at least 0 and a capacity of at least 1, but got {rate} and {capacity}. Without "
                "rows of earlier steps this is StudentOnly."
            )
        self.rate = rate
        self.rows: deque[dict[str, Any]] = deque(maxlen=capacity)

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows; those of earlier steps are added when they are written."""
        return student_rows(prompts, samples)

    def revise(self, rollout: Rollout, step: int) -> Rollout:
        """Add rows of earlier steps, and keep the new ones for later."""
        own = rollout.written_by(Author.STUDENT)
        wanted = max(1, round(self.rate * len(own))) if self.rate and len(own) else 0
        count = min(wanted, len(self.rows))
        places = _choose(len(self.rows), count, key(global_seed(), "replay", step, _rank()))
        past = [self.rows[place] for place in places]
        self.rows.extend(_taken(rollout.select(own)))
        return _with_past(rollout, past) if past else rollout

    def get_extra_state(self) -> Any:
        """Return the rows, for checkpoints."""
        return list(self.rows)

    def set_extra_state(self, state: Any) -> None:
        """Go on with the rows of a checkpoint."""
        self.rows = deque(state, maxlen=self.rows.maxlen)


def _rank() -> int:
    """Return the number of this process; each has rows of its own."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if initialized else 0


def _choose(rows: int, count: int, row_key: int) -> list[int]:
    """Return ``count`` different numbers below ``rows``."""
    if count == 0:
        return []
    return uniforms([row_key], rows)[0].argsort()[:count].tolist()


#: Fields of a row of their own, (1,) or (T,) each; kept on the host.
_FIELDS = ("tokens", "prompt_lengths", "lengths", "finish", "behaviour_logprobs", "token_author")


def _taken(rollout: Rollout) -> list[dict[str, Any]]:
    """Return each row by itself; what somebody else wrote of it stays his."""
    past = torch.full_like(rollout.token_author, int(Author.PAST))
    rollout = replace(rollout, token_author=past.where(rollout.token_author == Author.STUDENT, rollout.token_author))
    lengths, prompts = rollout.lengths.tolist(), rollout.prompt_lengths.tolist()
    totals = [a + b for a, b in zip(lengths, prompts, strict=True)]
    sizes = {"tokens": totals, "behaviour_logprobs": lengths, "token_author": lengths}
    parts = {name: getattr(rollout, name).cpu().split(sizes.get(name, 1)) for name in _FIELDS}
    # Clones, as a part would keep the whole batch in memory and in the checkpoints.
    return [
        {name: each[row].clone() for name, each in parts.items()} | {"text": text, "fields": _plain(fields)}
        for row, (text, fields) in enumerate(zip(rollout.texts, rollout.fields, strict=True))
    ]


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields in the types of JSON, because checkpoints are loaded without anything that has to be unpickled."""
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def _with_past(rollout: Rollout, past: list[dict[str, Any]]) -> Rollout:
    """Return the rollout with rows of earlier steps after its own."""

    def joined(name: str, extra: list[Tensor]) -> Tensor:
        present: Tensor = getattr(rollout, name)
        return torch.cat([present, *(each.to(present) for each in extra)])

    lengths = torch.cat([row["lengths"] for row in past])
    author = torch.full_like(lengths, int(Author.PAST))
    return Rollout(
        **{name: joined(name, [row[name] for row in past]) for name in _FIELDS},
        prompt=joined("prompt", [torch.full_like(lengths, -1)]),
        author=joined("author", [author]),
        texts=[*rollout.texts, *(row["text"] for row in past)],
        fields=[*rollout.fields, *(row["fields"] for row in past)],
    )
