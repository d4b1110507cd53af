"""Draws Gaussian noise that nobody can predict, repeat or replace.

The entropy comes from the operating system through a cryptographic keystream. There is no seed and
no stored state, and no setting selects another source. Values are float64 and reach 38. A shorter
range would add to delta: an outcome beyond it for one dataset, and within it for the neighbor,
tells them apart. Where one unit shifts a value by at most 20 (`LEAST_SIGMA`), this range adds less
than 1e-60, whatever the number of values.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker.storage.envelope import keystream

RANGE = 38.0
"""A value that the noise can exceed."""

LEAST_SIGMA = 0.05
"""The least noise multiplier for which the range is long enough."""

_TAIL_BYTES = 128
"""The random bytes that follow a small word: they take the radius to 38.8."""


def standard_normal(count: int) -> torch.Tensor:
    """Returns float64 [count]: independent values, mean 0, variance 1 (Box and Muller 1958)."""
    pairs = (count + 1) // 2
    words = np.frombuffer(keystream(16 * pairs), dtype="<u8")
    radius = torch.from_numpy(np.sqrt(-2 * _logs(words[:pairs])))
    angle = torch.from_numpy((words[pairs:] >> np.uint64(11)) * (2.0**-53 * 2 * math.pi))
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _logs(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Returns the logarithm of each word / 2^64, a uniform value between 0 and 1.

    Words below 2^32 make the largest values of the noise. More random bits follow them.
    """
    logs = np.log(words.astype(np.float64) + 0.5) - 64 * math.log(2)
    for rare in np.flatnonzero(words < 2**32):
        more = int.from_bytes(keystream(_TAIL_BYTES), "big") + 1
        whole = (int(words[rare]) << 8 * _TAIL_BYTES) + more
        logs[rare] = math.log(whole) - (64 + 8 * _TAIL_BYTES) * math.log(2)
    return np.minimum(logs, 0.0)
