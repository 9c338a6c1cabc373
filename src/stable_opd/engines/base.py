"""The contract of a rollout engine: who runs generation."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.registry import Component
from stable_opd.samplers.base import Sampler
from stable_opd.terminal import StopEvent


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate.

    Attributes:
        prompts: Token ids of each prompt, ragged.
        prompt: Which prompt each row answers, (B,); rows of one prompt may share its prefill.
        keys: Random key of each row, (B,): equal keys and equal models give equal rows.
        max_new_tokens: Token budget of each row.
        stop: Token ids that end a row; they belong to the completion.
        vocabulary: Size of the tokenizer; ids beyond it, with which models are padded, are never drawn.
        event: Terminal ids that are drawn as one token, with the log-prob of the event; None draws each by itself.
    """

    prompts: Sequence[Sequence[int]]
    prompt: Sequence[int]
    keys: Sequence[int]
    max_new_tokens: int
    stop: Sequence[int]
    vocabulary: int | None = None
    event: StopEvent | None = None

    def seen(self, logits: Tensor) -> Tensor:
        """Return the logits that the sampler sees, (B, V) -> (B, V)."""
        return logits if self.event is None else self.event.merged(logits)


@dataclass(frozen=True, slots=True)
class Blend:
    """A second model that has a say in every token.

    Attributes:
        model: It reads what the first writes.
        mix: Turns the logits of both, after the sampler, (B, V) each, into those of the distribution to draw from.
        event: Terminal ids that its logits have as one.
    """

    model: PreTrainedModel
    mix: Callable[[Tensor, Tensor], Tensor]
    event: StopEvent | None = None

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the logits to draw from, of those of the first model after the sampler and of this one's."""
        return self.mix(first, second if self.event is None else self.event.merged(second))


@dataclass(frozen=True, slots=True)
class Completions:
    """What was generated, packed row after row.

    Attributes:
        tokens: Completion tokens, (N,).
        logprobs: Log-prob of each under the sampler's distribution, (N,).
        lengths: Tokens of each row, (B,).
        finish: `Finish` of each row, (B,).
    """

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    finish: Tensor


def check_drawn(completions: Completions) -> None:
    """Make sure that every token was drawn from a distribution.

    Raises:
        ValueError: If some were not.
    """
    wrong = int((~completions.logprobs.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {len(completions.logprobs)} tokens have no finite log-prob: the model's logits are not "
            "finite, or the sampler ruled out every token. Look at train/grad_norm before this step, lower the "
            "learning rate, or try another sampler."
        )


class RolloutEngine(Component):
    """Who runs generation; it serves and does not learn, so it is no module and is in no checkpoint."""

    kind: ClassVar[str] = "engine"

    @property
    def figures(self) -> Mapping[str, float]:
        """What to log of the last rollout, under ``engine/``; nothing here."""
        return {}

    @abstractmethod
    def generate(
        self, model: PreTrainedModel, request: Request, sampler: Sampler, blend: Blend | None = None
    ) -> Completions:
        """Let ``model`` write one completion for each row of the request.

        Raises:
            ValueError: If there is a blend, and this engine runs one model only.
        """
