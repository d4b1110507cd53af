"""Tests, when a private run is created, what its guarantee and its memory rest on in this model.

Forward passes must repeat. Recomputed activations must give the same gradient and keep less. The
fast path must give the gradients of ordinary autograd, or rows go one by one. Rows are short, and
their tokens are random; weights are moved meanwhile, since B starts at zero, where A has no
gradient.

Legend: U units, n trainable tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from actors.engine.batching import flatten
from actors.engine.gradients import Shapes, by_name
from actors.engine.probes import passes
from actors.engine.recompute import Recomputation
from actors.privacy.unit_gradients import UnitBackward
from tg_tinker.data.batch import Example
from tg_tinker.errors import InvalidRequestError

_TOLERANCE = {torch.float32: 1e-2}
"""The relative difference of two gradients that rounding explains; 5e-2 for shorter types.

A model may enlarge rounding: 1e-3 was measured on SmolLM2-135M with an adapter of rank 1. What is
to be found is as large as the gradient of a tensor: another unit's, twice the value, half the
uses."""


def probe(units: UnitBackward, recomputation: Recomputation) -> None:
    """Removes what is wrong on this model: the fast path, or recomputation unless it is asked for.

    Raises:
        InvalidRequestError: if forward passes do not repeat, or recomputation is asked for and
            wrong.
    """
    with _moved(units.parameters):
        _refuse_random_numbers(units)
        if recomputation.possible and not passes(lambda: _recomputes(units, recomputation)):
            if recomputation.always:
                raise InvalidRequestError(
                    "activations that are computed again do not give the gradient of this model, or"
                    " save no memory: set activation_checkpointing=False"
                )
            recomputation.possible = False
        if units.capture is not None and (found := _difference(units)):
            units.capture, units.slow_because = None, found


@contextmanager
def _moved(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Moves all parameters a little, by the same amounts in each run, and back."""
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter), alpha=0.02)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
                parameter.grad = None


def _rows(units: UnitBackward) -> list[Example]:
    """Returns rows that may share a stream."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = units.base.vocab_size
    sizes = (9, 5, 3) if units.base.flat and units.capture else (9,)
    rows = [torch.randint(vocab_size, (size,), generator=generator).numpy() for size in sizes]
    return [Example(row, row) for row in rows]


def _tolerance(units: UnitBackward) -> float:
    return _TOLERANCE.get(units.base.dtype, 5e-2)


@torch.no_grad()
def _refuse_random_numbers(units: UnitBackward) -> None:
    """Raises if the losses of the same rows depend on torch's generator."""
    stream, losses = flatten(_rows(units)), []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(units.losses(stream))
    first, second = losses
    # On a GPU, sums may take another order.
    rounding = 1e-5 if units.base.dtype == torch.float32 else 1e-2
    if not torch.allclose(first, second, rtol=rounding, atol=0.0, equal_nan=True):
        raise InvalidRequestError(
            "this model cannot be trained privately: it draws random numbers in eval mode too, and"
            " an additional row would change those of the rows behind it. Use another model"
        )


def _recomputes(units: UnitBackward, recomputation: Recomputation) -> bool:
    """Returns whether recomputation gives the gradient of a row, and keeps less for it."""
    stream, asked = flatten(_rows(units)[:1]), recomputation.always
    found, kept = [], []
    try:
        for recomputation.always in (False, True):
            with _keeping(units.base.model) as sizes:
                found.append(units.of_stream(stream, [0])[1])
            kept.append(sum(sizes))
    finally:
        recomputation.always = asked
    plain, again = found
    close = bool((plain - again).norm() <= _tolerance(units) * plain.norm())
    return close and kept[1] < kept[0]


@contextmanager
def _keeping(model: torch.nn.Module) -> Iterator[list[int]]:
    """Yields the sizes in bytes of what autograd keeps, apart from the parameters of the model."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def _difference(units: UnitBackward) -> str:
    """Returns why the fast path is wrong on this model, or nothing if it is right.

    Its gradients of several rows at once are compared with those that autograd computes for each
    row alone.
    """
    rows = _rows(units)
    capture = units.capture
    try:
        together = units.of_stream(flatten(rows), [*range(len(rows))])[1]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return str(error).partition("\n")[0]
    units.capture = None
    try:
        alone = torch.cat([units.of_stream(flatten([row]), [0])[1] for row in rows])
    finally:
        units.capture = capture
    shapes = {name: parameter.shape for name, parameter in units.parameters.items()}
    name, ratio = farthest(together, alone, shapes)
    if ratio <= _tolerance(units):
        return ""
    return f"the gradient of {name} differs by {ratio:.1e} from that of autograd"


def farthest(found: torch.Tensor, wanted: torch.Tensor, shapes: Shapes) -> tuple[str, float]:
    """Returns the tensor that is farthest from the wanted one, and its relative difference.

    Its difference counts relative to its own norm or, where that is smaller, to the norm of an
    average tensor of the unit (the root mean square). For clipping sees all tensors together, and
    a gradient that cancels, as at rank 1, has the rounding of larger ones.

    Args:
        found, wanted: [U, P], the gradients of units.
    """
    sizes, apart = (
        torch.stack([part.flatten(1).norm(dim=1) for part in by_name(flat, shapes).values()], 1)
        for flat in (wanted, found - wanted)
    )  # [U, n]
    average = sizes.square().mean(1, keepdim=True).sqrt()
    ratios = (apart / torch.maximum(sizes, average).clamp(min=1e-12)).amax(0)  # [n]
    worst = int(ratios.nan_to_num(nan=torch.inf).argmax())
    return [*shapes][worst], float(ratios[worst])
