"""Sums along the rows of packed values."""

import torch
from torch import Tensor


def sums_before(values: Tensor, row: Tensor) -> Tensor:
    """Return the sum of the values that stand before each one in its row.

    In float64, so that what a row gets depends on the rows before it by less than float32 can tell.

    Args:
        values: Packed values, (n,).
        row: Row of each, in ascending order, (n,).

    Returns:
        Sums, (n,) float64; 0 for the first value of each row.
    """
    values = values.double()
    before = values.cumsum(0) - values
    starts = torch.searchsorted(row, row)  # where the row of each value begins
    return before - before[starts]
