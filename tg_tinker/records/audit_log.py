"""The audit log of a tenant: an append-only, hash-chained list of rows, and its signed heads.

    head = verify(rows, known=[kept])     # raises IntegrityError at the first row that breaks
    head.check(public_key)                # a signed head, from the holder of the signing key

Pure rules: no database, no clock, no key. The registry stores what `chained` returns, in the
transaction of what it records; anyone who holds an exported log verifies it with the very same
code. `docs/audit-log.md` has the format to the byte.

A row is a JSON object of the fields of `AuditRow`; `hash` is SHA-256 over its canonical JSON
(keys sorted, no spaces, ASCII) without `hash`. A row in any other notation is refused, so there is
one text for one row. `details` is flat: it holds ids, numbers and HMACs, never content.

What a chain proves is relative to a head that somebody kept: rows up to it are those which the
head was made of. Without one it proves only that the rows fit each other.

An operator whose newest database is lost may go on from an older copy. A row `registry.accept`
then names the heads of what was lost (`accepted_by`): who operates the service lets them be, who
kept one in other hands is refused and told of the row. Rows need no key, so this one is signed:
who can write to the database cannot let an older copy pass.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tg_tinker.errors import IntegrityError
from tg_tinker.records.heads import AuditHead
from tg_tinker.storage.envelope import check_signature, sign

GENESIS = "0" * 64
"""`previous` of the first row, which has `seq` 1."""

ACCEPT = "registry.accept"
"""The event of a row that accepts an older copy of the database."""

_ACCEPT_DOMAIN = b"tg-tinker registry accept v1\n"
_ROW = ("seq", "time", "tenant", "who", "event", "subject", "outcome", "details", "previous")
_HASH = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", re.ASCII)


@dataclass(frozen=True)
class AuditRow:
    """One event.

    Attributes:
        seq: 1, 2, 3, ... within the tenant.
        time: UTC, ISO 8601 with microseconds, by the registry's clock.
        tenant: whose log it is.
        who: `sdk`, `RUN@EPOCH`, `api-key ID`, or `anyone` where no key was asked for.
        event: such as `artifact.save`; `docs/audit-log.md` lists them.
        subject: the run, artifact, data set or key that it is about.
        outcome: `ok`, or the code of the error that refused it.
        details: names to texts and whole numbers.
        previous: `hash` of the row before; `GENESIS` in the first.
        hash: SHA-256 of all of the above, hex.
    """

    seq: int
    time: str
    tenant: str
    who: str
    event: str
    subject: str
    outcome: str
    details: Mapping[str, str | int] = field(hash=False)
    previous: str
    hash: str

    @classmethod
    def parse(cls, line: str) -> AuditRow:
        """The row that this line is.

        Raises:
            IntegrityError: unknown, missing or repeated keys, another type, nesting, or another
                notation than the canonical one.
        """
        values = _object(line, (*_ROW, "hash"), "a row of an audit log")
        if not _sound(values):
            raise IntegrityError("this is not a row of an audit log: a value has another type")
        row = cls(**values)
        if row.line() != line:
            raise IntegrityError("this row of an audit log is not in canonical JSON")
        return row

    def line(self) -> str:
        """Canonical JSON, without a line end."""
        return _canonical(vars(self))


def empty(tenant: str) -> AuditHead:
    """The head of a log without rows: where each begins."""
    return AuditHead(tenant, 0, GENESIS, "")


def chained(
    last: AuditRow | None, *, time: str, tenant: str, who: str, event: str, subject: str,
    outcome: str, details: Mapping[str, str | int],
) -> AuditRow:  # fmt: skip
    """The row that follows `last`; None begins a log.

    Raises:
        ValueError: a detail is nested, or another value has the wrong type.
    """
    seq, previous = (1, GENESIS) if last is None else (last.seq + 1, last.hash)
    row = AuditRow(
        seq, time, tenant, who, event, subject, outcome, dict(details), previous, GENESIS
    )
    if not _sound(vars(row)):
        raise ValueError("a row holds texts and whole numbers only")
    return replace(row, hash=row_hash(row))


def row_hash(row: AuditRow) -> str:
    """SHA-256 of a row's canonical JSON without its own hash."""
    body = {name: getattr(row, name) for name in _ROW}
    return hashlib.sha256(_canonical(body).encode()).hexdigest()


def parse_rows(lines: Iterable[str], after: int = 0) -> Iterator[AuditRow]:
    """The rows that follow row `after`. Raises IntegrityError: names the first that is none."""
    for number, line in enumerate(lines, after + 1):
        try:
            row = AuditRow.parse(line)
        except IntegrityError as error:
            raise IntegrityError(f"row {number} of the audit log: {error.message}") from None
        yield row


def acceptance(
    places: Iterable[str], tenant: str, previous: str, signing_key: bytes
) -> dict[str, str | int]:
    """Details of a row `registry.accept` that lets these heads be, after the row of that hash."""
    heads = " ".join(sorted(places))
    signature = sign(signing_key, _acceptance(tenant, previous, heads)).hex()
    return {"heads": heads, "signature": signature}


