"""Audit logs in the registry: a row becomes durable with what it records, or not at all.

The rules are `tg_tinker.records.audit_log`'s; here they meet the database.
`AuditWriter.note` appends inside the transaction of a change; a refused change leaves a row of its
own (`AuditWriter.refusals`).
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import sqlalchemy as sa

from actors.registry.database import Database, once_durable
from actors.registry.schema import AUDIT_ROWS, RUNS
from actors.storage.key_providers import KeyProvider
from tg_tinker.errors import NotFoundError, StorageError, TGTinkerError
from tg_tinker.records.audit_log import ACCEPT, GENESIS, AuditRow, acceptance, accepted_by, chained
from tg_tinker.records.entries import is_place, parse_place, place_of
from tg_tinker.records.heads import AuditHead
from tg_tinker.storage.envelope import public_key_of

Details = dict[str, str | int]

SDK, ANYONE = "sdk", "anyone"
REFUSAL_EVERY_S = 60.0
"""Between two rows of the same refusal: a flood of them must not fill the disk."""

MOST_ROWS = 10_000
"""Of one page."""

# Made once: a row costs less than SQLAlchemy takes to put these together.
_INSERT = AUDIT_ROWS.insert()
_LAST = (
    sa.select(AUDIT_ROWS.c.row)
    .where(AUDIT_ROWS.c.tenant == sa.bindparam("tenant"))
    .order_by(AUDIT_ROWS.c.seq.desc())
    .limit(1)
)
_ACCEPTED = (
    sa.select(AUDIT_ROWS.c.row)
    .where(
        AUDIT_ROWS.c.tenant == sa.bindparam("tenant"),
        AUDIT_ROWS.c.row.contains(f'"event":"{ACCEPT}"'),
    )
    .order_by(AUDIT_ROWS.c.seq)
)
_AT = sa.select(AUDIT_ROWS.c.row).where(
    AUDIT_ROWS.c.tenant == sa.bindparam("tenant"), AUDIT_ROWS.c.seq == sa.bindparam("seq")
)


class AuditWriter:
    """Appends rows within the transactions of other parts of the registry."""

    def __init__(self, database: Database, keyring: KeyProvider, signing_key: bytes) -> None:
        self._database, self._keyring, self._signing_key = database, keyring, signing_key
        self._refused: dict[tuple[str, ...], tuple[float, int]] = {}  # when noted, left out since
        self.reached: dict[str, tuple[int, str]] = {}
        """Number and hash of the newest row of a tenant that this process knows to be durable."""

    def note(
        self, tx: sa.Connection, tenant: str, who: str, event: str, subject: str,
        details: Details | None = None, outcome: str = "ok",
    ) -> int:  # fmt: skip
        """Appends a row within the transaction of what it records; its number."""
        row = chained(
            _last(tx, tenant), time=_now(), tenant=tenant, who=who, event=event, subject=subject,
            outcome=outcome, details=details or {},
        )  # fmt: skip
        tx.execute(_INSERT, {"tenant": tenant, "seq": row.seq, "row": row.line()})
        once_durable(tx, lambda: self._remember(tenant, (row.seq, row.hash)))
        return row.seq

    def note_acceptance(self, tx: sa.Connection, tenant: str, places: Iterable[str]) -> int:
        """Records that the loss of these heads is accepted; returns the row number."""
        last = _last(tx, tenant)
        previous = GENESIS if last is None else last.hash
        details = acceptance(places, tenant, previous, self._signing_key)
        return self.note(tx, tenant, SDK, ACCEPT, "", details)

    @contextmanager
    def refusals(self, tenant: str, who: str, event: str, subject: str) -> Iterator[None]:
        """Notes a typed refusal inside, after its transaction has ended, and raises it on."""
        try:
            yield
        except NotFoundError:
            raise  # it may name anything, such as a text that was passed by mistake
        except TGTinkerError as refusal:
            with suppress(StorageError):  # the refusal itself is what the caller must learn
                self.note_refusal(tenant, who, event, subject, refusal.code)
            raise

    def note_refusal(self, tenant: str, who: str, event: str, subject: str, code: str) -> None:
        """Appends a row of its own; the same refusal again within a minute is only counted, for
        the next row of it."""
        same = (tenant, who, event, subject, code)
        noted, left_out = self._refused.get(same, (-REFUSAL_EVERY_S, 0))
        now = time.monotonic()
        if now - noted < REFUSAL_EVERY_S:
            self._refused[same] = noted, left_out + 1
            return
        with self._database.change() as tx:
            details: Details = {"left_out": left_out} if left_out else {}
            self.note(tx, tenant, who, event, subject, details, code)
            once_durable(tx, lambda: self._refused.update({same: (now, 0)}))

    def step_details(self, run_id: str, step: int, calls: Sequence[tuple[str, str]]) -> Details:
        """The hashes of a step's calls as HMACs under a key of the run: a plain hash of a batch
        would be a test of membership for whoever reads the log."""
        key_id, key = self._keyring.derive(f"tg-tinker audit hashes v1\n{run_id}".encode())
        details: Details = {"step": step, "calls": len(calls), "key": key_id}
        for name, hashes in zip(("batches", "gradients"), zip(*calls, strict=True), strict=False):
            details[name] = " ".join(_hmac(key, name, value) for value in hashes if value)
        return details

    def end(self, tenant: str) -> tuple[int, str]:
        """Number and hash of the last row."""
        with self._database.reading() as connection:
            last = _last(connection, tenant)
        return (0, GENESIS) if last is None else (last.seq, last.hash)

    def _remember(self, tenant: str, end: tuple[int, str]) -> None:
        self.reached[tenant] = max(end, self.reached.get(tenant, end))


class AuditLog:
    """The part of the registry that remembers who did what."""

    def __init__(self, database: Database, writer: AuditWriter, signing_key: bytes) -> None:
        self._database, self._writer, self._signing_key = database, writer, signing_key

    def rows(self, tenant: str, since: int, limit: int) -> list[str]:
        """Rows after row `since`, oldest first, at most `limit` of them, as canonical JSON."""
        query = (
            sa.select(AUDIT_ROWS.c.row)
            .where(AUDIT_ROWS.c.tenant == tenant, AUDIT_ROWS.c.seq > since)
            .order_by(AUDIT_ROWS.c.seq)
            .limit(min(limit, MOST_ROWS))
        )
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def missed(self, tenant: str, places: Sequence[str]) -> list[str]:
        """Those places, ``SEQ-HASH``, that the log does not go through, or that are none."""
        with self._database.reading() as connection:
            return [place for place in places if place != _place_at(connection, tenant, place)]

    def unknown(self, tenant: str, places: Sequence[str]) -> list[str]:
        """The missed places that no acceptance row covers."""
        if not (missed := self.missed(tenant, places)):
            return []
        accepted = {place for lost in self._acceptances(tenant).values() for place in lost}
        return [place for place in missed if place not in accepted]

    def accepting(self, tenant: str) -> list[int]:
        """Numbers of the rows that accept an older copy of the database."""
        return [*self._acceptances(tenant)]

    def tenants(self) -> list[str]:
        """Those that have an audit log."""
        with self._database.reading() as connection:
            return list(connection.execute(sa.select(AUDIT_ROWS.c.tenant).distinct()).scalars())

    def head(self, tenant: str) -> AuditHead:
        """Where the log ends now, signed."""
        return AuditHead(tenant, *self._writer.end(tenant), _now()).signed(self._signing_key)

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
        with self._database.change() as tx:
            owner = tenant or _tenant_of(tx, subject)
            details |= {"step": int(step)} if step else {}
            self._writer.note(tx, owner, who, "sample", subject, details, outcome)

    def record_export(self, tenant: str, artifact_id: str) -> None:
        """Notes that weights were written in clear."""
        with self._database.change() as tx:
            self._writer.note(tx, tenant, SDK, "artifact.export", artifact_id)

    def record_import(self, tenant: str, who: str, run_id: str) -> None:
        """Notes that a run took over weights from elsewhere."""
        with self._database.change() as tx:
            self._writer.note(tx, tenant, who, "artifact.import", run_id)

    def _acceptances(self, tenant: str) -> dict[int, list[str]]:
        """What each row that accepts lets be, by number."""
        key = public_key_of(self._signing_key)
        with self._database.reading() as connection:
            lines = connection.execute(_ACCEPTED, {"tenant": tenant}).scalars()
            rows = [AuditRow.parse(line) for line in lines]
        return {row.seq: places for row in rows if (places := accepted_by(row, key))}


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
