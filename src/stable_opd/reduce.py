"""From losses per position to one number: the share that each position has in the mean.

Which mean it is changes the pressure on length. `sequence_mean` (GRPO's 1/|o|) gives every row the same say, so the
tokens of a long row count less; `token_mean` gives every token the same say, so a long row counts more.
"""

from typing import Literal

from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean"]


def numerators(rows: Tensor, count: int, weights: Tensor, aggregation: Aggregation) -> tuple[Tensor, Tensor]:
    """Return what each token counts in the mean over a batch, and what that is to be divided by.

    The share of a token is the one over the sum of the other over all processes. It is known before any loss is, so a
    batch may be cut into micro-batches and tiles in any way: the sum of share times loss over all pieces is the mean
    over the whole.

    A denominator counts the tokens whose weight is not zero. So a token that is masked is as if it were not there,
    while one of less weight adds less, and none of the others adds more for it.

    Args:
        rows: Row of each token, (N,).
        count: Number of rows.
        weights: Weight of each token, at least 0, (N,).
        aggregation: ``token_mean``: over all tokens of the batch. ``sequence_mean``: over the tokens of each row, then
            over the rows; rows without tokens do not count.

    Returns:
        Numerators, (N,) float32, and this process's part of the denominator, a scalar; 0 if nothing counts.
    """
    kept, weights = (weights > 0).float(), weights.float()
    if aggregation == "token_mean":
        return weights, kept.sum()
    lengths = kept.new_zeros(count).index_add_(0, rows, kept)
    return weights / lengths.clamp(min=1)[rows], (lengths > 0).float().sum()
