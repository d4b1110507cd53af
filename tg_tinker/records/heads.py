"""The signed head of a data set's ledger, for whoever shall notice that the ledger went back.

    head = LedgerHead.parse(line)      # raises IntegrityError for any other notation
    head.check(public_key)             # unless the service that keeps the ledger stated it

Pure rules, as in `audit_log`. The registry makes heads; the artifact store and the SDK keep them
and know no more than this of them. A head names neither data set nor run: `ledger` is a
pseudonym, and the entries that it carries, with which a lost end of the ledger can be put back,
are sealed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

from tg_tinker.errors import IntegrityError
from tg_tinker.records.entries import place_of
from tg_tinker.storage.envelope import check_signature, sign

_DOMAIN = b"tg-tinker ledger head v1\n"
_FIELDS = ("entries", "hash", "ledger", "seq", "signature", "tenant", "time")
_HASH = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class LedgerHead:
    """Where a ledger ended.

    Attributes:
        tenant: whose ledger it is.
        ledger: its pseudonym, 64 hex digits.
        seq: number of its last entry, from 0.
        hash: of its last entry.
        time: when this was stated: UTC, ISO 8601.
        entries: the last entries of the ledger, sealed, base64.
        signature: Ed25519, hex; empty where nobody signed.
    """

    tenant: str
    ledger: str
    seq: int
    hash: str
    time: str
    entries: str
    signature: str = ""

    @classmethod
    def parse(cls, line: str) -> LedgerHead:
        """A signed head, as `line` writes it. Raises IntegrityError for anything else."""
        try:
            values = json.loads(line)
            head = cls(**values)
            texts = [values[name] for name in _FIELDS if name != "seq"]
            sound = all(type(text) is str for text in texts) and type(head.seq) is int
            sound &= head.seq >= 0 and bool(_SIGNATURE.fullmatch(head.signature))
            sound &= all(map(_HASH.fullmatch, (head.ledger, head.hash))) and head.line() == line
        except (ValueError, TypeError, KeyError, RecursionError):
            sound = False
        if not sound:
            raise IntegrityError("this is not a signed head of a ledger: it was changed or cut")
        return head

    @property
    def place(self) -> str:
        """``SEQ-HASH`` of the last entry."""
        return place_of(self.seq, self.hash)

    def line(self) -> str:
        """Canonical JSON, without a line end."""
        return json.dumps(vars(self), sort_keys=True, separators=(",", ":"))

    def signed(self, signing_key: bytes) -> LedgerHead:
        return replace(self, signature=sign(signing_key, self._message()).hex())

    def check(self, public_key: bytes) -> None:
        """Raises IntegrityError unless the holder of the signing key stated this head."""
        try:
            check_signature(public_key, bytes.fromhex(self.signature), self._message())
        except IntegrityError as error:
            raise IntegrityError(f"head {self.seq} of a ledger: {error.message}") from None

    def _message(self) -> bytes:
        return _DOMAIN + replace(self, signature="").line().encode()
