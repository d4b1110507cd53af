"""Does a sequence of batches look like the Poisson sample that its owner asserts?

The tests are one-sided: true Poisson batches fail with a chance of about one in a million per
run, whereas fixed-size batches and shuffled epochs fail after some steps. Passing proves
nothing; the certificate names the owner as who vouches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_SCORE = 6.0
"""Standard deviations; a true sample exceeds them with probability 2e-9 per test."""

_MIN_STEPS = 20


def looks_drawn(sizes: Sequence[int], distinct: int, size: int, rate: float) -> bool:
    """False if these batches of distinct units are no Poisson sample of `size` units.

    Args:
        sizes: units in each batch so far, empty batches included.
        distinct: different units in all of them together.
        size: units of the data set N.
        rate: q, the asserted chance of a unit to be in a batch.
    """
    steps, mean, variance = len(sizes), size * rate, size * rate * (1 - rate)
    if any(abs(count - mean) > MAX_SCORE * math.sqrt(variance) + MAX_SCORE for count in sizes):
        return False
    if steps < _MIN_STEPS or variance == 0:
        return True
    return _sizes_vary(sizes, mean, variance) and _units_repeat(distinct, steps, size, rate)


def _sizes_vary(sizes: Sequence[int], mean: float, variance: float) -> bool:
    """Batches of one size have no variance: the scaled sum of squares is far below its mean."""
    score = sum((count - mean) ** 2 for count in sizes) / variance  # about chi-square, `n` degrees
    cubed = math.cbrt(score / len(sizes))  # Wilson and Hilferty 1931: about normal
    spread = 2 / (9 * len(sizes))
    return abs(cubed - (1 - spread)) <= MAX_SCORE * math.sqrt(spread)


def _units_repeat(distinct: int, steps: int, size: int, rate: float) -> bool:
    """Epochs without repetition reach more different units than independent draws would."""
    reached = 1 - (1 - rate) ** steps
    spread = math.sqrt(size * reached * (1 - reached))
    return abs(distinct - size * reached) <= MAX_SCORE * spread + 1
