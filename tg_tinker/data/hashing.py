"""Computes the hash of a batch. Anyone can recompute it without torch.

    >>> from tg_tinker.data.hashing import batch_hash
    >>> batch_hash({"input_ids": [[5, 6, 7]]})[:15]
    'sha256:e5f7cb73'

Version 1 is SHA-256 over the line ``tg-tinker batch v1`` and then, as int64 little-endian, the
number of rows and for each row its length T, its T input ids and its T labels. Rows are normalized
first, so padding, dtype and container do not change the hash. The hash is a fingerprint of the
contents: whoever holds a batch can test whether it was trained on. Only the data owner gets it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tg_tinker.data.batch import BatchData, Example, normalize
from tg_tinker.errors import InvalidRequestError
from tg_tinker.texts import check_text

_PREFIX = "sha256:"


def batch_hash(batch: BatchData | Mapping[str, Any]) -> str:
    """Returns `sha256:` and 64 hex digits, for any accepted form of a batch."""
    return hash_examples(normalize(batch))


def hash_examples(examples: Sequence[Example]) -> str:
    """Returns the `batch_hash` of rows that are normalized already."""
    digest = hashlib.sha256(b"tg-tinker batch v1\n")
    digest.update(np.array([len(examples)], dtype="<i8").tobytes())
    for example in examples:
        digest.update(np.array([len(example.input_ids)], dtype="<i8").tobytes())
        digest.update(example.input_ids.astype("<i8").tobytes())
        digest.update(example.labels.astype("<i8").tobytes())
    return _PREFIX + digest.hexdigest()


def resolve_batch_hash(examples: Sequence[Example], given: str | None) -> str:
    """Returns the hash to report: `given` if there is one, else the computed hash.

    Raises:
        InvalidRequestError: `given` is not a string or no valid text, or begins with `sha256:` and
            differs from the computed hash.
    """
    if given is not None and not isinstance(given, str):
        raise InvalidRequestError(f"batch_hash must be a string, got {type(given).__name__}")
    if given is not None and not given.startswith(_PREFIX):
        return check_text(given, "batch_hash")  # else the registry could never record the step
    computed = hash_examples(examples)
    if given is not None and given != computed:
        raise InvalidRequestError(
            f"batch_hash is {given}, but this batch hashes to {computed}: the batch changed on the"
            " way, or the hash is from another batch"
        )
    return computed
