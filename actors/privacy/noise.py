"""Gaussian noise that nobody can guess, repeat or replace.

Entropy comes from the operating system through a cryptographic keystream; there is no seed, no
state, and no setting that puts another source in its place. Values are float64 with 53 random
bits per uniform. The largest possible value is 8.6; a true normal exceeds it with probability
1e-17, far below any delta.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tg_tinker.storage.envelope import keystream


def standard_normal(count: int) -> torch.Tensor:
    """float64 [count], independent, mean 0, variance 1 (Box and Muller 1958)."""
    uniforms = _uniforms(2 * ((count + 1) // 2))
    radius, angle = uniforms.chunk(2)
    radius = (-2 * torch.log1p(-radius)).sqrt_()  # of 1 - u, which is never 0
    angle = angle * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _uniforms(count: int) -> torch.Tensor:
    """float64 [count] on the multiples of 2^-53 in [0, 1)."""
    words = np.frombuffer(keystream(8 * count), dtype="<u8")
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)
