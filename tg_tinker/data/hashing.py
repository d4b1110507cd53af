"""The hash of a batch, recomputable by anyone without torch.

    >>> from tg_tinker.data.hashing import batch_hash
    >>> batch_hash({"input_ids": [[5, 6, 7]]})[:15]
    'sha256:e5f7cb73'

Version 1 is SHA-256 over the line ``tg-tinker batch v1``, then int64 little-endian: the number
of rows, and per row its length T, its T input ids and its T labels. Rows are normalised first,
so padding, dtype and container never change the hash. It is a fingerprint of the contents: who
holds a batch can test whether it was trained on, so it goes to the data owner alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tg_tinker.data.batch import BatchData, Example, normalise
from tg_tinker.errors import InvalidRequestError

_PREFIX = "sha256:"


def batch_hash(batch: BatchData | Mapping[str, Any]) -> str:
    """`sha256:` and 64 hex digits for any accepted form of a batch."""
    return hash_examples(normalise(batch))


def hash_examples(examples: Sequence[Example]) -> str:
    """The same for rows that are normalised already."""
    digest = hashlib.sha256(b"tg-tinker batch v1\n")
    digest.update(np.array([len(examples)], dtype="<i8").tobytes())
    for example in examples:
        digest.update(np.array([len(example.input_ids)], dtype="<i8").tobytes())
        digest.update(example.input_ids.astype("<i8").tobytes())
        digest.update(example.labels.astype("<i8").tobytes())
    return _PREFIX + digest.hexdigest()


def resolve_batch_hash(examples: Sequence[Example], given: str | None) -> str:
    """The hash to report: the caller's own string, unless it claims to be ours and is not."""
    if given is not None and not isinstance(given, str):
        raise InvalidRequestError(f"batch_hash must be a string, got {type(given).__name__}")
    if given is not None and not given.startswith(_PREFIX):
        return given
    computed = hash_examples(examples)
    if given is not None and given != computed:
        raise InvalidRequestError(
            f"batch_hash says {given}, the batch hashes to {computed}: it changed on the way, or"
            " the hash is of another batch"
        )
    return computed
