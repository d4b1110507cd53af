"""Describes the files of an artifact: JSON in clear, authenticated as a whole.

    {"algorithm": ..., "artifact": ..., "commitment": ..., "files": {NAME: {"sha256", "size"}, ...},
     "format": 1, "tag": ..., "tenant": ...}

`commitment` fixes the data key (`envelope.commitment`). Sizes and hashes are those of the sealed
files. `tag` is HMAC-SHA256 over the other fields, under a key derived from the data key. Therefore
somebody who cannot open the artifact cannot describe it differently: for example, leave out a file,
or insert a file of another artifact.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import (
    ALGORITHM,
    FORMAT_VERSION,
    check_commitment,
    context_of,
    manifest_key,
)

DATA_KEY = "data key"
"""The text that the context of a wrapped data key has in place of a file name."""

_FIELDS = {"algorithm", "artifact", "commitment", "files", "format", "tag", "tenant"}
_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\.enc")
_MOST_FILES = 1000


@dataclass(frozen=True)
class SealedFile:
    """The size in bytes and the SHA-256 of a sealed file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The description of an artifact's files; see the module."""

    tenant: str
    artifact_id: str
    commitment: str
    files: Mapping[str, SealedFile]
    tag: str = ""

    def to_bytes(self, key: bytes) -> bytes:
        """Returns the content of the manifest file, with the tag under the data key."""
        described = self._described()
        return _canonical(described | {"tag": _tag(key, described)})

    def verify(self, key: bytes) -> None:
        """Raises IntegrityError unless the manifest commits to this data key and was written under
        it."""
        context = context_of(self.tenant, self.artifact_id, DATA_KEY)
        check_commitment(key, context, bytes.fromhex(self.commitment))
        self.check(key)

    def check(self, key: bytes) -> None:
        """Raises IntegrityError unless a holder of this data key wrote the manifest."""
        if not hmac.compare_digest(_tag(key, self._described()), self.tag):
            raise self._damaged("it was not written under the artifact's key")

    @classmethod
    def parse(cls, content: bytes, tenant: str, artifact_id: str) -> Manifest:
        """Returns the manifest of this artifact from exactly the bytes that `to_bytes` writes.

        Raises:
            IntegrityError: The content is anything else.
        """
        try:
            given = json.loads(content)
            files = {name: SealedFile(entry["size"], entry["sha256"])
                     for name, entry in given["files"].items()}  # fmt: skip
            found = cls(
                given["tenant"], given["artifact"], given["commitment"], files, given["tag"]
            )
            same = _canonical(found._described() | {"tag": found.tag}) == content
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            same = False
        if not same or not found._well_formed() or given.keys() != _FIELDS:
            raise IntegrityError(f"the manifest of artifact {artifact_id} is damaged")
        if (found.tenant, found.artifact_id) != (tenant, artifact_id):
            raise IntegrityError(
                f"the manifest of artifact {artifact_id} belongs to another artifact"
            )
        return found

    def _well_formed(self) -> bool:
        sizes = all(type(file.size) is int and file.size >= 0 for file in self.files.values())
        hashes = [self.commitment, self.tag, *(file.sha256 for file in self.files.values())]
        return (
            sizes
            and 0 < len(self.files) <= _MOST_FILES
            and all(map(_NAME.fullmatch, self.files))
            and all(isinstance(value, str) and _HEX.fullmatch(value) for value in hashes)
        )

    def _described(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            "algorithm": ALGORITHM,
            "artifact": self.artifact_id,
            "tenant": self.tenant,
            "commitment": self.commitment,
            "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in self.files.items()},
        }

    def _damaged(self, why: str) -> IntegrityError:
        return IntegrityError(f"the manifest of artifact {self.artifact_id}: {why}")


def _canonical(described: Mapping[str, Any]) -> bytes:
    return json.dumps(described, sort_keys=True, separators=(",", ":")).encode()


def _tag(key: bytes, described: Mapping[str, Any]) -> str:
    return hmac.new(manifest_key(key), _canonical(described), "sha256").hexdigest()
