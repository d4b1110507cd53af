"""Defines the audit log of a tenant: an append-only, hash-chained list of rows.

    head = verify(rows, known=[kept])     # raises IntegrityError at the first row that breaks
    head.check(public_key)                # a signed head, from the holder of the signing key

These are pure rules: no database, no clock, no key. The registry stores the row that `chained`
returns in the same transaction as the event that the row records. Anyone who holds an exported log
verifies it with the same code. `docs/audit-log.md` describes every byte of the format.

A row is a JSON object of the fields of `AuditRow`. Its `hash` is SHA-256 over its canonical JSON
(keys sorted, no spaces, ASCII) without `hash`. Rows in any other notation are refused, so each row
has exactly one text. `details` is flat: it holds ids, numbers and HMACs, never content.

The proof of a chain is relative to a head that somebody kept: the rows up to that head are the rows
from which the head was made. Without a kept head the chain proves only that its rows fit together.

An operator who has lost the newest database may continue from an older copy. A `registry.accept`
row then names the heads whose rows are lost, see `accepted_by`. Verification accepts this loss for
heads that the operator keeps. For a head that somebody else kept, verification fails and names
the row. A row needs no key, except that this row is signed: write access to the database is not
enough to make an older copy pass.
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
from tg_tinker.records.successions import SUCCEED, Signers, Succession
from tg_tinker.storage.envelope import check_signature, sign

GENESIS = "0" * 64
"""The value of `previous` in the first row, which has `seq` 1."""

ACCEPT = "registry.accept"
"""The event of a row by which the operator accepts an older copy of the database."""

_ACCEPT_DOMAIN = b"tg-tinker registry accept v1\n"
_ROW = ("seq", "time", "tenant", "who", "event", "subject", "outcome", "details", "previous")
_HASH_KEY, _PREVIOUS_KEY = ',"hash":"', ',"previous":"'
_HASH = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", re.ASCII)


@dataclass(frozen=True)
class AuditRow:
    """One row of an audit log, the record of one event.

    Attributes:
        seq: the number of the row within the tenant's log: 1, 2, 3, ...
        time: the registry's time, UTC, ISO 8601 with microseconds.
        tenant: the tenant that owns the log.
        who: `sdk`, `RUN@EPOCH`, `api-key ID`, or `anyone` where no key was required.
        event: the name of the event, such as `artifact.save`; `docs/audit-log.md` lists them.
        subject: the run, artifact, dataset or key that the event is about.
        outcome: `ok`, or the code of the error that refused the event.
        details: texts and whole numbers by name.
        previous: the `hash` of the row before; `GENESIS` in the first row.
        hash: SHA-256 of all fields above, in hex.
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
        """Returns the row that a line holds.

        Raises:
            IntegrityError: keys are unknown, missing or repeated, a value has another type or is
                nested, or the notation is not the canonical one.
        """
        values = _object(line, (*_ROW, "hash"), "a row of an audit log")
        if not _sound(values):
            raise IntegrityError("this is not a row of an audit log: a value has another type")
        row = cls(**values)
        if row.line() != line:
            raise IntegrityError("this row of an audit log is not in canonical JSON")
        return row

    def line(self) -> str:
        """Returns the row as canonical JSON, without a line end."""
        return _canonical(vars(self))


def empty(tenant: str) -> AuditHead:
    """Returns the head of a log without rows, from which every log begins."""
    return AuditHead(tenant, 0, GENESIS, "")


def chained(
    last: AuditRow | None, *, time: str, tenant: str, who: str, event: str, subject: str,
    outcome: str, details: Mapping[str, str | int],
) -> AuditRow:  # fmt: skip
    """Returns the row that follows `last`, or the first row of a log if `last` is None.

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
    """Returns the SHA-256 of a row's canonical JSON without its own hash, in hex."""
    body = {name: getattr(row, name) for name in _ROW}
    return hashlib.sha256(_canonical(body).encode()).hexdigest()


def continued(previous: str, line: str) -> tuple[str, str] | None:
    """Returns the hash of the row in a line, and the line without this hash; None if the row does
    not continue the row with hash `previous`, or its hash is not that of its text.

    It compares texts, which takes a fraction of the time of `verify`. A text that continues a row
    may still be no row: `AuditRow.parse` tells.
    """
    at = line.rfind(_HASH_KEY)  # no object and no bare quote follows it in a row
    end = at + len(_HASH_KEY) + len(GENESIS)
    found, body = line[at + len(_HASH_KEY) : end], line[:at] + line[end + 1 :]
    before = body.rfind(_PREVIOUS_KEY) + len(_PREVIOUS_KEY)
    if at < 0 or line[end : end + 1] != '"' or not body.startswith(f'{previous}"', before):
        return None
    return (found, body) if hashlib.sha256(body.encode()).hexdigest() == found else None


def parse_rows(lines: Iterable[str], after: int = 0) -> Iterator[AuditRow]:
    """Yields the rows that follow row `after`.

    Raises:
        IntegrityError: a line is no row. The message names the first one.
    """
    for number, line in enumerate(lines, after + 1):
        try:
            row = AuditRow.parse(line)
        except IntegrityError as error:
            raise IntegrityError(f"row {number} of the audit log: {error.message}") from None
        yield row


def acceptance(
    places: Iterable[str], tenant: str, previous: str, signing_key: bytes
) -> dict[str, str | int]:
    """Returns the details of a `registry.accept` row, which accepts the loss of these heads.

    Args:
        places: the positions of the heads, ``SEQ-HASH``.
        previous: the `hash` of the row before the new row.
    """
    heads = " ".join(sorted(places))
    signature = sign(signing_key, _acceptance(tenant, previous, heads)).hex()
    return {"heads": heads, "signature": signature}


