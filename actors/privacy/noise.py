"""Draws Gaussian noise that nobody can predict, repeat or replace.

The entropy comes from the operating system through a cryptographic keystream. There is no seed and
no stored state, and no setting selects another source. Values are float64, made from uniforms with
53 random bits. The largest possible value is 8.57; a true normal exceeds it with probability 1e-17.
This is per value: for P values and T steps at sigma, the bounded range adds up to about
5e-17 x sqrt(P) / sigma x T to delta (`tg_tinker.records.figures.noise_tail`), which matters for
deltas below about 1e-9. The certificate states this term.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tg_tinker.storage.envelope import keystream


def standard_normal(count: int) -> torch.Tensor:
    """Returns float64 [count]: independent values, mean 0, variance 1 (Box and Muller 1958)."""
    uniforms = _uniforms(2 * ((count + 1) // 2))
    radius, angle = uniforms.chunk(2)
    # The logarithm of 1 - u is finite, because u is below 1.
    radius = (-2 * torch.log1p(-radius)).sqrt_()
    angle = angle * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _uniforms(count: int) -> torch.Tensor:
    """Returns float64 [count], uniform on the multiples of 2^-53 in [0, 1)."""
    words = np.frombuffer(keystream(8 * count), dtype="<u8")
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)
