"""Audit logs in the registry: a row becomes durable with what it records, or not at all.

The rules are `tg_tinker.records.audit_log`'s; here they meet the database. `_note` appends inside
the transaction of a change. A refused change leaves a row of its own (`_refusals_noted`).
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import sqlalchemy as sa

from actors.registry.database import METADATA, RUNS, Database
from actors.storage.key_providers import KeyProvider
from tg_tinker.errors import NotFoundError, StorageError, TGTinkerError
from tg_tinker.records.audit_log import (
    ACCEPT,
    GENESIS,
    AuditHead,
    AuditRow,
    acceptance,
    accepted_by,
    chained,
)
from tg_tinker.records.entries import is_place, parse_place, place_of
from tg_tinker.storage.envelope import public_key_of

Details = dict[str, str | int]

SDK, ANYONE = "sdk", "anyone"
REFUSAL_EVERY_S = 60.0
"""Between two rows of the same refusal: a flood of them must not fill the disk."""

MOST_ROWS = 10_000
"""Of one page."""

_NOTED = "audit rows of this transaction"

_rows = sa.Table(
    "audit_rows",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("row", sa.String, nullable=False),
)
# Made once: a row costs less than SQLAlchemy takes to put these together.
_INSERT = _rows.insert()
_LAST = (
    sa.select(_rows.c.row)
    .where(_rows.c.tenant == sa.bindparam("tenant"))
    .order_by(_rows.c.seq.desc())
    .limit(1)
)
_ACCEPTED = (
    sa.select(_rows.c.row)
    .where(_rows.c.tenant == sa.bindparam("tenant"), _rows.c.row.contains(f'"event":"{ACCEPT}"'))
    .order_by(_rows.c.seq)
)
_AT = sa.select(_rows.c.row).where(
    _rows.c.tenant == sa.bindparam("tenant"), _rows.c.seq == sa.bindparam("seq")
)


class AuditLog(Database):
    """The part of the registry that remembers who did what."""

    _keyring: KeyProvider
    _signing_key: bytes

    def __init__(self, database: str) -> None:
        super().__init__(database)
        self._refused: dict[tuple[str, ...], tuple[float, int]] = {}  # when noted, left out since
        self._reached: dict[str, tuple[int, str]] = {}  # number and hash of a tenant's newest row

    def audit_rows(self, tenant: str, since: int, limit: int) -> list[str]:
        """Rows after row `since`, oldest first, at most `limit` of them, as canonical JSON."""
        query = (
            sa.select(_rows.c.row)
            .where(_rows.c.tenant == tenant, _rows.c.seq > since)
            .order_by(_rows.c.seq)
            .limit(min(limit, MOST_ROWS))
        )
        with self._reading() as connection:
            return list(connection.execute(query).scalars())

    def missed_rows(self, tenant: str, places: Sequence[str]) -> list[str]:
        """Those places, ``SEQ-HASH``, that the log does not go through, or that are none."""
        with self._reading() as connection:
            return [place for place in places if place != _place_at(connection, tenant, place)]

    def unknown_rows(self, tenant: str, places: Sequence[str]) -> list[str]:
        """Those of them whose loss it does not accept either."""
        if not (missed := self.missed_rows(tenant, places)):
            return []
        accepted = {place for lost in self._acceptances(tenant).values() for place in lost}
        return [place for place in missed if place not in accepted]

    def accepting_rows(self, tenant: str) -> list[int]:
        """Numbers of the rows that accept an older copy of the database."""
        return [*self._acceptances(tenant)]

    def logged_tenants(self) -> list[str]:
        """Those that have an audit log."""
        with self._reading() as connection:
            return list(connection.execute(sa.select(_rows.c.tenant).distinct()).scalars())

    def audit_head(self, tenant: str) -> AuditHead:
        """Where the log ends now, signed."""
        return AuditHead(tenant, *self._end(tenant), _now()).signed(self._signing_key)

    def record_sample(
        self, tenant: str | None, who: str, version: str, prompts: int, tokens: int, outcome: str
    ) -> None:
        """Notes one call that sampled.

        Args:
            tenant: None is the run's.
            version: ``RUN@STEP``, an artifact's id, or ``base``.
            tokens: drawn, of all completions together.
        """
        subject, _, step = version.partition("@")
        details: Details = {"prompts": prompts, "tokens": tokens}
        with self._change() as tx:
            owner = tenant or _tenant_of(tx, subject)
            details |= {"step": int(step)} if step else {}
            self._note(tx, owner, who, "sample", subject, details, outcome)

    def record_export(self, tenant: str, artifact_id: str) -> None:
        """Notes that weights were written in clear."""
        with self._change() as tx:
            self._note(tx, tenant, SDK, "artifact.export", artifact_id)

    def record_import(self, tenant: str, who: str, run_id: str) -> None:
        """Notes that a run took over weights from elsewhere."""
        with self._change() as tx:
            self._note(tx, tenant, who, "artifact.import", run_id)

    # --- inside ------------------------------------------------------------------------------

    @contextmanager
    def _change(self) -> Iterator[sa.Connection]:
        """As `Database`'s. Where it took the logs is remembered once it is durable."""
        with super()._change() as tx:
            noted: dict[str, tuple[int, str]] = {}
            tx.info[_NOTED] = noted
            yield tx
        self._once_durable(lambda: self._remember(noted))

    def _remember(self, noted: dict[str, tuple[int, str]]) -> None:
        for tenant, end in noted.items():
            self._reached[tenant] = max(end, self._reached.get(tenant, end))

    def _note(
        self, tx: sa.Connection, tenant: str, who: str, event: str, subject: str,
        details: Details | None = None, outcome: str = "ok",
    ) -> int:  # fmt: skip
        """Appends a row within the transaction of what it records; its number."""
        row = chained(
            _last(tx, tenant), time=_now(), tenant=tenant, who=who, event=event, subject=subject,
            outcome=outcome, details=details or {},
        )  # fmt: skip
        tx.execute(_INSERT, {"tenant": tenant, "seq": row.seq, "row": row.line()})
        tx.info[_NOTED][tenant] = row.seq, row.hash
        return row.seq

    def _note_acceptance(self, tx: sa.Connection, tenant: str, places: Iterable[str]) -> int:
        """Appends the row that lets heads be whose rows are lost; its number."""
        last = _last(tx, tenant)
        previous = GENESIS if last is None else last.hash
        details = acceptance(places, tenant, previous, self._signing_key)
        return self._note(tx, tenant, SDK, ACCEPT, "", details)

    def _acceptances(self, tenant: str) -> dict[int, list[str]]:
        """What each row that accepts lets be, by number."""
        key = public_key_of(self._signing_key)
        with self._reading() as connection:
            lines = connection.execute(_ACCEPTED, {"tenant": tenant}).scalars()
            rows = [AuditRow.parse(line) for line in lines]
        return {row.seq: places for row in rows if (places := accepted_by(row, key))}

    def _end(self, tenant: str) -> tuple[int, str]:
        """Number and hash of the last row."""
        with self._reading() as connection:
            last = _last(connection, tenant)
        return (0, GENESIS) if last is None else (last.seq, last.hash)

    @contextmanager
    def _refusals_noted(self, tenant: str, who: str, event: str, subject: str) -> Iterator[None]:
        """A typed refusal inside is noted after its transaction has ended, and raised on."""
        try:
            yield
        except NotFoundError:
            raise  # it may name anything, such as a text that was passed by mistake
        except TGTinkerError as refusal:
            with suppress(StorageError):  # the refusal itself is what the caller must learn
                self._note_refusal(tenant, who, event, subject, refusal.code)
            raise

    def _note_refusal(self, tenant: str, who: str, event: str, subject: str, code: str) -> None:
        """The same refusal again within a minute is only counted, for the next row of it."""
        same = (tenant, who, event, subject, code)
        noted, left_out = self._refused.get(same, (-REFUSAL_EVERY_S, 0))
        now = time.monotonic()
        if now - noted < REFUSAL_EVERY_S:
            self._refused[same] = noted, left_out + 1
            return
        with self._change() as tx:
            details: Details = {"left_out": left_out} if left_out else {}
            self._note(tx, tenant, who, event, subject, details, code)
        self._once_durable(lambda: self._refused.update({same: (now, 0)}))

    def _step_details(self, run_id: str, step: int, calls: Sequence[tuple[str, str]]) -> Details:
        """The hashes of a step's calls as HMACs under a key of the run: a plain hash of a batch
        would be a test of membership for whoever reads the log."""
        key_id, key = self._keyring.derive(f"tg-tinker audit hashes v1\n{run_id}".encode())
        details: Details = {"step": step, "calls": len(calls), "key": key_id}
        for name, hashes in zip(("batches", "gradients"), zip(*calls, strict=True), strict=False):
            details[name] = " ".join(_hmac(key, name, value) for value in hashes if value)
        return details


def _hmac(key: bytes, name: str, value: str) -> str:
    return hmac.new(key, f"{name}\n{value}".encode(), hashlib.sha256).hexdigest()


def _last(connection: sa.Connection, tenant: str) -> AuditRow | None:
    row = connection.execute(_LAST, {"tenant": tenant}).scalar()
    return None if row is None else AuditRow.parse(row)


def _place_at(connection: sa.Connection, tenant: str, place: str) -> str | None:
    """Where the log goes through at the number of a place; None where it does not go so far."""
    if not is_place(place):
        return None
    seq, _ = parse_place(place)
    if seq == 0:
        return place_of(0, GENESIS)
    row = connection.execute(_AT, {"tenant": tenant, "seq": seq}).scalar()
    return None if row is None else place_of(seq, AuditRow.parse(row).hash)


def _tenant_of(connection: sa.Connection, run_id: str) -> str:
    query = sa.select(RUNS.c.tenant).where(RUNS.c.id == run_id)
    return str(connection.execute(query).scalar_one())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
