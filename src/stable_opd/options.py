"""Groups of plain settings of the module; every one is a key in YAML."""

from dataclasses import dataclass
from typing import Literal

from stable_opd.reduce import Aggregation


@dataclass(frozen=True)
class RolloutOptions:
    """How answers are written.

    Args:
        samples_per_prompt: Rollouts for each prompt of a training batch; 0 trains on the mixture's rows alone.
        max_new_tokens: Token budget of an answer, in training and in evaluation.
        eval_temperature: Temperature of the sampled answers of an evaluation, beside the greedy ones.
    """

    samples_per_prompt: int = 4
    max_new_tokens: int = 512
    eval_temperature: float = 0.6

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.samples_per_prompt < 0 or self.max_new_tokens < 1:
            raise ValueError(
                f"Expected samples_per_prompt of at least 0 and max_new_tokens of at least 1, but got "
                f"{self.samples_per_prompt} and {self.max_new_tokens}."
            )


@dataclass(frozen=True)
class UpdateOptions:
    """How the student learns from the answers.

    Args:
        aggregation: ``sequence_mean``: mean over the tokens of each row, then over rows (GRPO). ``token_mean``: mean
            over all tokens.
        micro_batch_tokens: Tokens, padding included, that go through the models at once; bounds the memory and does not
            change the result.
        gradient_clip: Largest norm of the gradient.
        offload: What rests in the host's memory while it is not in use: ``optimizer``, ``reference``. It makes room on
            a GPU for the phases that do without, and costs the time of moving it twice in every step.
        compare_gradients_every: Steps between two comparisons of the terms' gradients: norm of each, and cosine of each
            pair. It takes a backward pass for each term; 0 never compares. The loggers get those of the steps that are
            logged (`trainer.log_every_n_steps`).
        gradient_checkpointing: Keep no more than the inputs of the student's layers for the backward pass, and compute
            the rest there once more. It saves memory, costs one more forward pass, and does not change the result.
        max_skipped: Steps in a row that are skipped because their loss or gradient is not finite. At one more the run
            stops, with its state saved; 0 stops at the first.
    """

    aggregation: Aggregation = "sequence_mean"
    micro_batch_tokens: int = 16_384
    gradient_clip: float = 1.0
    offload: tuple[Literal["optimizer", "reference"], ...] = ()
    compare_gradients_every: int = 0
    gradient_checkpointing: bool = False
    max_skipped: int = 3

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        least = min(self.compare_gradients_every, self.max_skipped)
        if self.micro_batch_tokens < 1 or self.gradient_clip <= 0 or least < 0:
            raise ValueError(
                "Expected micro_batch_tokens of at least 1, gradient_clip above 0, and compare_gradients_every and "
                f"max_skipped of at least 0, but got {self.micro_batch_tokens}, {self.gradient_clip}, "
                f"{self.compare_gradients_every} and {self.max_skipped}."
            )


@dataclass(frozen=True)
class EvaluationOptions:
    """How the prompts of one evaluation set are answered.

    Attributes:
        name: Name of the set; a single one has none.
        samples: Sampled answers to each prompt, beside the greedy one.
        temperature: Their temperature; none takes that of `RolloutOptions`.
    """

    name: str = ""
    samples: int = 1
    temperature: float | None = None
