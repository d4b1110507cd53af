"""Defines signed heads: signed statements of the service about where a chain ended at a moment.

    head = AuditHead.parse(line)      # raises IntegrityError for any other notation
    head.check(public_key)            # raises it unless the holder of the signing key signed

These are pure rules: no database, no store. The registry makes heads. The artifact store, the home
and anyone who wants proof keep them. Two kinds of chains have heads, each in a form of its own: the
audit log of a tenant, and the ledger of a dataset. A `LedgerHead` names neither dataset nor run:
`ledger` is a pseudonym, and the entries in the head are sealed. From these entries a lost end of
the ledger can be restored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
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
    """The form of the heads of one kind of chain.

    Existing homes and stores hold heads, so the domain and the fields must never change.

    Attributes:
        chain: the kind of chain, for error messages.
        domain: the prefix of the signed text.
        texts: the fields besides `seq` and `signature`, and the pattern that each must match.
        signs_empty: whether the signed text has an empty `signature` field. If False, it has no
            such field.
    """

    chain: str
    domain: bytes
    texts: Mapping[str, re.Pattern[str]]
    signs_empty: bool


class SignedHead:
    """The base of all heads: parses, prints, signs and checks a head by its form."""

    form: ClassVar[Form]
    tenant: str
    seq: int
    hash: str
    signature: str

    @classmethod
    def parse(cls, line: str) -> Self:
        """Returns the signed head that a line holds. Raises IntegrityError for any other text."""
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
                " or cut short"
            )
        return head

    @property
    def place(self) -> str:
        """The position ``SEQ-HASH`` of the last entry or row."""
        return place_of(self.seq, self.hash)

    def line(self) -> str:
        """Returns the head as canonical JSON, without a line end."""
        return _canonical(self._fields() | {"signature": self.signature})

    def signed(self, signing_key: bytes) -> Self:
        """Returns the same head with its Ed25519 signature."""
        return replace(self, signature=sign(signing_key, self._message()).hex())  # type: ignore[type-var]

    def check(self, public_key: bytes, *others: bytes) -> None:
        """Raises IntegrityError unless the holder of one of these signing keys signed this head."""
        message, signature = self._message(), bytes.fromhex(self.signature)
        for other in others:
            with suppress(IntegrityError):
                return check_signature(other, signature, message)
        try:
            check_signature(public_key, signature, message)
        except IntegrityError as error:
            raise IntegrityError(f"head {self.seq} of {self.form.chain}: {error.message}") from None

    def _message(self) -> bytes:
        empty = {"signature": ""} if self.form.signs_empty else {}
        return self.form.domain + _canonical(self._fields() | empty).encode()

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("seq", *self.form.texts)}


@dataclass(frozen=True)
class AuditHead(SignedHead):
    """The head of an audit log. Whoever keeps it can detect later changes of rows up to it.

    Attributes:
        tenant: the tenant that owns the log.
        seq: the number of the last row; 0 for an empty log.
        hash: the hash of the last row.
        time: the time of the head, in the format of `AuditRow.time`.
        signature: Ed25519, hex; empty if the head is not signed.
        since: the oldest head known before that the log still goes through. None: no head was
            known, so the log is consistent only in itself.
        accepted: the numbers of the rows that accept an older copy of the database.
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
    def authentic(
        cls, line: str, tenant: str, public_key: bytes, *others: bytes
    ) -> AuditHead:  # fmt: skip
        """Returns a head of this tenant's log, signed by the holder of one of these signing keys.

        Raises:
            IntegrityError: the line is not a signed head, the signature does not verify, or the
                head is from another tenant's log.
        """
        head = cls.parse(line)
        head.check(public_key, *others)
        if head.tenant != tenant:
            raise IntegrityError("the head is from another tenant's log")
        return head

    def __str__(self) -> str:
        if self.since is None:
            known = "consistent in itself; no earlier head was known"
        else:
            known = f"consistent since head {self.since.seq} of {self.since.time}"
        for row in self.accepted:
            known += f"; an older copy was accepted at row {row}, which names the lost heads"
        return f"{self.seq} rows, head {self.hash}: {known}"


@dataclass(frozen=True)
class LedgerHead(SignedHead):
    """The head of a ledger.

    Attributes:
        tenant: the tenant that owns the ledger.
        ledger: the pseudonym of the ledger, 64 hex digits.
        seq: the number of the last entry, counted from 0.
        hash: the hash of the last entry.
        time: the time of the head, UTC, ISO 8601.
        entries: the last entries of the ledger, sealed, base64.
        signature: Ed25519, hex; empty if the head is not signed.
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
