"""Sums gradients, computes the mean of an accumulation window, and hashes a sum.

An accumulation window is all `forward_backward` calls since the last step. The types enforce the
order of work. A `GradientSum` adds up over calls, and only `mean` divides. The optimizer accepts
only a `MeanGradient` or, in a private run, a `PrivateGradient`. Only `privatize`, outside this
package, makes a `PrivateGradient`: nothing here clips or adds noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tg_tinker.errors import InvalidRequestError

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, torch.Size]

FULL_HASH_BYTES = 64 * 2**20
_BLOCK = 4096
_SIGN_SEED = 20260


@dataclass(frozen=True, repr=False)
class MeanGradient:
    """The gradient of one optimizer step: the token-weighted mean, by parameter name."""

    tensors: Tensors
    noise_std: float = field(default=0.0, init=False)


@dataclass(frozen=True, repr=False)
class PrivateGradient:
    """The only gradient that a private run may pass to its optimizer: (sum + noise) / B.

    Attributes:
        tensors: float32, by parameter name.
        noise_std: the standard deviation of the noise on each value, sigma * C / B. It is 0 only on
            a dataset with unlimited epsilon.
    """

    tensors: Tensors
    noise_std: float


@dataclass(repr=False)
class GradientSum:
    """The sum of per-token gradients since the last step.

    Attributes:
        tensors: float32, by parameter name; empty before the first `add`.
        weight: the number of labeled tokens in the sum.
        count: the number of examples in the sum.
    """

    tensors: Tensors
    weight: int = 0
    count: int = 0

    @classmethod
    def zero(cls) -> GradientSum:
        return cls({})

    def add(self, other: GradientSum) -> None:
        """Adds another sum in place. Splitting a batch into several calls changes nothing."""
        if not self.tensors:
            self.tensors = other.tensors
        else:
            for name, tensor in self.tensors.items():
                tensor += other.tensors[name]
        self.weight += other.weight
        self.count += other.count

    def mean(self) -> MeanGradient:
        """Returns the mean over labeled tokens, and consumes the sum.

        This is the only division between a batch and a weight.

        Raises:
            InvalidRequestError: if the sum holds no labeled token.
        """
        if not self.weight:
            raise InvalidRequestError(
                "optim_step has no gradient to use: call forward_backward in train mode first"
            )
        tensors, self.tensors = self.tensors, {}
        for tensor in tensors.values():
            tensor /= self.weight
        return MeanGradient(tensors)


def take_gradients(parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """Returns float32 gradients by name, and removes them from the parameters.

    A parameter that took no part has a gradient of zeros.
    """
    taken = {}
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        taken[name], parameter.grad = gradient.float(), None
    return taken


def by_name(flat: torch.Tensor, shapes: Shapes) -> Tensors:
    """Returns views [..., *shape] by name of values [..., P], one tensor after another."""
    parts = torch.split(flat, [shape.numel() for shape in shapes.values()], dim=-1)
    return {
        name: part.view(*flat.shape[:-1], *shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def gradient_hash(tensors: Tensors) -> str:
    """Returns a fingerprint of a gradient sum. Equal sums give equal hashes.

    Up to 64 MiB of float32, the hash is `sha256:` over names and all bytes (little-endian, in name
    order). Above that, it is `sketch:` over random-sign sums of blocks of 4096 values. A change of
    any value changes its block's sum, unless the change is lost in float64 rounding or several
    changes cancel. So a sketch detects accidents, not forgeries.
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
    """Returns block sums, float64 [ceil(n / 4096)]. The same fixed signs weight every block."""
    generator = torch.Generator().manual_seed(_SIGN_SEED)
    signs = torch.randint(0, 2, (_BLOCK,), generator=generator, dtype=torch.float64) * 2 - 1
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK))
    return padded.view(-1, _BLOCK).double() @ signs
