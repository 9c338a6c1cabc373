"""What is done with rows that repeat themselves and with rows that were cut: before any loss is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from stable_opd.types import Author, Finish, Prompts, Repetition, Rollout

LoopPolicy = Literal["keep", "mask", "down_weight", "golden"]
TruncationPolicy = Literal["keep", "mask", "down_weight", "last_window", "drop"]


@dataclass(frozen=True)
class Policies:
    """What is done with rows that repeat themselves, and with rows that ended without a stop token.

    Masks and smaller weights apply to the divergence; the constraints speak about all tokens. Whatever is masked is in
    no denominator, and a smaller weight leaves the denominator as it is. Where both policies lower the weight of a
    token, the two are multiplied. Rows of earlier steps that were cut can be dropped; the other policies leave them
    alone. What is logged about the rollouts is that of the rows as they were written.

    Args:
        loops: ``keep`` them; ``mask`` the repeated tokens; ``down_weight`` them; or let the ``golden`` solution of the
            prompt take the place of a repetitive row.
        truncated: ``keep`` them; ``mask`` the whole row; ``down_weight`` it; keep its ``last_window``; or ``drop`` it,
            so that no model reads it and no term speaks about it.
        factor: Weight of what is down-weighted.
        window: Tokens of the last window.
    """

    loops: LoopPolicy = "keep"
    truncated: TruncationPolicy = "keep"
    factor: float = 0.1
    window: int = 256

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for policy, known in ((self.loops, LoopPolicy), (self.truncated, TruncationPolicy)):
            if policy not in get_args(known):
                raise ValueError(f"Expected a policy out of {', '.join(get_args(known))}, but got {policy!r}.")
        if not 0 < self.factor < 1 or self.window < 1:
            raise ValueError(
                "Expected a factor between 0 and 1 and a window of at least 1, but got "
                f"{self.factor} and {self.window}. To leave tokens out, choose the policy mask."
            )

    @property
    def needs_golden(self) -> bool:
        """Whether golden solutions take the place of other rows."""
        return self.loops == "golden"

    def dropped(self, rollout: Rollout) -> Tensor:
        """Return the rows that nobody is to read, (B,) bool."""
        if self.truncated != "drop":
            return torch.zeros_like(rollout.truncated)
        own = (rollout.author == Author.STUDENT) | (rollout.author == Author.PAST)
        return rollout.truncated & own

    def weights(self, rollout: Rollout, repetition: Repetition) -> Tensor | None:
        """Return the weight of each completion token, (N,); None if all are 1."""
        if self.loops in ("keep", "golden") and self.truncated in ("keep", "drop"):
            return None
        weights = torch.ones(len(rollout.row), dtype=torch.float32, device=rollout.row.device)
        if self.loops in ("mask", "down_weight"):
            weights[repetition.in_loop] = self.factor if self.loops == "down_weight" else 0.0
        cut = rollout.truncated[rollout.row]
        if self.truncated == "last_window":
            weights[cut & (rollout.position < (rollout.lengths - self.window)[rollout.row])] = 0.0
        elif self.truncated in ("mask", "down_weight"):
            weights[cut] *= self.factor if self.truncated == "down_weight" else 0.0
        return weights

    def replace(
        self, rollout: Rollout, repetition: Repetition, prompts: Prompts, stop: Sequence[int]
    ) -> tuple[Rollout, Repetition]:
        """Let golden solutions take the place of repetitive rows of the student's, if that is the policy.

        Args:
            rollout: What was written.
            repetition: What the detector said of it.
            prompts: The batch, with golden solutions.
            stop: Token ids that end an answer.

        Returns:
            Rollout and marks to learn from; what takes a place is not repetitive, and its text is left empty.
        """
        if self.loops != "golden":
            return rollout, repetition
        looping = repetition.repetitive & (rollout.author == Author.STUDENT) & (rollout.prompt >= 0)
        solutions = {row: prompts.golden[int(rollout.prompt[row])] for row in looping.nonzero().squeeze(1).tolist()}
        golden = {row: list(tokens) for row, tokens in solutions.items() if tokens}
        return _replaced(rollout, repetition, golden, stop) if golden else (rollout, repetition)


def _replaced(
    rollout: Rollout, repetition: Repetition, golden: dict[int, list[int]], stop: Sequence[int]
) -> tuple[Rollout, Repetition]:
    """Return the rollout with other completions in some rows."""
    device, lengths = rollout.lengths.device, rollout.lengths.tolist()

    def exchange(packed: Tensor, fill: int | float | None) -> Tensor:
        parts = list(packed.split(lengths))
        for row, tokens in golden.items():
            parts[row] = torch.tensor(tokens if fill is None else [fill] * len(tokens), device=device).to(packed.dtype)
        return torch.cat(parts)

    completion = exchange(rollout.completion, None)
    author, finish, texts = rollout.author.clone(), rollout.finish.clone(), list(rollout.texts)
    new_lengths, repetitive = rollout.lengths.clone(), repetition.repetitive.clone()
    for row, tokens in golden.items():
        author[row], repetitive[row], new_lengths[row] = int(Author.GOLDEN), False, len(tokens)
        finish[row], texts[row] = int(Finish.STOP if tokens[-1] in stop else Finish.LENGTH), ""
    both = zip(rollout.prompt_lengths.tolist(), lengths, strict=True)
    prompts = rollout.tokens.split([count for pair in both for count in pair])[::2]
    rows = completion.split(new_lengths.tolist())
    return (
        replace(
            rollout,
            tokens=torch.cat([part for pair in zip(prompts, rows, strict=True) for part in pair]),
            lengths=new_lengths,
            author=author,
            finish=finish,
            behaviour_logprobs=exchange(rollout.behaviour_logprobs, 0.0),
            token_author=exchange(rollout.token_author, int(Author.GOLDEN)),
            texts=texts,
        ),
        Repetition(exchange(repetition.in_loop, False), repetitive),
    )
