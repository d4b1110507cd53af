"""Ledgers and audit logs against the heads that are known of them: an older or another database is
noticed before it charges, opens, saves or removes anything.

A head that the store or a home keeps must lie on the chain that it is of. A restored copy of the
database has the signing key of today, so only heads that were signed here are evidence; anybody who
can write to the store can put others there. Heads of ledgers carry the entries before them, sealed
for this registry alone: so the end of a ledger that was lost with its database can be put back,
entry by entry.

Where a call takes a `dataset`, the chain is its ledger; None is the tenant's audit log.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from actors.registry.audit_log import SDK, AuditLog, AuditWriter
from actors.registry.book import Book
from actors.registry.database import Database
from tg_tinker.errors import AccessDeniedError, IntegrityError, LedgerMismatchError, RollbackError
from tg_tinker.records.audit_log import ACCEPT
from tg_tinker.records.entries import CHAIN, Entry, is_place, place_of
from tg_tinker.records.heads import AuditHead, LedgerHead, SignedHead
from tg_tinker.records.ledger import Ledger
from tg_tinker.storage.envelope import context_of, derive_key, public_key_of, seal, unseal

_NAME, _ENTRIES = "ledger pseudonym", "ledger entries"


class Heads:
    """The part of the registry that states heads of ledgers, and holds all chains against heads."""

    def __init__(
        self, database: Database, writer: AuditWriter, audit_log: AuditLog, book: Book,
        signing_key: bytes,
    ) -> None:  # fmt: skip
        self._database, self._writer = database, writer
        self._audit_log, self._book, self._signing_key = audit_log, book, signing_key
        # In memory, on purpose: a database that is put back under a new process is held anew.
        self._met: set[tuple[str, str]] = set()

    # --- any chain ---------------------------------------------------------------------------

    def unknown(self, tenant: str, dataset: str | None, places: Sequence[str]) -> list[str]:
        """Those places, ``SEQ-HASH``, that the chain neither goes through nor accepts the loss of,
        or that are none."""
        if dataset is None:
            return self._audit_log.unknown(tenant, places)
        with self._database.reading() as connection:
            ledger = self._book.ledger(connection, tenant, dataset)
        return [place for place in places if not (is_place(place) and ledger.goes_through(place))]

    def judge(
        self, tenant: str, dataset: str | None, lines: Mapping[str, str]
    ) -> tuple[dict[str, SignedHead], dict[str, str]]:
        """Of objects by name: heads of this chain that it does not go through, and why others are
        no heads of it."""
        heads: dict[str, SignedHead] = {}
        others: dict[str, str] = {}
        for name, line in lines.items():
            try:
                heads[name] = self._authentic(tenant, dataset, line)
            except IntegrityError as error:
                others[name] = error.message
        places = [head.place for head in heads.values()]
        unknown = set(self.unknown(tenant, dataset, places)) if places else set()
        return {name: head for name, head in heads.items() if head.place in unknown}, others

    def meet(
        self, tenant: str, dataset: str | None, store: str, lines: Mapping[str, str],
        kept: Sequence[str] = (), who: str = SDK,
    ) -> dict[str, str]:  # fmt: skip
        """Holds a chain against objects of a store that may be heads of it, and against heads that
        the caller keeps. The audit log has then met the store.

        Args:
            store: its root.
            lines: what all objects hold whose names the chain does not know, by name.
            kept: heads of a ledger, a line each.
            who: asks, for the audit log.

        Returns:
            Why an object is no head of this chain, by its name. Those count for nothing.

        Raises:
            RollbackError: the audit log does not go through one of the heads.
            LedgerMismatchError: the ledger is behind one of them, or another chain.
            IntegrityError: a kept head is damaged, of another ledger, or not signed here.
        """
        event = "registry.check" if dataset is None else "ledger.check"
        with self._writer.refusals(tenant, who, event, dataset or ""):
            held = [self._authentic(tenant, dataset, line) for line in kept]
            missing, others = self.judge(tenant, dataset, lines)
            if dataset is not None:
                self._check_places(tenant, {dataset: [h.place for h in [*missing.values(), *held]]})
                return others
            end = self._writer.end(tenant)
            if missing:
                raise _rolled_back(*max(missing.items(), key=lambda item: item[1].seq), end[0])
        self._writer.reached[tenant] = end
        self._met.add((tenant, store))
        return others

    # --- the audit log -----------------------------------------------------------------------

    def met(self, tenant: str, store: str) -> bool:
        """Whether this process has met a store, and the log has lost nothing that it saw of it."""
        reached = self._writer.reached.get(tenant)
        if reached is None or self._audit_log.unknown(tenant, [place_of(*reached)]):
            self._met = {one for one in self._met if one[0] != tenant}
            return False
        # Another process may have gone on.
        self._writer.reached[tenant] = max(reached, self._writer.end(tenant))
        return (tenant, store) in self._met

    def refuse_unmet(self, tenant: str, store: str) -> None:
        """Where a data key is handed out, so that nobody can forget to ask.

        Raises:
            AccessDeniedError: the store was not met.
        """
        if not self.met(tenant, store):
            raise AccessDeniedError(
                "the registry was not held against the heads in this store since it started, or"
                " its database changed meanwhile: repeat the call"
            )

    def accept(self, tenant: str, lines: Sequence[str]) -> int:
        """Accepts the loss of the rows these heads attest: from now on they count as known.

        Returns:
            Number of the row that says so; 0, and no row, where the log knows them all.

        Raises:
            IntegrityError: one is no head of this log.
        """
        with self._writer.refusals(tenant, SDK, ACCEPT, ""):
            places = {self._authentic(tenant, None, line).place for line in lines}
            if not (unknown := self._audit_log.unknown(tenant, [*places])):
                return 0
            with self._database.change() as tx:
                return self._writer.note_acceptance(tx, tenant, unknown)

    # --- ledgers -----------------------------------------------------------------------------

    def ledger_name(self, tenant: str, dataset: str) -> str:
        """A ledger's pseudonym, 64 hex digits: the store shall not learn names of data sets.

        Made from the signing key, which never changes: not from the database, which may be the
        one that lost the data set, nor from the keyring, which rotates.
        """
        return self._ledger_key(tenant, dataset, _NAME).hex()

    def ledger_head(self, tenant: str, dataset: str, after: int) -> str:
        """The present head of a ledger as a line, with its entries after entry `after`."""
        with self._database.reading() as connection:
            ledger = self._book.known(connection, tenant, dataset)
            entries = self._book.stored(connection, tenant, dataset, after)
        key, context = self._sealing(tenant, dataset)
        sealed = base64.b64encode(seal(key, json.dumps(entries).encode(), context)).decode()
        name, now = self.ledger_name(tenant, dataset), datetime.now(UTC).isoformat()
        head = LedgerHead(tenant, name, ledger.length - 1, ledger.head, now, sealed)
        return head.signed(self._signing_key).line()

    def lost_ledgers(self, tenant: str, lines: Sequence[str]) -> list[str]:
        """Pseudonyms of ledgers of a tenant that there are heads of, signed here, among these."""
        found, public_key = set(), public_key_of(self._signing_key)
        for line in lines:
            with suppress(IntegrityError):
                head = LedgerHead.parse(line)
                head.check(public_key)
                found |= {head.ledger} if head.tenant == tenant else set()
        return sorted(found)

    def check_lineage(
        self, tenant: str, places: Mapping[str, str], artifact_id: str, who: str = SDK
    ) -> None:
        """Refuses an artifact whose ledgers were ahead of the current ones, or have forked.

        Args:
            places: where each ledger ended when the artifact was saved, by data set.

        Raises:
            LedgerMismatchError: see `meet`.
        """
        with self._writer.refusals(tenant, who, "artifact.load", artifact_id):
            self._check_places(tenant, {dataset: [place] for dataset, place in places.items()})

    def book_missing(self, tenant: str, dataset: str, lines: Sequence[str]) -> int:
        """Puts the lost end of a ledger back from heads; how many of its charges.

        Every entry is the lost one to the byte, so nothing is charged twice and nothing less than
        was spent. Runs that appear in them are closed: which units they used is not in a ledger.

        Raises:
            LedgerMismatchError: an entry before one of the heads is in none of them, or the
                ledger went on from an earlier one; nothing was changed.
            IntegrityError: see `meet`; nothing was changed.
        """
        with (
            self._writer.refusals(tenant, SDK, "budget.book", dataset),
            self._database.change() as tx,
        ):
            heads = [self._ledger_head(tenant, dataset, line) for line in lines]
            entries = [entry for head in heads for entry in self._entries(dataset, head)]
            following = {entry["prev"]: entry for entry in entries}
            ledger = self._book.ledger(tx, tenant, dataset)
            if not ledger.length and ledger.head in following:
                self._book.new_dataset(tx, tenant, dataset)
            booked: list[Entry] = []
            while (lost := following.get(ledger.head)) is not None:
                body = {name: value for name, value in lost.items() if name not in CHAIN}
                booked.append(self._book.append(tx, tenant, dataset, ledger, body, SDK))
            for head in heads:  # also finds an entry that came out otherwise than it was
                _check_booked(ledger, head, dataset)
            if runs := sorted({entry["run"] for entry in booked if "run" in entry}):
                body = {"type": "book", "runs": runs}
                self._book.append(tx, tenant, dataset, ledger, body, SDK)
            return sum(entry["type"] in ("charge", "unnoised") for entry in booked)

    # --- inside ------------------------------------------------------------------------------

    def _authentic(self, tenant: str, dataset: str | None, line: str) -> SignedHead:
        """A head of this chain that was signed here. Raises IntegrityError for anything else."""
        if dataset is None:
            return AuditHead.authentic(line, tenant, public_key_of(self._signing_key))
        return self._ledger_head(tenant, dataset, line)

    def _ledger_head(self, tenant: str, dataset: str, line: str) -> LedgerHead:
        head = LedgerHead.parse(line)
        head.check(public_key_of(self._signing_key))
        if (head.tenant, head.ledger) != (tenant, self.ledger_name(tenant, dataset)):
            raise IntegrityError(
                f"a head that is kept for data set {dataset!r} is of another ledger: it was moved"
                " here"
            )
        return head

    def _check_places(self, tenant: str, known: Mapping[str, Iterable[str]]) -> None:
        with self._database.reading() as connection:
            self._book.check_places(connection, tenant, known)

    def _entries(self, dataset: str, head: LedgerHead) -> list[Entry]:
        key, context = self._sealing(head.tenant, dataset)
        entries: list[Entry] = json.loads(unseal(key, base64.b64decode(head.entries), context))
        return entries

    def _sealing(self, tenant: str, dataset: str) -> tuple[bytes, bytes]:
        """Key and context of the entries in a head."""
        key = self._ledger_key(tenant, dataset, _ENTRIES)
        return key, context_of(tenant, dataset, _ENTRIES)

    def _ledger_key(self, tenant: str, dataset: str, purpose: str) -> bytes:
        return derive_key(self._signing_key, context_of(tenant, dataset, purpose))


def _rolled_back(name: str, head: SignedHead, end: int) -> RollbackError:
    where = "it has another row there" if head.seq <= end else f"it ends at row {end}"
    return RollbackError(
        f"the store has a head of row {head.seq} of the audit log of tenant {head.tenant}, {name},"
        f" that this registry does not know, {where}: its database is an older copy, or another"
        " one was in use meanwhile."
        " Nothing was opened or changed. Put the newest copy of the database back; if it is lost,"
        " `tg-tinker registry check` tells what is missing, and `tg-tinker registry accept` goes"
        " on without it",
        details={"object": name, "row": head.seq, "last_row": end},
    )


def _check_booked(ledger: Ledger, head: LedgerHead, dataset: str) -> None:
    """`Ledger.check_place`, whose advice is to book what is missing: that was just tried."""
    try:
        ledger.check_place(head.place, dataset)
    except LedgerMismatchError as error:
        reason = (
            f"has {ledger.length} entries, entry {head.seq} is known, and the heads that are left"
            " do not reach from one to the other: put back those that were removed from the store"
            if error.details["behind"]
            else f"forked: its entry {head.seq} is not the one that is known. Two databases went on"
            " from one, and nothing can join them"
        )
        raise LedgerMismatchError(
            f"the ledger of data set {dataset!r} {reason}. Nothing was booked: put the newest copy"
            " of the database back, or go on with another data set",
            details=error.details,
        ) from None
