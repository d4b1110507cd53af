"""Audit logs in the registry: a row becomes durable with what it records, or not at all.

The rules are `tg_tinker.audit_log`'s; here they meet the database. `_note` appends inside the
transaction of a change. A refused change leaves a row of its own (`_refusals_noted`).
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import sqlalchemy as sa

from actors.database import METADATA, RUNS, Database
from actors.keys import KeyProvider
from tg_tinker.audit_log import ACCEPT, GENESIS, AuditHead, AuditRow, accepted_by, chained
from tg_tinker.errors import NotFoundError, StorageError, TGTinkerError
from tg_tinker.ledger import is_place, parse_place, place_of

Details = dict[str, str | int]

SDK, ANYONE = "sdk", "anyone"
REFUSAL_EVERY_S = 60.0
"""Between two rows of the same refusal: a flood of them must not fill the disk."""

MOST_ROWS = 10_000
"""Of one page."""

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

    def unknown_rows(self, tenant: str, places: Sequence[str]) -> list[str]:
        """Those places, ``SEQ-HASH``, that the log neither goes through nor accepts the loss of,
        or that are none."""
        with self._reading() as connection:
            missed = [place for place in places if place != _place_at(connection, tenant, place)]
            rows = _accepting(connection, tenant) if missed else []
        accepted = {place for row in rows for place in accepted_by(row)}
        return [place for place in missed if place not in accepted]

    def accepting_rows(self, tenant: str) -> list[int]:
        """Numbers of the rows that accept an older copy of the database."""
        with self._reading() as connection:
            return [row.seq for row in _accepting(connection, tenant)]

    def logged_tenants(self) -> list[str]:
        """Those that have an audit log."""
        with self._reading() as connection:
            return list(connection.execute(sa.select(_rows.c.tenant).distinct()).scalars())

    def audit_head(self, tenant: str) -> AuditHead:
        """Where the log ends now, signed."""
        with self._reading() as connection:
            last = _last(connection, tenant)
        seq, end = (0, GENESIS) if last is None else (last.seq, last.hash)
        return AuditHead(tenant, seq, end, _now()).signed(self._signing_key)

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

    def _note(
        self, tx: sa.Connection, tenant: str, who: str, event: str, subject: str,
        details: Details | None = None, outcome: str = "ok",
    ) -> None:  # fmt: skip
        """Appends a row within the transaction of what it records."""
        row = chained(
            _last(tx, tenant), time=_now(), tenant=tenant, who=who, event=event, subject=subject,
            outcome=outcome, details=details or {},
        )  # fmt: skip
        tx.execute(_INSERT, {"tenant": tenant, "seq": row.seq, "row": row.line()})

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
        self._refused[same] = now, 0

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


def _accepting(connection: sa.Connection, tenant: str) -> list[AuditRow]:
    rows = map(AuditRow.parse, connection.execute(_ACCEPTED, {"tenant": tenant}).scalars())
    return [row for row in rows if accepted_by(row)]


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
