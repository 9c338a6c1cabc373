"""Means, deviations, and a test that needs no assumption about the distribution of the figures."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

#: More seeds than this are tested with so many random patterns instead of all of them.
_EXACT, _DRAWS = 16, 65_536


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of the population that the values are a sample of; none for a single value."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((each - centre) ** 2 for each in values) / (len(values) - 1))


def sign_flip(differences: Sequence[Mapping[int, float]]) -> list[float]:
    """Return two-sided p-values of several comparisons on the same seeds, corrected for their number.

    Were there no difference between both sides, each pair could as well have come the other way round. So the signs of
    all comparisons are flipped together, seed by seed, and a p-value is the share of the sign patterns in which some
    comparison is as clear as this one was. How clear it is: |sum of d| / sqrt(n * sum of d^2), which is 1 where all n
    differences are equal. Comparisons that are clearer than this one do not count against it (step-down). With n seeds
    the smallest value that can come out is 2 / 2^n, however many comparisons there are. Above 16 seeds, a fixed sample
    of the patterns stands for all.

    Source: the step-down maxT method of Westfall and Young 1993, Resampling-Based Multiple Testing.

    Args:
        differences: Per comparison, the difference of each pair by its seed.
    """
    seeds = sorted({seed for each in differences for seed in each})
    if not seeds:
        return [1.0] * len(differences)
    table = np.array([[each.get(seed, 0.0) for seed in seeds] for each in differences])
    pairs = np.array([len(each) for each in differences])
    scale = np.sqrt(pairs * (table**2).sum(1))
    table /= np.where(scale > 0, scale, 1.0)[:, None]
    clear = np.abs(_signs(len(seeds)) @ table.T)  # a row per pattern; the first is what was seen
    found = np.ones(len(differences))
    least = 0.0
    rest = list(np.argsort(-clear[0], kind="stable"))
    while rest:
        first, largest = rest[0], clear[:, rest].max(1)
        # What is equal but for rounding counts as equal.
        least = max(least, float((largest >= clear[0, first] - 1e-9).mean()))
        found[first] = least
        rest.pop(0)
    return [float(each) for each in found]


def _signs(count: int) -> NDArray[np.float64]:
    """Return sign patterns, (patterns, count), the one without a flip first."""
    if count <= _EXACT:
        return np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    drawn = np.random.default_rng(0).choice((1.0, -1.0), (_DRAWS + 1, count))
    drawn[0] = 1.0
    return drawn


def smallest_p(pairs: int) -> float:
    """Return the smallest p-value that `sign_flip` can give on so many seeds."""
    return min(1.0, max(2.0 ** (1 - pairs), 1 / (_DRAWS + 1)))
