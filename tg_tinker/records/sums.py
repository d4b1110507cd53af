"""Adds up 1 / sigma^2, the cost of one use of a unit, and never rounds a sum down.

    >>> added(weight(2.0), times(3, 1.0))
    3.25

A cost has 30 binary digits. Therefore the sum of up to 8 million uses at one sigma is exact, and
does not depend on the order of the uses.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

_DIGITS = 30


@lru_cache(maxsize=4096)
def weight(sigma: float) -> float:
    """Returns 1 / sigma^2, rounded up to 30 binary digits (less than 2e-9 of its value)."""
    exact = 1 / Fraction(sigma) ** 2
    _, exponent = math.frexp(float(exact))
    shift = Fraction(2) ** (_DIGITS - exponent)
    return math.ldexp(math.ceil(exact * shift), exponent - _DIGITS)


def times(count: int, sigma: float) -> float:
    """Returns the cost of `count` uses at one sigma, rounded up."""
    return _not_below(count * weight(sigma), count * Fraction(weight(sigma)))


def added(one: float, other: float) -> float:
    """Returns the sum of two costs, rounded up."""
    total = one + other
    if math.isinf(total):
        return total
    # The error of a sum of two floats is a float (Knuth, TAOCP vol. 2, section 4.2.2, theorem B).
    part = total - one
    error = (one - (total - part)) + (other - part)
    return math.nextafter(total, math.inf) if error > 0 else total


def _not_below(value: float, exact: Fraction) -> float:
    return value if Fraction(value) >= exact else math.nextafter(value, math.inf)
