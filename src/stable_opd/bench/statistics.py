"""Means, deviations, and a test that needs no assumption about the distribution of the figures."""

import itertools
import math
import random
from collections.abc import Sequence

#: More pairs than this are tested with so many random signs instead of all of them.
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


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of paired differences: how often random signs make their sum as large.

    Were there no difference between both sides, each pair could as well have come the other way round. With n pairs the
    smallest value that can come out is 2 / 2^n. Above 16 pairs, a fixed sample of the signs stands for all.

    Args:
        differences: One difference per pair.
    """
    if not differences:
        return 1.0
    seen = abs(math.fsum(differences))
    # What is equal but for rounding counts as equal.
    bound = seen - 1e-9 * math.fsum(map(abs, differences))
    if len(differences) <= _EXACT:
        sums = [
            abs(math.fsum(sign * each for sign, each in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))
        ]
        return sum(each >= bound for each in sums) / len(sums)
    rng = random.Random(0)
    as_large = sum(
        abs(math.fsum(each if rng.random() < 0.5 else -each for each in differences)) >= bound for _ in range(_DRAWS)
    )
    return (as_large + 1) / (_DRAWS + 1)


def smallest_p(pairs: int) -> float:
    """Return the smallest p-value that `sign_flip` can give."""
    return min(1.0, max(2.0 ** (1 - pairs), 1 / (_DRAWS + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that are corrected for their number, by Holm's method.

    Args:
        p_values: Those of single tests.
    """
    found = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        found[index] = largest
    return found
