"""Stores keys and values of running sequences, and computes attention over them.

A step of the sampling engine is one flat stream: one token of each sequence that is being
extended, then pieces of the prompts that are still being read. Linear layers process all tokens at
once. Attention looks up each token's own sequence here. The engine decides which sequence has
which slot, and for how long.

Legend: T tokens of the stream, R extended sequences, N slots, L positions of a slot, H heads,
K key/value heads, D head size of queries and keys, E head size of values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from actors.engine.forward import logits_at

Alone = Callable[[int], AbstractContextManager[None]]
"""Returns a context for a forward pass over one sequence alone, whose tokens begin at this place of
the stream. The context selects the adapter of that sequence."""

Use = tuple[torch.nn.Module, int]
"""An attention layer, and how often the forward pass has called it before."""

_SHORTEST = 128
"""Positions of a new slot. The number is doubled until the longest sequence fits."""


@dataclass(frozen=True)
class Piece:
    """The next `size` tokens of a prompt whose first `start` tokens are already in the slot."""

    slot: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


class Slots:
    """Preallocated keys and values of `count` sequences, one tensor pair for each use of a layer.

    Attributes:
        whole_prompts: False, because a prompt may be read in pieces.
    """

    whole_prompts = False

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self._device = device
        self._length = _SHORTEST
        # [N, K, L, D] and [N, K, L, E]
        self._layers: dict[Use, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def reserve(self, length: int) -> None:
        """Makes room for sequences of this length and keeps the stored keys and values."""
        wanted = self._length
        while wanted < length:
            wanted *= 2
        for index, pair in self._layers.items():
            missing = wanted - pair[0].shape[2]
            if missing > 0:
                longer = [pad(tensor, (0, 0, 0, missing)) for tensor in pair]
                self._layers[index] = (longer[0], longer[1])
        # Set last: if memory runs out above, shorter sequences continue unchanged.
        self._length = wanted

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of slot `source` to slot `target`."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]

    @torch.inference_mode()
    def clear(self, slot: int, length: int) -> None:
        """Overwrites the first `length` positions of a slot with zeros.

        Otherwise a NaN that a diverged sequence left behind would make the next sequence NaN, even
        where it is masked. Also, nothing of one tenant's text stays in the slot.
        """
        for pair in self._layers.values():
            for tensor in pair:
                tensor[slot, :, :length] = 0

    def layer(
        self, use: Use, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the stored keys [N, K, L, D] and values [N, K, L, E] of one use of a layer.

        The first call allocates them; the new keys [1, K, T, D] and values [1, K, T, E] give sizes,
        dtype and device.
        """
        if use not in self._layers:
            self._layers[use] = self._zeros(key), self._zeros(value)
        return self._layers[use]

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self.count, like.shape[1], self._length, like.shape[3])

    def layout(
        self, extended: Sequence[tuple[int, int]], pieces: Sequence[Piece], alone: Alone
    ) -> Layout:
        """Returns the next stream. One pass computes all its sequences, so `alone` is not called.

        Args:
            extended: (slot, position) of each of the first tokens.
            pieces: the pieces of prompts whose tokens follow, in this order.
        """
        return Layout(self, extended, pieces)


class Layout:
    """The sequence and position of each token of a stream, which one forward pass uses.

    Args:
        slots: the keys and values of all sequences.
        extended: (slot, position) of each of the first R tokens.
        pieces: the pieces of prompts whose tokens follow, in this order.
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
        self._calls: Counter[torch.nn.Module] = Counter()

    def logits(self, model: Any, tokens: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
        """Runs the forward pass, and returns logits [len(wanted), V] at places of the stream."""
        ids, keep = (torch.tensor(x, device=self._at.device).long() for x in (tokens, wanted))
        return logits_at(
            model, keep, input_ids=ids[None], position_ids=self.positions[None], layout=self,
            use_cache=False,
        )[0]  # fmt: skip

    @property
    def positions(self) -> torch.Tensor:
        """The position of each token in its sequence: int64 [T]."""
        read = [torch.arange(p.start, p.stop, device=self._at.device) for p in self._pieces]
        return torch.cat([self._at, *read])

    def attend(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, K, T, D]
        value: torch.Tensor,  # [1, K, T, E]
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Stores the stream's keys and values, and returns the attention output [1, T, H, E]."""
        # Some models call a layer several times in a pass, each time with other keys or values.
        keys, values = self._slots.layer((layer, self._calls[layer]), key, value)
        self._calls[layer] += 1
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
            parts.append(found[0].transpose(0, 1))  # [size, H, E]
        return torch.cat(parts)[None]

    def _attend_rows(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Returns attention of the extended sequences [R, H, E].

        One call covers all slots up to the last one in use. Unused slots between get a zero query.
        """
        if not self._dense:
            rows = query
            query = rows.new_zeros(self._top, *rows.shape[1:])
            query[self._index] = rows
        keys, values = (tensor[: self._top, :, : self._longest] for tensor in (keys, values))
        found = _attention(query, keys, values, self._row_mask(window), scale)[:, :, 0]
        return found if self._dense else found[self._index]

    def _row_mask(self, window: int | None) -> torch.Tensor:
        """Returns a mask [top, 1, 1, longest], true where a token may attend.

        A slot without a query attends to its first position, because an empty row would give NaN.
        """
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
        """Returns a mask [size, stop], true where a token may attend to another."""
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
