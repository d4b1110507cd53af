"""Signed heads: where a chain ended at a moment, as the service that keeps the chain stated it.

    head = AuditHead.parse(line)      # raises IntegrityError for any other notation
    head.check(public_key)            # unless the holder of the signing key stated it

Pure rules: no database, no store. The registry makes heads; the artifact store, the home and
whoever wants proof keep them. Two kinds of chains have heads, and each its form: the audit log of a
tenant, and the ledger of a data set. A `LedgerHead` names neither data set nor run: `ledger` is a
pseudonym, and the entries that it carries, with which a lost end of the ledger can be put back, are
sealed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

from tg_tinker.errors import IntegrityError
from tg_tinker.records.entries import place_of
from tg_tinker.storage.envelope import check_signature, sign

_ANY = re.compile(r".*", re.DOTALL)
_HASH = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", re.ASCII)


class Form(NamedTuple):
    """What sets the heads of one kind of chain apart. Homes and stores are full of them: neither
    domain nor fields ever change.

    Attributes:
        chain: what the head is of, for errors.
        domain: what a signature begins with.
        texts: fields beside `seq` and `signature`, and what each must look like.
        signs_empty: whether the signed text has an empty field `signature`, or none.
    """

    chain: str
    domain: bytes
    texts: Mapping[str, re.Pattern[str]]
    signs_empty: bool


class SignedHead:
    """What all heads do: parse, line, sign and check, by their form."""

    form: ClassVar[Form]
    tenant: str
    seq: int
    hash: str
    signature: str

    @classmethod
    def parse(cls, line: str) -> Self:
        """A signed head, as `line` writes it. Raises IntegrityError for anything else."""
        try:
            values = json.loads(line)
            head = cls(**values)
            sound = type(head.seq) is int and head.seq >= 0
            sound &= all(
                type(values[name]) is str and bool(pattern.fullmatch(values[name]))
                for name, pattern in {**cls.form.texts, "signature": _SIGNATURE}.items()
            )
            sound &= head.line() == line
        except (ValueError, TypeError, KeyError, RecursionError):
            sound = False
        if not sound:
            raise IntegrityError(
                f"this is not a signed head of {cls.form.chain} in canonical JSON: it was changed"
                " or cut"
            )
        return head

    @property
    def place(self) -> str:
        """``SEQ-HASH`` of the last entry."""
        return place_of(self.seq, self.hash)

    def line(self) -> str:
        """Canonical JSON, without a line end."""
        return _canonical(self._fields() | {"signature": self.signature})

    def signed(self, signing_key: bytes) -> Self:
        """The same head with its Ed25519 signature."""
        return replace(self, signature=sign(signing_key, self._message()).hex())  # type: ignore[type-var]

    def check(self, public_key: bytes) -> None:
        """Raises IntegrityError unless the holder of the signing key stated this head."""
        try:
            check_signature(public_key, bytes.fromhex(self.signature), self._message())
        except IntegrityError as error:
            raise IntegrityError(f"head {self.seq} of {self.form.chain}: {error.message}") from None

    def _message(self) -> bytes:
        empty = {"signature": ""} if self.form.signs_empty else {}
        return self.form.domain + _canonical(self._fields() | empty).encode()

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("seq", *self.form.texts)}


@dataclass(frozen=True)
class AuditHead(SignedHead):
    """Where a log ends; whoever keeps it can tell later whether rows up to it were changed.

    Attributes:
        tenant: whose log it is.
        seq: of the last row; 0 is an empty log.
        hash: of the last row.
        time: when this was stated, as `AuditRow.time`.
        signature: Ed25519, hex; empty where nobody signed.
        since: the oldest head known before, through which the log still goes. None: no head was
            known, so the log is consistent in itself only.
        accepted: numbers of the rows that accept an older copy of the database.
    """

    form = Form(
        "an audit log",
        b"tg-tinker audit head v1\n",
        {"tenant": _ANY, "hash": _HASH, "time": _TIME},
        signs_empty=False,
    )

    tenant: str
    seq: int
    hash: str
    time: str
    signature: str = ""
    since: AuditHead | None = field(default=None, compare=False)
    accepted: tuple[int, ...] = field(default=(), compare=False)

    @classmethod
    def authentic(cls, line: str, tenant: str, public_key: bytes) -> AuditHead:
        """A head of this tenant's log, as the holder of the signing key stated it. Raises
        IntegrityError for anything else."""
        head = cls.parse(line)
        head.check(public_key)
        if head.tenant != tenant:
            raise IntegrityError("it is of another tenant's log")
        return head

    def __str__(self) -> str:
        if self.since is None:
            known = "consistent in itself; no earlier head was known"
        else:
            known = f"consistent since head {self.since.seq} of {self.since.time}"
        for row in self.accepted:
            known += f"; an older copy was accepted at row {row}, heads that it names are lost"
        return f"{self.seq} rows, head {self.hash}: {known}"


@dataclass(frozen=True)
class LedgerHead(SignedHead):
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

    form = Form(
        "a ledger",
        b"tg-tinker ledger head v1\n",
        {"tenant": _ANY, "ledger": _HASH, "hash": _HASH, "time": _ANY, "entries": _ANY},
        signs_empty=True,
    )

    tenant: str
    ledger: str
    seq: int
    hash: str
    time: str
    entries: str
    signature: str = ""


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
