"""Tests what a loaded model can do, by comparing its logits with those of transformers alone.

The reference is each row alone, with transformers' eager attention, which supports the extras of
every architecture. Rows are short, and their tokens are random. Models of other dtypes compute in
float32 meanwhile: a rounding can send a token to another expert, which looks like a mistake.

Legend: T tokens of a row, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actors.engine.batching import flatten
from actors.engine.caches import Caches, Way, rope_kinds, rotation_switches, sequences
from actors.engine.slots import Piece, Slots
from tg_tinker.data.batch import Example

_SIZES = (11, 8)
"""The tokens of the rows. Their sum is no size of a model, for `_Counting`."""

_FEATURES = 8
"""The features that are noted of a token."""

Inputs = dict[str, list[torch.Tensor]]
"""Some features of each token that a linear layer received, by layer, one tensor for each call."""


@dataclass(frozen=True, repr=False)
class Reference:
    """Rows, and what transformers computes for each of them alone.

    Attributes:
        logits: [T, V] of each row.
        inputs: what the linear layers receive for the last row.
    """

    rows: list[np.ndarray[Any, Any]]
    logits: list[torch.Tensor]
    inputs: Inputs


@contextmanager
def referenced(model: Any) -> Iterator[Reference]:
    """Returns the reference of a model; inside the context, the model computes as for it."""
    exact = True
    try:
        with _in_float32(model):
            expected = _reference(model)
    except Exception:  # the model mixes dtypes, or its copies need too much memory
        exact = False
        expected = _reference(model)
    with _in_float32(model) if exact else nullcontext():
        yield expected


def passes(check: Callable[[], bool]) -> bool:
    """Returns whether a check of a model passes. It does not if it fails in any way.

    Raises:
        MemoryError, torch.OutOfMemoryError: as the check does, because they say nothing of the
            model.
    """
    try:
        return check()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return False


@torch.no_grad()
def is_eager(model: Any, expected: Reference) -> bool:
    """Returns whether the model's own attention gives a row the logits of the eager attention."""
    return _equal(_alone(model, expected.rows[0]), expected.logits[0])


@torch.no_grad()
def rows_are_separate(model: Any, expected: Reference) -> bool:
    """Returns whether an example in a flat stream gets the logits that it gets alone."""
    if rope_kinds(model.config.get_text_config()) & {"longrope", "dynamic"}:
        return False  # the longest row of a stream would change the rotation of all rows
    with _Counting(sum(_SIZES)) as counting:
        found = _together(model, expected)
    return not counting.found and _equal(found, torch.cat(expected.logits))


@torch.no_grad()
def layers_see_rows(model: Any, expected: Reference) -> bool:
    """Returns whether each linear layer receives the tokens of a flat stream in their order.

    Otherwise adapters of several sequences cannot be told apart inside one stream.
    """
    with _watching(model) as inputs:
        _together(model, expected)
    start = sum(_SIZES[:-1])
    return inputs.keys() >= expected.inputs.keys() and all(
        len(calls) == len(expected.inputs[layer]) and all(
            len(call) == sum(_SIZES) and _equal(call[start:], alone)
            for call, alone in zip(calls, expected.inputs[layer], strict=True)
        )
        for layer, calls in inputs.items()
    )  # fmt: skip


def way_of_sampling(model: Any, flat: bool, expected: Reference) -> Way | None:
    """Returns the fastest right way to sample from a model; None if there is none."""
    ways: list[Way] = [*Way]
    if rotation_switches(model.config.get_text_config()):
        ways.remove(Way.CACHE)  # all of a prompt must be rotated in one way
    if not (flat and passes(lambda: layers_see_rows(model, expected))):
        ways.remove(Way.SLOTS)
    for way in ways:
        # Some models keep the state of a sequence in their own dtype.
        rounding = 1e-2 if way is Way.PROMPTS and model.dtype != torch.float32 else 0.0
        room = sequences(way, 4, model)
        if passes(partial(samples_rightly, model, room, expected, rounding)):
            return way
    return None