def accepted_by(row: AuditRow, public_key: bytes) -> list[str]:
    """Returns the positions of the heads whose loss the signing key's holder accepted by this row.

    Returns an empty list for any other row, and for a row whose signature does not verify.
    """
    if row.event != ACCEPT:
        return []
    heads, signature = (str(row.details.get(name, "")) for name in ("heads", "signature"))
    try:
        message = _acceptance(row.tenant, row.previous, heads)
        check_signature(public_key, bytes.fromhex(signature), message)
    except (IntegrityError, ValueError):  # write access to the database is enough for this row
        return []
    return heads.split()


def succession_details(step: Succession) -> dict[str, str | int]:
    """Returns the details of an `audit_key.rotate` row; its subject is the newer key."""
    return {name: value for name, value in vars(step).items() if name != "key"}


def succession_of(row: AuditRow) -> Succession | None:
    """Returns the rotation of the signing key that a row records.

    Returns None for any other row, and for a row whose signatures do not verify.
    """
    if row.event != SUCCEED:
        return None
    try:
        return Succession.parse(_canonical({**row.details, "key": row.subject}))
    except IntegrityError:  # write access to the database is enough for this row
        return None


def verify(
    rows: Iterable[AuditRow], since: AuditHead | None = None, known: Iterable[AuditHead] = (),
    own: Iterable[AuditHead] = (), public_key: bytes = b"",
) -> AuditHead:  # fmt: skip
    """Returns the head that the rows reach; its `since` is the oldest known head they go through.

    Args:
        rows: the rows in order: all rows of the log, or all rows after `since`.
        since: the head after which the rows begin. None: the rows begin with the log.
        known: heads that the chain must go through.
        own: heads that the operator keeps. The chain must go through each of them, or a row must
            accept its loss.
        public_key: the key that verifies rows that accept a loss, or another signing key of the
            same home: see `successions.Signers`. Without it no row accepts a loss.

    Raises:
        IntegrityError: a row was changed, left out, added or moved, or the chain does not go
            through a head. The message names the first such row, or the head.
    """
    strict = [*([] if since is None else [since]), *known]
    heads = [*own, *strict]  # of two heads of one row, the operator's comes first: known earlier
    start = at = since or empty(_tenant_of(heads))
    wanted = {head.place for head in heads}
    passed, acceptances, steps = {at.place}, list[AuditRow](), list[tuple[int, Succession]]()
    for row in rows:
        at = _next(at, row)
        passed |= {at.place} & wanted
        acceptances += [row] if row.event == ACCEPT else []
        steps += [] if (step := succession_of(row)) is None else [(row.seq, step)]
    accepted = _accepted(acceptances, public_key, steps)
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
        raise IntegrityError("the known heads belong to different tenants' audit logs")
    return next(iter(tenants), "")


def _accepted(
    rows: list[AuditRow], public_key: bytes, steps: list[tuple[int, Succession]]
) -> dict[str, int]:
    """Returns the row that accepts the loss of each head, by the head's position. Only the newest
    signing key accepts: an older one may be stolen, and a rotation repeats what it accepted."""
    if not (rows and public_key):
        return {}
    newest = Signers(public_key, steps).newest
    return {place: row.seq for row in rows for place in accepted_by(row, newest)}


def _acceptance(tenant: str, previous: str, heads: str) -> bytes:
    body = {"heads": heads, "previous": previous, "tenant": tenant}
    return _ACCEPT_DOMAIN + _canonical(body).encode()


def _missed(head: AuditHead, end: AuditHead, accepted_at: int | None) -> IntegrityError:
    """Returns the error for a log that ends at `end` and does not go through `head`."""
    if head.seq > end.seq:
        message = (
            f"although the audit log ends at row {end.seq}, a head of row {head.seq} is known: the"
            " end of the log was cut off, or an older copy replaced it"
        )
    else:
        message = (
            f"the audit log forked: row {head.seq} does not match the known head of that row"
            f" ({head.time}). This row or an earlier one was rewritten"
        )
    if accepted_at is not None:
        message += (
            f". The operator accepted that at row {accepted_at}, as the loss of a newer database:"
            " if you accept it too, keep a head of a later row from now on"
        )
    return IntegrityError(message)


def _next(at: AuditHead, row: AuditRow) -> AuditHead:
    """Returns the head after one more row."""
    place = f"row {at.seq + 1} of the audit log"
    if row.seq != at.seq + 1:
        raise IntegrityError(f"{place} is row {row.seq}: rows were left out, added or moved")
    if row.tenant != (at.tenant or row.tenant):
        raise IntegrityError(f"{place} is from another tenant's log")
    if row.previous != at.hash:
        raise IntegrityError(
            f"{place} does not continue the row before it: one of these two rows was changed"
        )
    if row_hash(row) != row.hash:
        raise IntegrityError(f"{place} was changed: its hash does not match its contents")
    return AuditHead(row.tenant, row.seq, row.hash, row.time)


def _object(line: str, names: tuple[str, ...], what: str) -> dict[str, Any]:
    """Returns a JSON object of exactly these keys.

    `AuditRow.parse` finds repeated keys, because they are not canonical.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or set(found) != set(names):
        raise IntegrityError(f"this is not {what}: it must have just the keys {', '.join(names)}")
    return found


def _sound(values: Mapping[str, Any]) -> bool:
    """Returns whether each value has its type; only `details` may be an object."""
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
