"""Computes losses of single tokens and examples. A loss depends only on its own example's tokens.

Legend: L labeled tokens, D width of a hidden state, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from actors.engine.matmul import multiply, weight_gradient

LOGIT_BYTES = 64 * 2**20
"""Bytes of float32 logits held at a time. Those of all L tokens would take most of the memory."""


def sums_by_example(losses: torch.Tensor, owners: torch.Tensor, count: int) -> torch.Tensor:
    """Returns losses [L] summed by example: float32 [B].

    The sum of an example without labeled tokens is 0.

    Args:
        owners: int64 [L], the example of each labeled token.
        count: the number of examples B.
    """
    return losses.new_zeros(count).index_add(0, owners, losses)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns each target's negative log-likelihood in nats, float32 [L], given logits [L, V]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def head_losses(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the losses of `token_losses` from hidden states [L, D] and the output matrix [V, D].

    Logits exist in chunks. If the head is frozen, the forward pass also computes the gradient of
    `hidden`, so that each chunk of logits is computed once. If the head trains, the backward pass
    computes the logits again.
    """
    return _HeadLosses.apply(hidden, head, targets)  # type: ignore[no-any-return,no-untyped-call]


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        for_hidden, for_head, _ = ctx.needs_input_grad
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if for_hidden and not for_head else None
        for chunk in _chunks(hidden, head):
            log_likelihoods = _log_likelihoods(hidden[chunk], head)
            losses[chunk] = -log_likelihoods.gather(1, targets[chunk, None])[:, 0]
            if slopes is not None:
                errors = _errors(log_likelihoods, targets[chunk])
                slopes[chunk] = multiply(errors.to(head.dtype), head.T)
                del errors
            del log_likelihoods  # else it would occupy memory while the next chunk is computed
        ctx.save_for_backward(slopes, *((hidden, head, targets) if for_head else ()))
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes, *rest = ctx.saved_tensors
        scale = upstream[0][:, None]
        if not rest:
            return slopes * scale.to(slopes.dtype), None, None
        hidden, head, targets = rest
        slopes = torch.empty_like(hidden)
        for_head = torch.zeros_like(head, dtype=torch.float32)  # the sum over many chunks
        for chunk in _chunks(hidden, head):
            errors = _errors(_log_likelihoods(hidden[chunk], head), targets[chunk])
            errors = errors.mul_(scale[chunk]).to(head.dtype)
            slopes[chunk] = multiply(errors, head.T)
            for_head += weight_gradient(errors, hidden[chunk])
            del errors
        return slopes, for_head.to(head.dtype), None


def _chunks(hidden: torch.Tensor, head: torch.Tensor) -> list[slice]:
    size = max(1, LOGIT_BYTES // (4 * len(head)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _log_likelihoods(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return multiply(hidden, head).float().log_softmax(1)


def _errors(log_likelihoods: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of each token's loss with respect to its logits: float32 [l, V].

    Overwrites the log-likelihoods of these l tokens.
    """
    likelihoods = log_likelihoods.exp_()
    likelihoods[torch.arange(len(targets), device=targets.device), targets] -= 1
    return likelihoods