@torch.inference_mode()
def samples_rightly(
    model: Any, room: Slots | Caches, expected: Reference, rounding: float = 0.0
) -> bool:
    """Returns whether sequences that run together get the logits that they get alone.

    Two prompts are read, in pieces where that is possible, one of them is forked, and all are
    extended together. The tokens are those of the rows.

    Args:
        rounding: the tolerance, where it is larger than that of the dtype of logits.
    """
    long, short, fork = 2, 0, 3  # slots
    row = dict(zip((long, short, fork), (*expected.rows, expected.rows[0]), strict=True))
    logits = dict(zip((long, short, fork), (*expected.logits, expected.logits[0]), strict=True))

    def right(extended: Sequence[tuple[int, int]], pieces: Sequence[Piece]) -> bool:
        parts = [*(Piece(slot, at, 1) for slot, at in extended), *pieces]
        tokens = [int(row[part.slot][at]) for part in parts for at in range(part.start, part.stop)]
        layout = room.layout(extended, pieces, lambda place: nullcontext())
        found = layout.logits(model, tokens, range(len(tokens)))
        wanted = [logits[part.slot][part.start : part.stop] for part in parts]
        return _equal(found, torch.cat(wanted), rounding)

    reading = [[Piece(long, 0, 4), Piece(short, 0, 2)], [Piece(long, 4, 3), Piece(short, 2, 3)]]
    if room.whole_prompts:
        reading = [[Piece(long, 0, 7), Piece(short, 0, 5)]]
    if not all(right([], pieces) for pieces in reading):
        return False
    room.copy(long, fork, 7)
    steps = [[(short, 5), (long, 7)], [(short, 6), (long, 8), (fork, 7)], [(long, 9), (fork, 8)]]
    return all(right(extended, []) for extended in steps) and right([(short, 7), (fork, 9)], [])


@torch.no_grad()
def head_is_plain(model: Any, options: Any) -> bool:
    """Returns whether logits equal the decoder's hidden states times the output matrix, to the bit.

    They do not where an architecture scales, caps or shifts its logits.

    Args:
        options: the arguments for a row of the model.
    """
    head = model.get_output_embeddings()
    hidden = model.get_decoder()(**options).last_hidden_state
    found = torch.nn.functional.linear(hidden, head.weight)
    # A bias of zeros changes no logit, but it would train.
    return head.bias is None and bool(torch.equal(found, model(**options).logits))


# --- inside ----------------------------------------------------------------------------------


@torch.no_grad()
def _reference(model: Any) -> Reference:
    generator = np.random.default_rng(0)
    vocab_size = model.get_input_embeddings().num_embeddings
    rows = [generator.integers(0, vocab_size, size) for size in _SIZES]
    with _eager(model), _watching(model) as inputs:
        logits = []
        for row in rows:
            inputs.clear()
            logits.append(_alone(model, row))
    return Reference(rows, logits, inputs)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Makes a model use its eager attention, if it lets itself be told."""
    attention, logger = model.config._attn_implementation, logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of models that do not
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(attention)
        logger.setLevel(level)


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Gives each layer float32 copies of its parameters while it runs."""
    hooks = []
    for unit in _units(model):
        owned = [
            (module, name, parameter)
            for module in unit
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16)
        ]

        def copied(*_: Any, owned: Any = owned) -> None:
            for module, name, parameter in owned:
                module._parameters[name] = torch.nn.Parameter(parameter.float(), False)

        def restored(*_: Any, owned: Any = owned) -> None:
            for module, name, parameter in owned:
                module._parameters[name] = parameter

        if owned:
            hooks.append(unit[0].register_forward_pre_hook(copied))
            hooks.append(unit[0].register_forward_hook(restored, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _units(model: torch.nn.Module) -> Iterator[list[torch.nn.Module]]:
    """Returns each layer of a model with all modules in it, then every other module alone.

    The first module of a unit is the one whose call runs it.
    """
    if isinstance(model, torch.nn.ModuleList):
        yield from ([*layer.modules()] for layer in model)
        return
    yield [model]
    for child in model.children():
        yield from _units(child)


def _alone(model: Any, row: np.ndarray[Any, Any]) -> torch.Tensor:
    """Returns the logits [T, V] of one row."""
    ids = torch.from_numpy(row)[None].to(model.device)
    return model(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]


def _together(model: Any, expected: Reference) -> torch.Tensor:
    """Returns the logits [T, V] of a flat stream of all rows."""
    stream = flatten([Example(row, row) for row in expected.rows])
    return model(  # type: ignore[no-any-return]
        input_ids=stream.tokens.to(model.device), position_ids=stream.positions.to(model.device),
        segment_bounds=stream.bounds, use_cache=False,
    ).logits[0]  # fmt: skip


@contextmanager
def _watching(model: Any) -> Iterator[Inputs]:
    """Notes the inputs of linear layers."""
    inputs: Inputs = {}

    def note(layer: str, given: torch.Tensor) -> None:
        inputs.setdefault(layer, []).append(given.flatten(0, -2)[:, :_FEATURES].clone())

    hooks = [
        module.register_forward_pre_hook(lambda _, given, layer=name: note(layer, given[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _equal(found: torch.Tensor, wanted: torch.Tensor, rounding: float = 0.0) -> bool:
    tolerance = max(rounding, 1e-4 if wanted.dtype == torch.float32 else 3e-2)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices a model that counts the tokens of the stream itself: `arange` up to their number.

    Such a model makes positions of its own. They may matter only far beyond the length of a probe,
    as where attention is scaled by the position.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tokens = tokens
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func.overloadpacket is torch.ops.aten.arange and self._tokens in args
        return func(*args, **(kwargs or {}))
