"""Tests the range of the noise: a value is never cut off where a unit could show."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from actors.privacy import noise
from actors.privacy.noise import LEAST_SIGMA, RANGE, standard_normal


def test_the_smallest_words_make_values_beyond_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """With words of zeros, the radius is the largest and the angle is 0."""
    monkeypatch.setattr(noise, "keystream", bytes)
    assert float(standard_normal(2)[0]) > RANGE > 1 / LEAST_SIGMA + 17


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63, 2**64 - 1])
def test_the_logarithm_is_that_of_a_uniform_value_within_its_word(word: int) -> None:
    found = {float(noise._logs(np.array([word], dtype=np.uint64))[0]) for _ in range(20)}
    low = -1100 * math.log(2) if word == 0 else math.log(word) - 64 * math.log(2)
    high = math.log(word + 1) - 64 * math.log(2)
    assert all(low - 1e-12 <= one <= high + 1e-12 for one in found)
    assert len(found) == (20 if word < 2**32 - 1 else 1) or word == 2**32 - 1


def test_rare_words_do_not_shift_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.frombuffer(os.urandom(8 * 64), dtype="<u8").copy()
    words[7] = 5
    logs = noise._logs(words)
    wanted = np.log((words.astype(np.float64) + 0.5) / 2.0**64)
    assert np.abs(np.delete(logs - wanted, 7)).max() < 1e-12
    assert math.log(5) <= logs[7] + 64 * math.log(2) <= math.log(6)


def test_the_noise_is_standard_normal() -> None:
    values = standard_normal(1_000_001)
    assert len(values) == 1_000_001
    assert values.dtype == torch.float64
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / len(values))
        assert abs(float(values.pow(power).mean()) - moment) < 6 * spread
    for limit in (1.0, 2.0, 3.0):
        share = math.erfc(limit / math.sqrt(2))
        found = float((values.abs() > limit).double().mean())
        assert abs(found - share) < 6 * math.sqrt(share / len(values))
