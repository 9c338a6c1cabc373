"""The contract of a sampler: how the next token is drawn.

A complete plug-in:

    import torch
    from torch import Tensor

    from stable_opd import Sampler

    class NoQuestionMarks(Sampler):
        \"\"\"Never draw token 17.\"\"\"

        def forward(self, logits: Tensor, prefix: Tensor) -> Tensor:
            return logits.index_fill(-1, torch.tensor([17], device=logits.device), -float("inf"))
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stable_opd.registry import Component


class Sampler(Component, nn.Module):
    """How the next token is drawn: it turns the student's logits into those of the distribution to draw from."""

    kind: ClassVar[str] = "sampler"

    @property
    def follows_student(self) -> bool:
        """Whether it draws from the student's own distribution, as on-policy distillation assumes; not known: False."""
        return False

    @abstractmethod
    def forward(self, logits: Tensor, prefix: Tensor) -> Tensor:
        """Return the logits to draw from.

        Args:
            logits: The student's logits, (B, V) float32. Rows that have just ended may be among them; what is returned
                for those does not matter.
            prefix: The completion so far, (B, t).

        Returns:
            Logits, (B, V); -inf rules a token out.
        """

    def request(self) -> dict[str, Any]:
        """Return the same rule in the words of a generation server (the OpenAI and vLLM field names).

        Raises:
            ValueError: If a server cannot be told this rule.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be put into a request to a generation server. Use an in-process engine, or "
            "a sampler that overrides `request`."
        )


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    One uniform number decides a token, so equal numbers give equal tokens whatever else is in the batch.

    Args:
        logits: Logits, (B, V); a token with -inf is never drawn.
        uniform: Numbers in [0, 1), (B,).

    Returns:
        Tokens (B,) and their log-probs (B,), both under the given logits; nan where no token can be drawn.
    """
    cumulative = (probs := torch.softmax(logits.float(), -1)).cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even after rounding: then the first entry above it is one with a positive probability.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Where every token is ruled out nothing is right, but the index is one all the same; the log-prob tells.
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), probs.gather(1, tokens).squeeze(1).log()
