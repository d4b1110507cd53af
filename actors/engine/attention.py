"""Attention over a flat stream: every example, or running sequence, sees its own tokens only.

Legend: T tokens of a stream, S segments, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from actors.engine.slots import Layout

_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

NAME = "tg_tinker_segments"
"""Under this name `model` registers the functions below with transformers."""


def segmented(dense: Attention) -> Attention:
    """`dense` attention, applied to each segment of a flat stream on its own.

    The model passes `segment_bounds` (S + 1 offsets, from 0 to T) through as a keyword, or
    `layout` when it samples; without either (padded batches) the call goes to `dense` unchanged.
    """

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        segment_bounds: tuple[int, ...] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        _refuse_unseen_window(attention_mask, options.get("sliding_window"))
        if layout is not None:
            how = options.get("scaling"), options.get("sliding_window")
            return layout.attend(int(module.layer_idx), query, key, value, *how), None  # type: ignore[arg-type]
        if segment_bounds is None:
            return dense(module, query, key, value, attention_mask, **options)
        sizes = [stop - start for start, stop in pairwise(segment_bounds)]
        outputs = []
        for q, k, v in _rows(sizes, query, key, value):
            mask = _window_mask(q.shape[2], options.get("sliding_window"), q.device)
            outputs.append(dense(module, q, k, v, mask, **options)[0].flatten(0, 1))
        return torch.cat(outputs)[None], None

    return attention


def _rows(sizes: list[int], *streams: torch.Tensor) -> Iterable[Sequence[torch.Tensor]]:
    """Pieces of each stream [1, H, T, D]: all segments as one batch [S, H, t, D] if they are of
    one length, else one segment [1, H, t, D] after the other."""
    if len(set(sizes)) == 1:
        return [[torch.unflatten(x[0], 1, (len(sizes), -1)).transpose(0, 1) for x in streams]]
    return zip(*(torch.split(x, sizes, dim=2) for x in streams), strict=True)


def keeping_attention() -> Any:
    """What activation checkpointing keeps all the same: attention, whose cost grows with the square
    of a row and whose result does not."""
    return create_selective_checkpoint_contexts(_KERNELS)  # type: ignore[no-untyped-call]


def padding_only(dense_mask: Callable[..., torch.Tensor | None]) -> Callable[..., Any]:
    """For a flat stream, which has no padding mask: only a note of the window, if there is one, for
    `_refuse_unseen_window`. Else the dense mask."""

    def mask(*args: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        if attention_mask is None:
            window = options.get("local_size")
            return None if window is None else torch.tensor(window)
        return dense_mask(*args, attention_mask=attention_mask, **options)

    return mask


def _refuse_unseen_window(mask: torch.Tensor | None, window: int | None) -> None:
    """Some architectures put a window, or chunks, into the mask and tell attention nothing of it.

    Raises:
        NotImplementedError: which `model` finds when it probes, and takes another way.
    """
    if mask is not None and mask.ndim == 0 and window != int(mask):
        raise NotImplementedError("attention within a window that only the mask knows")


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[1, 1, t, t], true where a token sees another; None where plain causal attention does."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
