"""Losses of single examples: each depends on its own tokens alone, never on its neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def cross_entropy_sums(
    logits: torch.Tensor, targets: torch.Tensor, owners: torch.Tensor, count: int
) -> torch.Tensor:
    """Summed negative log-likelihood of each example, in nats.

    Args:
        logits: [L, V], one row per labelled token.
        targets: int64 [L].
        owners: int64 [L], the example of each labelled token.
        count: number of examples B.

    Returns:
        float32 [B]; 0 for an example without labelled tokens.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses.new_zeros(count).index_add(0, owners, losses)
