"""Sums of gradients, the mean of a finished window, and the hash of a sum.

The types keep the order of work: `GradientSum` adds up over calls, only `mean` divides, and the
optimizer takes nothing but a `MeanGradient` or, in a private run, a `PrivateGradient`, which
`privatise` alone makes, above this package: nothing here clips or adds noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tg_tinker.errors import InvalidRequestError

Tensors = dict[str, torch.Tensor]

FULL_HASH_BYTES = 64 * 2**20
_BLOCK = 4096
_SIGN_SEED = 20260


@dataclass(frozen=True, repr=False)
class MeanGradient:
    """The gradient of one optimizer step: token-weighted mean, by parameter name."""

    tensors: Tensors


@dataclass(frozen=True, repr=False)
class PrivateGradient:
    """What a private run may show its optimizer: (sum + noise) / B.

    Attributes:
        tensors: float32 by parameter name.
        noise_std: of the noise on the sum, sigma * C; 0 on a data set without a limit only.
    """

    tensors: Tensors
    noise_std: float


@dataclass(repr=False)
class GradientSum:
    """Sum of per-token gradients since the last step.

    Attributes:
        tensors: float32, by parameter name; empty before the first `add`.
        weight: labelled tokens in the sum.
        count: examples in the sum.
    """

    tensors: Tensors
    weight: int = 0
    count: int = 0

    @classmethod
    def zero(cls) -> GradientSum:
        return cls({})

    def add(self, other: GradientSum) -> None:
        """Adds in place; how a batch was cut into calls changes nothing."""
        if not self.tensors:
            self.tensors = other.tensors
        else:
            for name, tensor in self.tensors.items():
                tensor += other.tensors[name]
        self.weight += other.weight
        self.count += other.count

    def mean(self) -> MeanGradient:
        """The only division between a batch and a weight. Consumes the sum."""
        if not self.weight:
            raise InvalidRequestError(
                "optim_step has no gradient: call forward_backward in train mode first"
            )
        tensors, self.tensors = self.tensors, {}
        for tensor in tensors.values():
            tensor /= self.weight
        return MeanGradient(tensors)


def take_gradients(parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """float32 gradients by name, zeros where a parameter took no part; it keeps none."""
    taken = {}
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        taken[name], parameter.grad = gradient.float(), None
    return taken


def gradient_hash(tensors: Tensors) -> str:
    """A fingerprint of a gradient sum; equal sums give equal hashes.

    Up to 64 MiB of float32 it is `sha256:` over names and all bytes (little-endian, in name
    order). Above, `sketch:` over random-sign sums of blocks of 4096 values: a change of any
    value changes its block's sum unless it is lost in float64 rounding or several changes
    cancel, so it finds accidents, not forgeries.
    """
    size = sum(4 * tensor.numel() for tensor in tensors.values())
    sketched = size > FULL_HASH_BYTES
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        values = _block_sums(values.flatten()) if sketched else values
        digest.update(name.encode() + b"\0")
        digest.update(values.numpy().astype(values.numpy().dtype.newbyteorder("<")).tobytes())
    return ("sketch:" if sketched else "sha256:") + digest.hexdigest()


def _block_sums(flat: torch.Tensor) -> torch.Tensor:
    """float64 [ceil(n / 4096)], each block weighted by the same fixed signs."""
    generator = torch.Generator().manual_seed(_SIGN_SEED)
    signs = torch.randint(0, 2, (_BLOCK,), generator=generator, dtype=torch.float64) * 2 - 1
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK))
    return padded.view(-1, _BLOCK).double() @ signs
