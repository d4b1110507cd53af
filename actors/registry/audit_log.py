"""Stores audit logs in the registry: a row becomes durable with the change it records, or not at
all.

The rules are in `tg_tinker.records.audit_log`; this module applies them to the database.
`AuditWriter.note` appends a row inside the transaction of a change. A refused change leaves a row
of its own; see `AuditWriter.refusals`. `request_rows` limits the rows about requests, and keeps
those that are written after the answer; `AuditWriter.settle` writes these.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import sqlalchemy as sa

from actors.registry.database import Database, once_durable
from actors.registry.lookups import ANYONE as ANYONE
from actors.registry.lookups import owned
from actors.registry.request_rows import Request
from actors.registry.schema import ARTIFACTS, AUDIT_ROWS, OWNER, RUNS
from actors.storage.key_providers import KeyProvider
from actors.storage.signing import SigningKey
from tg_tinker.errors import NotFoundError, StorageError, TGTinkerError
from tg_tinker.records.audit_log import (
    ACCEPT,
    GENESIS,
    AuditRow,
    acceptance,
    accepted_by,
    chained,
    succession_details,
    succession_of,
)
from tg_tinker.records.entries import is_place, parse_place, place_of
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.successions import SUCCEED, Succession

Details = dict[str, str | int]

SDK = "sdk"

MOST_ROWS = 10_000
"""The largest number of rows in one page."""

# Built once: building a statement in SQLAlchemy takes longer than storing a row.
_INSERT = AUDIT_ROWS.insert()
_TOUCH = OWNER.update().values(fencing_token=OWNER.c.fencing_token)
_LAST = (
    sa.select(AUDIT_ROWS.c.row)
    .where(AUDIT_ROWS.c.tenant == sa.bindparam("tenant"))
    .order_by(AUDIT_ROWS.c.seq.desc())
    .limit(1)
)
_ACCEPTED, _SUCCEEDED = (
    sa.select(AUDIT_ROWS.c.row)
    .where(
        AUDIT_ROWS.c.tenant == sa.bindparam("tenant"),
        AUDIT_ROWS.c.row.contains(f'"event":"{event}"', autoescape=True),
    )
    .order_by(AUDIT_ROWS.c.seq)
    for event in (ACCEPT, SUCCEED)
)
_AT = sa.select(AUDIT_ROWS.c.row).where(
    AUDIT_ROWS.c.tenant == sa.bindparam("tenant"), AUDIT_ROWS.c.seq == sa.bindparam("seq")
)


class AuditWriter:
    """A writer that appends rows within the transactions of other parts of the registry."""

    def __init__(self, database: Database, keyring: KeyProvider, signing: SigningKey) -> None:
        self._database, self._keyring, self._signing = database, keyring, signing
        self.reached: dict[str, tuple[int, str]] = {}
        """The number and hash of each tenant's newest row that this process knows to be durable."""
        # The newest signing key of which each tenant's log has the row, as far as is known here.
        self._succeeded: dict[str, str] = {}

    def note(
        self, tx: sa.Connection, tenant: str, who: str, event: str, subject: str,
        details: Details | None = None, outcome: str = "ok",
    ) -> int:  # fmt: skip
        """Appends a row within the transaction of the change it records, and returns the row
        number."""
        self.note_successions(tx, tenant)
        return self._append(tx, tenant, who, event, subject, details or {}, outcome)

    def note_successions(self, tx: sa.Connection, tenant: str) -> None:
        """Appends the row of each rotation of the signing key of which the log has none. So a head
        verifies for whoever pinned an older key, also after a crash between files and database."""
        steps = self._signing.succession()
        if not steps or self._succeeded.get(tenant) == steps[-1].key:
            return
        noted = {step.key for _, step in successions(tx, tenant)}
        for step in steps:
            if step.key not in noted:
                self._append(tx, tenant, SDK, SUCCEED, step.key, succession_details(step), "ok")
        once_durable(tx, lambda: self._succeeded.update({tenant: steps[-1].key}))

    def _append(
        self, tx: sa.Connection, tenant: str, who: str, event: str, subject: str, details: Details,
        outcome: str,
    ) -> int:  # fmt: skip
        row = chained(
            _last(tx, tenant), time=_now(), tenant=tenant, who=who, event=event, subject=subject,
            outcome=outcome, details=details,
        )  # fmt: skip
        tx.execute(_INSERT, {"tenant": tenant, "seq": row.seq, "row": row.line()})
        once_durable(tx, lambda: self._remember(tenant, (row.seq, row.hash)))
        return row.seq

    def note_acceptance(self, tx: sa.Connection, tenant: str, places: Iterable[str]) -> int:
        """Records that the loss of these heads is accepted; returns the row number."""
        self.note_successions(tx, tenant)
        last = _last(tx, tenant)
        previous = GENESIS if last is None else last.hash
        details = acceptance(places, tenant, previous, self._signing.private())
        return self.note(tx, tenant, SDK, ACCEPT, "", details)

    @contextmanager
    def refusals(self, tenant: str, who: str, event: str, subject: str) -> Iterator[None]:
        """Records a typed refusal that is raised inside, after its transaction has ended, and
        raises it again."""
        try:
            yield
        except NotFoundError:
            raise  # Not recorded: it may name anything, such as a text that was passed by mistake.
        except TGTinkerError as refusal:
            # The caller must learn of the refusal even if it cannot be recorded.
            with suppress(StorageError):
                self.note_refusal(tenant, who, event, subject, refusal.code)
            raise

    def note_refusal(self, tenant: str, who: str, event: str, subject: str, code: str) -> None:
        """Appends a row for a refusal in a transaction of its own. The same refusal in the same
        window is only counted; see `RequestRows`."""
        request = Request(tenant, who, event, subject, code)
        if not self._database.requests.admits(request):
            self._database.once_durable(lambda: self._database.requests.leave_out(request))
            return
        with self._database.change() as tx:
            self.note(tx, *request[:4], outcome=code)

    def note_sample(self, request: Request, details: Details, amounts: Mapping[str, int]) -> None:
        """Appends a row for a call that sampled in a transaction of its own. What exceeds the limit
        of `RequestRows` is only counted, with its amounts."""
        requests = self._database.requests
        if not requests.admits(request, repeats=True):
            self._database.once_durable(lambda: requests.leave_out(request, 1, amounts))
            return
        with self._database.change() as tx:
            self.note(tx, *request[:4], {**details, **amounts}, request.outcome)

    def settle(self, whole: bool = False) -> None:
        """Writes the rows that waited for an answer, and the counts of windows that have ended.

        Requests without a row are settled by the same transaction, so that its time does not tell
        what was asked for.

        Args:
            whole: Whether the window ends too, because nothing comes after it.

        Raises:
            StorageError: The database refuses; the rows wait for the next call.
        """
        requests = self._database.requests
        asked, ended = requests.waiting(whole)
        if not (asked or ended) or self._database.looks_only:
            return
        with self._database.change() as tx:
            tx.execute(_TOUCH)
            for left in ended:
                self.note(tx, *left.request[:4], dict(left.amounts), left.request.outcome)
            for request, times in asked.items():
                self._note_asked(tx, request, times)
            once_durable(tx, lambda: requests.written(asked, ended))

    def _note_asked(self, tx: sa.Connection, request: Request | None, times: int) -> None:
        if request is None:
            return
        requests = self._database.requests
        if admitted := requests.admits(request):
            self.note(tx, *request[:4], outcome=request.outcome)
        if left := times - admitted:
            once_durable(tx, lambda: requests.leave_out(request, left))

    def step_details(self, run_id: str, step: int, calls: Sequence[tuple[str, str]]) -> Details:
        """Returns the hashes of a step's calls as HMACs under a key of the run. A plain hash of a
        batch would let whoever reads the log test membership."""
        key_id, key = self._keyring.derive(f"tg-tinker audit hashes v1\n{run_id}".encode())
        details: Details = {"step": step, "calls": len(calls), "key": key_id}
        for name, hashes in zip(("batches", "gradients"), zip(*calls, strict=True), strict=False):
            details[name] = " ".join(_hmac(key, name, value) for value in hashes if value)
        return details

    def end(self, tenant: str) -> tuple[int, str]:
        """Returns the number and hash of the last row; 0 and `GENESIS` if the log is empty."""
        with self._database.reading() as connection:
            last = _last(connection, tenant)
        return (0, GENESIS) if last is None else (last.seq, last.hash)

    def succeeded(self, tenant: str) -> bool:
        """Returns whether the log has the row of each rotation of the signing key."""
        steps = self._signing.succession()
        if not steps or self._succeeded.get(tenant) == steps[-1].key:
            return True
        with self._database.reading() as connection:
            noted = {step.key for _, step in successions(connection, tenant)}
        return noted >= {step.key for step in steps}

    def _remember(self, tenant: str, end: tuple[int, str]) -> None:
        self.reached[tenant] = max(end, self.reached.get(tenant, end))


