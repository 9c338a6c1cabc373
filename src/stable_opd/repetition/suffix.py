"""Exact repetition at the end of an answer."""

import torch
from torch import Tensor

from stable_opd.repetition.base import RepetitionDetector, answer_lengths
from stable_opd.types import Repetition, Rollout


def repeated_suffix(tokens: Tensor, lengths: Tensor, max_period: int, min_copies: int, min_tokens: int) -> Tensor:
    """Return how many tokens at the end of each row repeat the block before them.

    A row ends in a loop if, for some period p of at most ``max_period``, its last tokens are at least ``min_copies``
    copies of one block of p tokens (the last copy may go on into a part of one more) and at least ``min_tokens`` long.

    Args:
        tokens: Rows aligned at their ends, (B, T); what stands before a row does not matter.
        lengths: Tokens of each row, (B,).
        max_period: Longest block looked for.
        min_copies: Copies that make a loop.
        min_tokens: Tokens that make a loop, the first copy included.

    Returns:
        Tokens from the second copy on, (B,); 0 for rows that do not end in a loop.
    """
    width = tokens.shape[1]
    column = torch.arange(width, device=tokens.device)
    repeated = torch.zeros_like(lengths)
    for period in range(1, min(max_period, width - 1) + 1):
        differs = (tokens[:, period:] != tokens[:, :-period]) | (column[period:] < (width - lengths + period)[:, None])
        last_difference = torch.where(differs, column[period:] + 1, period).amax(1)
        run = width - last_difference  # trailing tokens that equal the one a period before
        suffix = run + period
        loops = (suffix >= min_copies * period) & (suffix >= min_tokens)
        repeated = torch.where(loops, torch.maximum(repeated, run), repeated)
    return repeated


class PeriodicSuffix(RepetitionDetector):
    """The answer ends in exact copies of one block of tokens; the marks cover the second copy and all later ones.

    It says which tokens repeat, which the paper's zlib rule does not, and it needs no text and no calibration. A loop
    with a counter in it ("step 41, step 42") escapes it. A stop token at the end is not counted as part of the answer.

    Source: the condition that inference servers use to end runaway generations (vLLM's repetition detection; three
    copies and 48 tokens as in vllm-mlx).

    Args:
        max_period: Longest block looked for, in tokens.
        min_copies: Copies that make a loop.
        min_tokens: Tokens that make a loop, the first copy included.
    """

    def __init__(self, max_period: int = 128, min_copies: int = 3, min_tokens: int = 48) -> None:
        super().__init__()
        if max_period < 1 or min_copies < 2:
            raise ValueError(
                "Expected max_period of at least 1 and min_copies of at least 2, "
                f"but got {max_period} and {min_copies}."
            )
        self.max_period = max_period
        self.min_copies = min_copies
        self.min_tokens = min_tokens

    def forward(self, rollout: Rollout) -> Repetition:
        """Return the marks of the repeated tokens, and a flag for each row that has some."""
        lengths = answer_lengths(rollout)
        width = int(lengths.max()) if len(lengths) else 0
        aligned = rollout.tokens.new_full((len(rollout), max(width, 1)), -1)
        inside = rollout.position < lengths[rollout.row]
        columns = (rollout.position + (aligned.shape[1] - lengths)[rollout.row])[inside]
        aligned[rollout.row[inside], columns] = rollout.completion[inside]
        repeated = repeated_suffix(aligned, lengths, self.max_period, self.min_copies, self.min_tokens)
        in_loop = inside & (rollout.position >= (lengths - repeated)[rollout.row])
        return Repetition(in_loop, repeated > 0)
