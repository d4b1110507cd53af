"""Examples to flat streams: one row of tokens per micro-batch, no padding.

Legend: T tokens of a stream, S examples in it, L labelled tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tg_tinker.data.batch import IGNORED, Example


@dataclass(frozen=True, repr=False)
class FlatStream:
    """Examples back to back.

    Attributes:
        tokens: int64 [1, T].
        positions: int64 [1, T], from 0 in each example.
        bounds: S + 1 offsets of the examples in the stream.
        predictors: int64 [L], positions in the stream whose next token carries a loss.
        targets: int64 [L], those next tokens.
        owners: int64 [L], which of the S examples each belongs to.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    bounds: tuple[int, ...]
    predictors: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor

    @property
    def size(self) -> int:
        """Examples S."""
        return len(self.bounds) - 1

    def label_counts(self) -> torch.Tensor:
        """int64 [S]: labelled tokens of each example."""
        return torch.bincount(self.owners, minlength=self.size)


def flat_streams(
    examples: Sequence[Example], max_tokens: int, max_rows: int = sys.maxsize
) -> Iterator[FlatStream]:
    """The examples in order, cut into streams of at most `max_tokens` (or of one example)."""
    group: list[Example] = []
    size = 0
    for example in examples:
        full = len(group) >= max_rows or size + len(example.input_ids) > max_tokens
        if group and full:
            yield flatten(group)
            group, size = [], 0
        group.append(example)
        size += len(example.input_ids)
    if group:
        yield flatten(group)


def flatten(examples: Sequence[Example]) -> FlatStream:
    """One stream of these examples; the label of a first token has no predictor and is dropped."""
    lengths = [len(example.input_ids) for example in examples]
    starts = np.cumsum([0, *lengths])
    labelled = [np.flatnonzero(example.labels[1:] != IGNORED) for example in examples]
    targets = [e.labels[1:][at] for e, at in zip(examples, labelled, strict=True)]
    owners = np.repeat(np.arange(len(examples)), [len(at) for at in labelled])
    predictors = [at + start for at, start in zip(labelled, starts, strict=False)]
    return FlatStream(
        tokens=torch.from_numpy(np.concatenate([e.input_ids for e in examples]))[None],
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        bounds=tuple(int(start) for start in starts),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate(targets)),
        owners=torch.from_numpy(owners),
    )
