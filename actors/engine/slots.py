"""Keys and values of running sequences, and attention over them.

A step of the sampling engine is one flat stream: one token of each sequence that is being
extended, then pieces of the prompts that are still being read. Linear layers see all tokens at
once; attention looks up each token's own sequence here. Which sequence has which slot, and for how
long, is up to that engine.

Legend: T tokens of the stream, R extended sequences, N slots, L positions of a slot, H heads,
K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

_SHORTEST = 128
"""Positions of a new slot; it is doubled when a sequence needs more."""


@dataclass(frozen=True)
class Piece:
    """`size` tokens of a prompt, of which `start` are in the slot already."""

    slot: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


class Slots:
    """Preallocated keys and values of `count` sequences, one tensor pair for each layer."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self._device = device
        self._length = _SHORTEST
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # each [N, K, L, D]

    @torch.inference_mode()
    def reserve(self, length: int) -> None:
        """Room for sequences of this length; what is stored stays."""
        wanted = self._length
        while wanted < length:
            wanted *= 2
        for index, pair in self._layers.items():
            missing = wanted - pair[0].shape[2]
            if missing > 0:
                longer = [pad(tensor, (0, 0, 0, missing)) for tensor in pair]
                self._layers[index] = (longer[0], longer[1])
        self._length = wanted  # not before there was memory for it: shorter ones go on as before

    def copy(self, source: int, target: int, length: int) -> None:
        """Another sequence with the same first `length` tokens."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]

    @torch.inference_mode()
    def clear(self, slot: int, length: int) -> None:
        """Zeros: a masked NaN that a diverged sequence left would still make its successor NaN,
        and nothing of one tenant's text stays."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[slot, :, :length] = 0

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer; `like` is [1, K, T, D]."""
        if index not in self._layers:
            shape = (self.count, like.shape[1], self._length, like.shape[3])
            zeros = like.new_zeros(shape), like.new_zeros(shape)
            self._layers[index] = zeros
        return self._layers[index]


class Layout:
    """Which sequence each token of a stream belongs to: a forward's way to `Slots`.

    Args:
        slots: where keys and values are.
        extended: (slot, position) of the first R tokens.
        pieces: of prompts; their tokens follow, in this order.
    """

    def __init__(
        self, slots: Slots, extended: Sequence[tuple[int, int]], pieces: Sequence[Piece]
    ) -> None:
        self._slots = slots
        self._pieces = pieces
        self._rows = len(extended)
        self._index = torch.tensor([slot for slot, _ in extended], device=slots._device).long()
        self._at = torch.tensor([at for _, at in extended], device=slots._device).long()
        self._top = max((slot + 1 for slot, _ in extended), default=0)
        self._longest = max((at + 1 for _, at in extended), default=0)
        self._dense = [slot for slot, _ in extended] == list(range(self._top))
        self._masks: dict[Any, torch.Tensor] = {}

    @property
    def positions(self) -> torch.Tensor:
        """int64 [T]: the place of each token in its sequence."""
        read = [torch.arange(p.start, p.stop, device=self._at.device) for p in self._pieces]
        return torch.cat([self._at, *read])

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, K, T, D]
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """[1, T, H, D]; stores the stream's keys and values on the way."""
        keys, values = self._slots.layer(layer, key)
        parts = []
        if self._rows:
            keys[self._index, :, self._at] = key[0, :, : self._rows].transpose(0, 1)
            values[self._index, :, self._at] = value[0, :, : self._rows].transpose(0, 1)
            new = query[0, :, : self._rows].transpose(0, 1)[:, :, None]  # [R, H, 1, D]
            parts.append(self._attend_rows(new, keys, values, scale, window))
        start = self._rows
        for piece in self._pieces:
            here = slice(start, start := start + piece.size)
            keys[piece.slot, :, piece.start : piece.stop] = key[0, :, here]
            values[piece.slot, :, piece.start : piece.stop] = value[0, :, here]
            seen = (
                keys[piece.slot, None, :, : piece.stop],
                values[piece.slot, None, :, : piece.stop],
            )
            mask = self._piece_mask(piece, window)
            found = _attention(query[:, :, here], *seen, mask, scale)
            parts.append(found[0].transpose(0, 1))  # [size, H, D]
        return torch.cat(parts)[None]

    def _attend_rows(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """[R, H, D]: all slots up to the last in one call, those between without a query."""
        if not self._dense:
            rows = query
            query = rows.new_zeros(self._top, *rows.shape[1:])
            query[self._index] = rows
        keys, values = (tensor[: self._top, :, : self._longest] for tensor in (keys, values))
        found = _attention(query, keys, values, self._row_mask(window), scale)[:, :, 0]
        return found if self._dense else found[self._index]

    def _row_mask(self, window: int | None) -> torch.Tensor:
        """[top, 1, 1, longest]; a slot without a query sees its first position, never nothing."""
        if window not in self._masks:
            last = torch.zeros(self._top, dtype=torch.int64, device=self._at.device)
            last[self._index] = self._at
            place = torch.arange(self._longest, device=self._at.device)
            mask = place <= last[:, None]
            if window is not None:
                mask &= place > last[:, None] - window
            self._masks[window] = mask[:, None, None]
        return self._masks[window]

    def _piece_mask(self, piece: Piece, window: int | None) -> torch.Tensor:
        """[size, stop], true where a token sees another."""
        if (piece, window) not in self._masks:
            seen = torch.arange(piece.stop, device=self._at.device)
            place = seen[piece.start :, None]
            mask = seen <= place
            if window is not None:
                mask &= seen > place - window
            self._masks[piece, window] = mask
        return self._masks[piece, window]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
