"""Computes attention over a flat stream: an example or running sequence sees its own tokens only.

Legend: T tokens of a stream, S segments, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
"""The name under which `model` registers the functions below with transformers."""

_APPLIED = {"dropout", "is_causal", "scaling", "sliding_window"}
"""The options of attention that the functions below apply, or leave to the dense attention."""

_NO_EFFECT = {
    "cache_position", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""The options of a model that its attention receives too, and that change no result of it."""


def segmented(dense: Attention) -> Attention:
    """Returns a function that applies `dense` attention to each segment of a flat stream alone.

    The model passes `segment_bounds` (S + 1 offsets, from 0 to T) through as a keyword, or
    `layout` when it samples. Without either (padded batches), the call goes to `dense` unchanged.
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
        if segment_bounds is None and layout is None:
            return dense(module, query, key, value, attention_mask, **options)
        _refuse_other_masks(attention_mask, options.get("sliding_window"))
        _refuse_unknown(options)
        if segment_bounds is None:
            how = options.get("scaling"), options.get("sliding_window")
            return layout.attend(module, query, key, value, *how), None  # type: ignore[union-attr]
        sizes = [stop - start for start, stop in pairwise(segment_bounds)]
        outputs = []
        for q, k, v in _rows(sizes, query, key, value):
            mask = _window_mask(q.shape[2], options.get("sliding_window"), q.device)
            outputs.append(dense(module, q, k, v, mask, **options)[0].flatten(0, 1))
        return torch.cat(outputs)[None], None

    return attention


def _rows(sizes: list[int], *streams: torch.Tensor) -> Iterable[Sequence[torch.Tensor]]:
    """Returns the segments of each stream [1, H, T, D].

    Segments of one length form one batch [S, H, t, D]. Otherwise the result has one segment
    [1, H, t, D] after the other.
    """
    if len(set(sizes)) == 1:
        return [[torch.unflatten(x[0], 1, (len(sizes), -1)).transpose(0, 1) for x in streams]]
    return zip(*(torch.split(x, sizes, dim=2) for x in streams), strict=True)


def keeping_attention() -> Any:
    """Returns contexts in which activation checkpointing keeps the results of attention.

    The cost of attention grows with the square of a row's length; the size of its result does not.
    """
    return create_selective_checkpoint_contexts(_KERNELS)  # type: ignore[no-untyped-call]


def padding_only(dense_mask: Callable[..., torch.Tensor | None]) -> Callable[..., Any]:
    """Returns a mask function that builds the dense mask only where there is a padding mask.

    A flat stream has no padding mask. For it, the function returns the size of the window as a
    tensor without dimensions, for `_refuse_other_masks`, or None if there is no window.
    """

    def mask(*args: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        if attention_mask is None:
            window = options.get("local_size")
            return None if window is None else torch.tensor(window)
        return dense_mask(*args, attention_mask=attention_mask, **options)

    return mask


def _refuse_other_masks(mask: torch.Tensor | None, window: int | None) -> None:
    """Raises if a mask holds more than `padding_only` gave: a bias, or a window that only it knows.

    Raises:
        NotImplementedError: for the probes. They catch it, and then every example gets a stream of
            its own.
    """
    if mask is not None and (mask.ndim > 0 or window != int(mask)):
        raise NotImplementedError("attention has a mask that has no rule here")


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raises if attention has an option that would be dropped: a sink, a cap, a bias, a mask.

    Raises:
        NotImplementedError: for the probes, as in `_refuse_other_masks`.
    """
    given = {name for name, value in options.items() if value is not None}
    if unknown := sorted(given - _APPLIED - _NO_EFFECT):
        raise NotImplementedError(f"attention receives {unknown[0]}, which has no rule here")
    if options.get("is_causal") is False:
        raise NotImplementedError("attention is not causal")


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Returns a mask [1, 1, t, t], true where a token may attend to another.

    Returns None where plain causal attention gives the same result.
    """
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
