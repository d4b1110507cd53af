"""Losses of single tokens and examples: each depends on its own tokens alone, never on others.

Legend: L labelled tokens, D width of a hidden state, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from actors.engine.matmul import multiply, weight_gradient

LOGIT_BYTES = 64 * 2**20
"""Logits held at a time, in float32: of all L tokens they would be most of a step's memory."""


def sums_by_example(losses: torch.Tensor, owners: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [B]: losses [L] added up by example; 0 for one without labelled tokens.

    Args:
        owners: int64 [L], the example of each labelled token.
        count: number of examples B.
    """
    return losses.new_zeros(count).index_add(0, owners, losses)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 [L]: negative log-likelihood in nats of each target, given logits [L, V]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def head_losses(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same from hidden states [L, D] and the output matrix [V, D]; logits exist in chunks.

    Where the head is frozen, forward computes the gradient of `hidden` at once: a token's loss
    needs its logits only once. Where it trains, backward computes them again.
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
            del log_likelihoods  # or it would be there while the next chunk makes its own two
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
        for_head = torch.zeros_like(head, dtype=torch.float32)  # many chunks add up in it
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
    """float32 [l, V], in place: the gradient of each token's loss with regard to its logits."""
    likelihoods = log_likelihoods.exp_()
    likelihoods[torch.arange(len(targets), device=targets.device), targets] -= 1
    return likelihoods