def accepted_by(row: AuditRow, public_key: bytes) -> list[str]:
    """Places of the heads whose loss the holder of the signing key accepted with this row."""
    if row.event != ACCEPT:
        return []
    heads, signature = (str(row.details.get(name, "")) for name in ("heads", "signature"))
    try:
        message = _acceptance(row.tenant, row.previous, heads)
        check_signature(public_key, bytes.fromhex(signature), message)
    except (IntegrityError, ValueError):  # anybody who can write to the database made that row
        return []
    return heads.split()


def verify(
    rows: Iterable[AuditRow], since: AuditHead | None = None, known: Iterable[AuditHead] = (),
    own: Iterable[AuditHead] = (), public_key: bytes = b"",
) -> AuditHead:  # fmt: skip
    """The head that the rows reach; its `since` is the oldest head that they were held against.

    Args:
        rows: in order; all from the first one, or all after `since`.
        since: where they begin. None: at the beginning of the log.
        known: heads that the chain must go through.
        own: heads in the operator's hands: the chain goes through them, or accepts their loss.
        public_key: of the rows that accept; without it none does.

    Raises:
        IntegrityError: names the first row that was changed, left out, added or moved, or the
            head that the chain does not go through.
    """
    strict = [*([] if since is None else [since]), *known]
    heads = [*own, *strict]  # of two of one row the operator's: it was known before
    start = at = since or empty(_tenant_of(heads))
    wanted = {head.place for head in heads}
    passed, accepted = {at.place}, dict[str, int]()
    for row in rows:
        at = _next(at, row)
        passed |= {at.place} & wanted
        accepted |= dict.fromkeys(accepted_by(row, public_key), row.seq)
    for head in sorted(heads, key=lambda head: head.seq):
        let_be = head.place in passed or (head not in strict and head.place in accepted)
        if head.seq >= start.seq and not let_be:
            raise _missed(head, at, accepted.get(head.place))
    held = [head for head in heads if head.seq >= max(start.seq, 1) and head.place in passed]
    oldest = min(held, key=lambda head: head.seq, default=None)
    return replace(at, since=oldest, accepted=tuple(sorted({*accepted.values()})))


# --- inside --------------------------------------------------------------------------------------


def _tenant_of(heads: list[AuditHead]) -> str:
    tenants = {head.tenant for head in heads}
    if len(tenants) > 1:
        raise IntegrityError("the known heads are of different tenants' audit logs")
    return next(iter(tenants), "")


def _acceptance(tenant: str, previous: str, heads: str) -> bytes:
    body = {"heads": heads, "previous": previous, "tenant": tenant}
    return _ACCEPT_DOMAIN + _canonical(body).encode()


def _missed(head: AuditHead, end: AuditHead, accepted_at: int | None) -> IntegrityError:
    """Why a log that ends there does not go through a head."""
    if head.seq > end.seq:
        message = (
            f"the audit log ends at row {end.seq}, a head of row {head.seq} is known: its end was"
            " cut off, or an old copy was put in its place"
        )
    else:
        message = (
            f"the audit log forked: row {head.seq} is not the one of the head that was known of it"
            f" ({head.time}). It, or a row before it, was rewritten"
        )
    if accepted_at is not None:
        message += (
            f". The operator accepted that at row {accepted_at}, as the loss of a newer database:"
            " if you do too, keep a head of a later row from now on"
        )
    return IntegrityError(message)


def _next(at: AuditHead, row: AuditRow) -> AuditHead:
    """The head after one more row."""
    place = f"row {at.seq + 1} of the audit log"
    if row.seq != at.seq + 1:
        raise IntegrityError(f"{place} is row {row.seq}: rows were left out, added or moved")
    if row.tenant != (at.tenant or row.tenant):
        raise IntegrityError(f"{place} is from another tenant's log")
    if row.previous != at.hash:
        raise IntegrityError(f"{place} does not continue the row before it: one was changed")
    if row_hash(row) != row.hash:
        raise IntegrityError(f"{place} was changed: its hash is another")
    return AuditHead(row.tenant, row.seq, row.hash, row.time)


def _object(line: str, names: tuple[str, ...], what: str) -> dict[str, Any]:
    """A JSON object of exactly these keys. A repeated key is not canonical: see `parse`."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or set(found) != set(names):
        raise IntegrityError(f"this is not {what}: it has not just {', '.join(names)}")
    return found


def _sound(values: Mapping[str, Any]) -> bool:
    """Whether each value has its type; the only nesting is `details`."""
    texts = (*_ROW[1:7], "previous", "hash")
    return (
        type(values["seq"]) is int
        and values["seq"] > 0
        and all(type(values[name]) is str for name in texts)
        and _TIME.fullmatch(values["time"]) is not None
        and all(_HASH.fullmatch(values[name]) for name in ("previous", "hash"))
        and type(values["details"]) is dict
        and all(type(name) is str for name in values["details"])
        and all(type(value) in (str, int) for value in values["details"].values())
    )


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