class AuditLog:
    """The part of the registry that records who did what."""

    def __init__(self, database: Database, writer: AuditWriter, signing: SigningKey) -> None:
        self._database, self._writer, self._signing = database, writer, signing

    def rows(self, tenant: str, since: int, limit: int) -> list[str]:
        """Returns at most `limit` rows after row `since`, oldest first, as canonical JSON."""
        # The reader sees what was asked for before. A database that refuses can still be read.
        with suppress(StorageError):
            self._writer.settle()
        query = (
            sa.select(AUDIT_ROWS.c.row)
            .where(AUDIT_ROWS.c.tenant == tenant, AUDIT_ROWS.c.seq > since)
            .order_by(AUDIT_ROWS.c.seq)
            .limit(min(limit, MOST_ROWS))
        )
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def missed(self, tenant: str, places: Sequence[str]) -> list[str]:
        """Returns the head positions, ``SEQ-HASH``, that are not on the log. Malformed positions
        are among them."""
        with self._database.reading() as connection:
            return [place for place in places if place != _place_at(connection, tenant, place)]

    def accepted(self, tenant: str) -> list[str]:
        """Returns the positions of all heads whose loss is accepted."""
        return sorted({place for lost in self._acceptances(tenant).values() for place in lost})

    def unknown(self, tenant: str, places: Sequence[str]) -> list[str]:
        """Returns the missed positions that no acceptance row covers."""
        if not (missed := self.missed(tenant, places)):
            return []
        accepted = set(self.accepted(tenant))
        return [place for place in missed if place not in accepted]

    def accepting(self, tenant: str) -> list[int]:
        """Returns the numbers of the rows that accept an older copy of the database."""
        return [*self._acceptances(tenant)]

    def tenants(self) -> list[str]:
        """Returns the tenants that have an audit log."""
        with self._database.reading() as connection:
            return list(connection.execute(sa.select(AUDIT_ROWS.c.tenant).distinct()).scalars())

    def head(self, tenant: str) -> AuditHead:
        """Returns where the log ends now, as a signed head. If the signing key was rotated and the
        log has no row of this, appends the row."""
        key = self._signing.private()
        seq, place = self._writer.end(tenant)
        if seq and not self._writer.succeeded(tenant):
            with self._database.change() as tx:
                self._writer.note_successions(tx, tenant)
            seq, place = self._writer.end(tenant)
        if self._signing.private() != key:
            # Another process has rotated it, and the row of this may precede the one just read.
            return self.head(tenant)
        return AuditHead(tenant, seq, place, _now()).signed(key)

    def successions(self, tenant: str) -> list[tuple[int, Succession]]:
        """Returns the rotations of the signing key in the log, each with the number of its row."""
        with self._database.reading() as connection:
            return successions(connection, tenant)

    def record_sample(
        self, tenant: str | None, who: str, version: str, prompts: int, tokens: int, outcome: str
    ) -> None:
        """Records one call that sampled.

        Args:
            tenant: The tenant whose log gets the row. None means the tenant that owns the run.
            version: ``RUN@STEP``, the id of an artifact, or ``base``.
            tokens: The number of drawn tokens, over all completions.
        """
        subject, _, step = version.partition("@")
        with self._database.reading() as connection:
            owner = tenant or _tenant_of(connection, subject)
        request = Request(owner, who, "sample", subject, outcome)
        details: Details = {"step": int(step)} if step else {}
        self._writer.note_sample(request, details, {"prompts": prompts, "tokens": tokens})

    def settle(self, whole: bool = False) -> None:
        """Writes the rows that wait for the answers of their requests.

        Args:
            whole: Whether the window ends too; see `AuditWriter.settle`.
        """
        self._writer.settle()
        if whole:
            self._writer.settle(whole=True)

    def record_export(self, tenant: str, artifact_id: str) -> None:
        """Records that weights were written in clear.

        Raises:
            NotFoundError: The tenant has no such artifact.
        """
        with self._database.change() as tx:
            if owned(tx, ARTIFACTS, tenant, artifact_id) is None:
                raise NotFoundError(f"no artifact {artifact_id!r} of this tenant")
            self._writer.note(tx, tenant, SDK, "artifact.export", artifact_id)

    def record_import(self, tenant: str, who: str, run_id: str) -> None:
        """Records that a run took over weights from elsewhere.

        Raises:
            NotFoundError: The tenant has no such run.
        """
        with self._database.change() as tx:
            if owned(tx, RUNS, tenant, run_id) is None:
                raise NotFoundError(f"no training client {run_id!r} of this tenant")
            self._writer.note(tx, tenant, who, "artifact.import", run_id)

    def _acceptances(self, tenant: str) -> dict[int, list[str]]:
        """Returns the head positions whose loss each acceptance row accepts, by row number."""
        key = self._signing.public()
        with self._database.reading() as connection:
            lines = connection.execute(_ACCEPTED, {"tenant": tenant}).scalars()
            rows = [AuditRow.parse(line) for line in lines]
        return {row.seq: places for row in rows if (places := accepted_by(row, key))}


def successions(connection: sa.Connection, tenant: str) -> list[tuple[int, Succession]]:
    """Returns the rotations of the signing key in a log, each with the number of its row."""
    lines = connection.execute(_SUCCEEDED, {"tenant": tenant}).scalars()
    rows = [AuditRow.parse(line) for line in lines]
    return [(row.seq, step) for row in rows if (step := succession_of(row)) is not None]


def _hmac(key: bytes, name: str, value: str) -> str:
    return hmac.new(key, f"{name}\n{value}".encode(), hashlib.sha256).hexdigest()


def _last(connection: sa.Connection, tenant: str) -> AuditRow | None:
    row = connection.execute(_LAST, {"tenant": tenant}).scalar()
    return None if row is None else AuditRow.parse(row)


def _place_at(connection: sa.Connection, tenant: str, place: str) -> str | None:
    """Returns the position of the log at the number that `place` states. Returns None if the log
    ends before that number, or `place` is malformed."""
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
