"""Tests whether a sequence of batches looks like the Poisson sample that its owner asserts.

The tests are one-sided. True Poisson batches fail with a probability of about one in a million per
run. Fixed-size batches and shuffled epochs fail after some steps. Passing proves nothing: the
certificate names the owner as the one who asserts the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_SCORE = 6.0
"""The largest deviation in standard deviations. A true sample exceeds it with probability 2e-9 per
test."""

_MIN_STEPS = 20


def looks_drawn(sizes: Sequence[int], distinct: int, size: int, rate: float) -> bool:
    """Returns False if these batches of distinct units cannot be a Poisson sample of `size` units.

    Args:
        sizes: The number of units in each batch so far, empty batches included.
        distinct: The number of different units in all batches together.
        size: The number N of units of the dataset.
        rate: q, the asserted probability that a unit is in a batch.
    """
    steps, mean, variance = len(sizes), size * rate, size * rate * (1 - rate)
    if any(abs(count - mean) > MAX_SCORE * math.sqrt(variance) + MAX_SCORE for count in sizes):
        return False
    if steps < _MIN_STEPS or variance == 0:
        return True
    return _sizes_vary(sizes, mean, variance) and _units_repeat(distinct, steps, size, rate)


def _sizes_vary(sizes: Sequence[int], mean: float, variance: float) -> bool:
    """Returns False for batches of one size: without variance, the scaled sum of squares is far
    below its mean."""
    # About chi-square with `len(sizes)` degrees of freedom.
    score = sum((count - mean) ** 2 for count in sizes) / variance
    # About normal (Wilson and Hilferty 1931).
    cubed = math.cbrt(score / len(sizes))
    spread = 2 / (9 * len(sizes))
    return abs(cubed - (1 - spread)) <= MAX_SCORE * math.sqrt(spread)


def _units_repeat(distinct: int, steps: int, size: int, rate: float) -> bool:
    """Returns False for epochs without repetition: they reach more different units than independent
    draws would."""
    reached = 1 - (1 - rate) ** steps
    spread = math.sqrt(size * reached * (1 - reached))
    return abs(distinct - size * reached) <= MAX_SCORE * spread + 1
