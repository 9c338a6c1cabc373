"""From losses per position to one number: the share that each position has in the mean.

Which mean it is changes the pressure on length. `sequence_mean` (GRPO's 1/|o|) gives every row the same say, so the
tokens of a long row count less; `token_mean` gives every token the same say, so a long row counts more.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean"]


def token_shares(lengths: Tensor, aggregation: Aggregation, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return, for each row, the share of each of its tokens in the mean over a whole batch.

    The shares are known before any loss is, so a batch may be cut into micro-batches and tiles in any way: the sum of
    share times loss over all pieces is the mean over the whole.

    Args:
        lengths: Completion tokens of each row, (B,).
        aggregation: ``token_mean``: over all tokens of the batch. ``sequence_mean``: over the tokens of each row, then
            over the rows; rows without tokens do not count.
        total: Adds up a count over all processes, so that the denominator is that of the global batch.

    Returns:
        Shares, (B,) float32; summed over all tokens of all processes they give 1, or 0 if there are none.
    """
    if aggregation == "token_mean":
        return torch.ones_like(lengths) / total(lengths.sum().float()).clamp(min=1)
    rows = total((lengths > 0).sum().float()).clamp(min=1)
    return 1 / (lengths.clamp(min=1) * rows)
