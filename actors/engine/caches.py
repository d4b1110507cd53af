"""Runs each sequence in forward passes of its own, for models whose sequences share no stream.

A step has the same form as in `slots`: a token of each sequence that is being extended, and parts
of prompts. Here the model runs once for each of them, with the cache that transformers makes for
it, or over the whole sequence again. That is slower, and right for models that compute positions,
masks or states by themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch

from actors.engine.attention import NAME
from actors.engine.forward import accepts, logits_at
from actors.engine.slots import Alone, Piece, Slots


class Way(StrEnum):
    """How the running sequences of a model are computed, fastest first.

    - SLOTS: all sequences in one stream, as in `slots`.
    - CACHE: each sequence alone, with transformers' cache.
    - PROMPTS: the same, but each prompt in one pass: the cache takes single tokens afterwards.
    - WHOLE: each sequence alone, and all of it again for each token.
    """

    SLOTS = "slots"
    CACHE = "cache"
    PROMPTS = "cache-prompts"
    WHOLE = "whole"


def sequences(way: Way, count: int, model: Any) -> Slots | Caches:
    """Returns room for `count` running sequences of a model."""
    if way is Way.SLOTS:
        return Slots(count, model.device)
    return Caches(
        count,
        cached=way is not Way.WHOLE,
        whole_prompts=way is not Way.CACHE,
        switches=rotation_switches(model.config.get_text_config()),
    )


_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What transformers' models call their cache, as argument and as output. The first name is the
newest; each model has one of them."""


class Caches:
    """The tokens of `count` sequences, and what transformers has computed for them.

    Args:
        cached: whether the model keeps a cache. If not, each pass computes the whole sequence.
        whole_prompts: whether a prompt must be read in one pass.
        switches: lengths at which the model computes the tokens before differently, as
            `rotation_switches` returns them.
    """

    def __init__(
        self, count: int, *, cached: bool, whole_prompts: bool, switches: frozenset[int]
    ) -> None:
        self.count = count
        self.whole_prompts = whole_prompts
        self._cached = cached
        self._switches = switches
        self._tokens: dict[int, list[int]] = {}
        self._caches: dict[int, Any] = {}

    def reserve(self, length: int) -> None:
        """Does nothing: memory grows with the sequences."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the sequence of slot `source`, with its first `length` tokens, to `target`."""
        self._tokens[target] = self._tokens[source][:length]
        self._caches[target] = copy.deepcopy(self._caches.get(source))

    @torch.inference_mode()
    def clear(self, slot: int, length: int) -> None:
        """Overwrites the cache of a slot with zeros and drops it, with all tokens of the slot."""
        self._tokens.pop(slot, None)
        self._drop_cache(slot)

    def _drop_cache(self, slot: int) -> None:
        for tensor in _tensors(self._caches.pop(slot, None)):
            tensor.zero_()

    def layout(
        self, extended: Sequence[tuple[int, int]], pieces: Sequence[Piece], alone: Alone
    ) -> Passes:
        """Returns the passes of the next step.

        Args:
            extended: (slot, position) of each of the first tokens.
            pieces: the pieces of prompts whose tokens follow, in this order.
        """
        parts = [Piece(slot, position, 1) for slot, position in extended]
        return Passes(self, [*parts, *pieces], alone)

    def logits(
        self, model: Any, slot: int, tokens: Sequence[int], wanted: Sequence[int]
    ) -> torch.Tensor:
        """Returns logits [len(wanted), V] at places of the next tokens of a slot."""
        known = self._tokens.setdefault(slot, [])
        before = len(known)
        known += tokens
        if any(before <= length < len(known) for length in self._switches):
            self._drop_cache(slot)
        cache = self._caches.get(slot)
        start = 0 if cache is None else before
        ids = torch.tensor(known, device=model.device)[None]
        keep = torch.tensor([before - start + place for place in wanted], device=model.device)
        options: dict[str, Any] = {"input_ids": ids[:, start:], "use_cache": self._cached}
        if self._cached and accepts(model, "position_ids"):
            options["position_ids"] = torch.arange(start, len(known), device=model.device)[None]
        if model.config._attn_implementation == NAME:
            options["attention_mask"] = torch.ones_like(ids)  # without it, there is no mask at all
        name = self._name(model)
        if cache is not None:
            options[name] = cache
        found, outputs = logits_at(model, keep.long(), **options)
        if self._cached:
            self._caches[slot] = getattr(outputs, name)
        return found

    def _name(self, model: Any) -> str:
        """Returns the model's name of a cache; empty if no pass needs it.

        Raises:
            NotImplementedError: if the model has no cache. A probe catches this error.
        """
        if not self._cached:
            return ""
        for name in _CACHES:
            if accepts(model, name):
                return name
        raise NotImplementedError("the model has no cache")


class Passes:
    """The parts of a step, each with a forward pass of its own."""

    def __init__(self, caches: Caches, parts: Sequence[Piece], alone: Alone) -> None:
        self._caches = caches
        self._parts = parts
        self._alone = alone

    def logits(self, model: Any, tokens: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
        """Runs the passes, and returns logits [len(wanted), V] at places of all tokens together.

        Args:
            wanted: places in ascending order.
        """
        found, start = [], 0
        for part in self._parts:
            stop = start + part.size
            here = [place - start for place in wanted if start <= place < stop]
            with self._alone(start):
                found.append(self._caches.logits(model, part.slot, tokens[start:stop], here))
            start = stop
        return torch.cat(found)


def rotation_switches(config: Any) -> frozenset[int]:
    """Returns the lengths above which a model rotates all its positions differently.

    A cache that was filled below such a length is of no use above it.
    """
    found = set()
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        length = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and length is not None:
            found.add(int(length))
    return frozenset(found)


def rope_kinds(config: Any) -> set[str]:
    """Returns the kinds of rotary positions of a model."""
    ropes = _ropes(getattr(config, "rope_parameters", None))
    return {str(rope.get("rope_type", "default")) for rope in ropes}


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Returns the settings of rotary positions, of the model or of each kind of its layers."""
    if isinstance(parameters, dict):
        yield parameters
        for value in parameters.values():
            yield from _ropes(value)


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """Returns the tensors in a cache: an object of transformers with attributes, lists, dicts."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
    elif type(held).__module__.startswith("transformers.") and not hasattr(held, "model_type"):
        yield from _tensors(vars(held))
