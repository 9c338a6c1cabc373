"""From losses per position to one number: the share that each position has in the mean.

Which mean it is changes the pressure on length. `sequence_mean` (GRPO's 1/|o|) gives every row the same say, so the
tokens of a long row count less; `token_mean` gives every token the same say, so a long row counts more.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean"]


def token_shares(
    rows: Tensor, count: int, weights: Tensor, aggregation: Aggregation, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the share of each token in the mean over a whole batch.

    The shares are known before any loss is, so a batch may be cut into micro-batches and tiles in any way: the sum of
    share times loss over all pieces is the mean over the whole.

    A denominator counts the tokens whose weight is not zero. So a token that is masked is as if it were not there,
    while one of less weight adds less, and none of the others adds more for it.

    Args:
        rows: Row of each token, (N,).
        count: Number of rows.
        weights: Weight of each token, at least 0, (N,).
        aggregation: ``token_mean``: over all tokens of the batch. ``sequence_mean``: over the tokens of each row, then
            over the rows; rows without tokens do not count.
        total: Adds up a count over all processes, so that the denominator is that of the global batch.

    Returns:
        Shares, (N,) float32; summed over all tokens of all processes they give 1 if the weights are 0 and 1, or 0 if
        all of them are 0.
    """
    kept = (weights > 0).float()
    if aggregation == "token_mean":
        return weights.float() / total(kept.sum()).clamp(min=1)
    lengths = kept.new_zeros(count).index_add_(0, rows, kept)
    return weights.float() / (lengths.clamp(min=1)[rows] * total((lengths > 0).float().sum()).clamp(min=1))
