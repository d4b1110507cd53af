"""Packs examples into flat streams: one row of tokens per micro-batch, without padding.

Legend: T tokens of a stream, S examples in it, L labeled tokens.
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
    """A row of examples, one directly after the other.

    Attributes:
        tokens: int64 [1, T].
        positions: int64 [1, T], starting from 0 in each example.
        bounds: S + 1 offsets of the examples in the stream.
        predictors: int64 [L], the stream positions whose next token carries a loss.
        targets: int64 [L], the next token of each predictor.
        owners: int64 [L], the index in [0, S) of the example that each target belongs to.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    bounds: tuple[int, ...]
    predictors: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor

    @property
    def size(self) -> int:
        """The number of examples S."""
        return len(self.bounds) - 1

    def label_counts(self) -> torch.Tensor:
        """Returns the number of labeled tokens of each example: int64 [S]."""
        return torch.bincount(self.owners, minlength=self.size)


def flat_streams(
    examples: Sequence[Example], max_tokens: int, max_rows: int = sys.maxsize
) -> Iterator[FlatStream]:
    """Yields streams of the examples, in order.

    A stream has at most `max_tokens` tokens and `max_rows` examples. A longer example gets a stream
    of its own.
    """
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
    """Returns one stream of these examples.

    The label of an example's first token is dropped, because no token predicts it.
    """
    lengths = [len(example.input_ids) for example in examples]
    starts = np.cumsum([0, *lengths])
    labeled = [np.flatnonzero(example.labels[1:] != IGNORED) for example in examples]
    targets = [e.labels[1:][at] for e, at in zip(examples, labeled, strict=True)]
    owners = np.repeat(np.arange(len(examples)), [len(at) for at in labeled])
    predictors = [at + start for at, start in zip(labeled, starts, strict=False)]
    return FlatStream(
        tokens=torch.from_numpy(np.concatenate([e.input_ids for e in examples]))[None],
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        bounds=tuple(int(start) for start in starts),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate(targets)),
        owners=torch.from_numpy(owners),
    )
