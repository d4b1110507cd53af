"""Compares ledgers and audit logs with the signed heads that stores and homes keep.

In this way an older or a different database is detected before it charges, opens, saves or removes
anything. A head that a store or a home keeps must be on the chain it belongs to. A restored copy of
the database uses the same signing key, so only heads that were signed here are evidence: anybody
who can write to the store can put other objects there. A head of a ledger carries the entries
before it, sealed for this registry alone. With them, the end of a ledger that was lost with its
database can be restored, entry by entry.

Where a call takes a `dataset`, the chain is the ledger of that dataset. None means the audit log of
the tenant.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

from actors.registry.audit_log import SDK, AuditLog, AuditWriter
from actors.registry.book import Book
from actors.registry.database import Database
from actors.registry.lookups import owned
from actors.registry.schema import ARTIFACTS
from actors.storage.secrets import ENTRIES, PSEUDONYMS, Secrets
from actors.storage.signing import SigningKey
from actors.storage.store import MOST_OF_A_HEAD, ArtifactStore, place_in
from tg_tinker.errors import AccessDeniedError, IntegrityError, LedgerMismatchError, RollbackError
from tg_tinker.records.audit_log import ACCEPT
from tg_tinker.records.entries import CHAIN, PAID, Entry, is_place, parse_place, place_of
from tg_tinker.records.heads import AuditHead, LedgerHead, SignedHead
from tg_tinker.records.ledger import Ledger
from tg_tinker.storage.envelope import context_of, seal, unseal

_Head = TypeVar("_Head", bound=SignedHead)

InTurn = Callable[[Callable[[], Any]], Any]
"""Runs work that uses the database among the other calls of the registry. A store may be slow, so
it is read outside of them."""

_NAME, _ENTRIES = "ledger pseudonym", "ledger entries"
_REPLACED = (
    "a signing key signed this head that was replaced since: whoever has the old key may have made"
    " it after the rotation. Remove it"
)


class Heads:
    """The part of the registry that signs heads of ledgers, and compares all chains with heads."""

    def __init__(
        self, database: Database, writer: AuditWriter, audit_log: AuditLog, book: Book,
        signing: SigningKey, secrets: Secrets,
    ) -> None:  # fmt: skip
        self._database, self._writer = database, writer
        self._audit_log, self._book = audit_log, book
        self._signing, self._secrets = signing, secrets
        self._open_store = ArtifactStore
        self._in_turn: InTurn = lambda work: work()
        # Only in memory: a new process, which may have a restored database, compares again.
        self._met: set[tuple[str, str]] = set()

    # --- any chain ---------------------------------------------------------------------------

    def unknown(self, tenant: str, dataset: str | None, places: Sequence[str]) -> list[str]:
        """Returns the head positions, ``SEQ-HASH``, that are not on the chain and whose loss is not
        accepted. Malformed positions are among them."""
        if dataset is None:
            return self._audit_log.unknown(tenant, places)
        with self._database.reading() as connection:
            ledger = self._book.ledger(connection, tenant, dataset)
        return [place for place in places if not (is_place(place) and ledger.goes_through(place))]

    def judge(
        self, tenant: str, dataset: str | None, lines: Mapping[str, str], newest: str = ""
    ) -> tuple[dict[str, SignedHead], dict[str, str]]:
        """Returns the authentic heads of this chain that it does not contain, and the reasons why
        other objects are no heads of it; both by name of the object.

        A head that a replaced signing key signed counts only as long as the same store has no head
        by the key of today: whoever has the replaced key may have made it since.

        Args:
            lines: The contents of objects of one store.
            newest: The content of the newest object of that store that may be a head of what the
                chain contains; if a ledger has none, of what the audit log contains.
        """
        heads, others = self._sorted(tenant, dataset, lines)
        places = [head.place for head in heads.values()]
        unknown = set(self.unknown(tenant, dataset, places)) if places else set()
        found = {name: head for name, head in heads.items() if head.place in unknown}
        of_today = self._by_newest(found.values())
        if len(of_today) < len(found) and (of_today or self._is_of_today(tenant, newest)):
            others |= {name: _REPLACED for name, head in found.items() if head not in of_today}
        return {name: head for name, head in found.items() if name not in others}, others

    def strangers(
        self, tenant: str, dataset: str | None, lines: Mapping[str, str]
    ) -> dict[str, str]:  # fmt: skip
        """Returns the reasons why objects are no heads of this chain by any key that this home ever
        had, by name."""
        return self._sorted(tenant, dataset, lines)[1]

    def meet_ledger(
        self, tenant: str, dataset: str, lines: Mapping[str, str], kept: Sequence[str] = (),
        who: str = SDK, newest: str = "",
    ) -> dict[str, str]:  # fmt: skip
        """Compares a ledger with objects of a store that may be its heads, and with heads that the
        caller keeps.

        Args:
            lines: The contents of all objects whose names state a position that the ledger does not
                know, by name.
            kept: Heads of the ledger, one line each.
            who: The name of the caller, for the audit log.
            newest: See `judge`.

        Returns:
            The reasons why objects are no heads of this ledger, by name. These objects are ignored.

        Raises:
            LedgerMismatchError: The ledger is behind one of the heads, or is another chain.
            IntegrityError: A kept head is damaged, belongs to another ledger, or was not signed
                here.
        """
        with self._writer.refusals(tenant, who, "ledger.check", dataset):
            held = [self._authentic(tenant, dataset, line) for line in kept]
            missing, others = self.judge(tenant, dataset, lines, newest)
            self._check_places(tenant, {dataset: [h.place for h in [*missing.values(), *held]]})
        return others

    # --- the audit log -----------------------------------------------------------------------

    def meet_store(self, tenant: str, store: str, who: str = SDK) -> dict[str, str]:
        """Compares the audit log with all its heads in a store, which from then on counts as
        compared. This process lists and reads the heads itself, so no caller can leave one out.

        Args:
            store: The root of the store.
            who: The name of the caller, for the audit log.

        Returns:
            The reasons why objects are no heads of this log, by name. These objects are ignored.

        Raises:
            RollbackError: One of the heads is not on the audit log.
            StorageError: The store does not answer, and the comparison must not be skipped.
        """
        there = self._open_store(store)
        names = {name: place_in(name) for name in there.audit_heads(tenant)}
        unknown = self._in_turn(lambda: set(self.unknown(tenant, None, [*names.values()])))
        lines = {
            name: there.read_head(name, MOST_OF_A_HEAD)
            for name, place in names.items()
            if place in unknown
        }
        known = [name for name, place in names.items() if place not in unknown]
        newest = ""
        if lines and known:  # It matters only beside heads that the log does not know.
            last = max(known, key=lambda name: parse_place(names[name])[0])
            newest = there.read_head(last, MOST_OF_A_HEAD)
        others: dict[str, str] = self._in_turn(
            lambda: self._hold(tenant, store, lines, newest, who)
        )
        return others

    def _hold(
        self, tenant: str, store: str, lines: Mapping[str, str], newest: str, who: str
    ) -> dict[str, str]:  # fmt: skip
        with self._writer.refusals(tenant, who, "registry.check", ""):
            missing, others = self.judge(tenant, None, lines, newest)
            end = self._writer.end(tenant)
            if missing:
                raise _rolled_back(*max(missing.items(), key=lambda item: item[1].seq), end[0])
        self._writer.reached[tenant] = end
        self._met.add((tenant, store))
        return others

    def met(self, tenant: str, store: str) -> bool:
        """Returns whether this process has compared the log with a store, and the log has lost no
        row that the process has seen."""
        reached = self._writer.reached.get(tenant)
        if reached is None or self._audit_log.unknown(tenant, [place_of(*reached)]):
            self._met = {one for one in self._met if one[0] != tenant}
            return False
        # Another process may have added rows.
        self._writer.reached[tenant] = max(reached, self._writer.end(tenant))
        return (tenant, store) in self._met

    def refuse_unmet(self, tenant: str, store: str) -> None:
        """Refuses a store with which the audit log was not compared. It is called where data keys
        are handed out, so that no caller can forget the comparison.

        Raises:
            AccessDeniedError: The log was not compared with the store.
        """
        if not self.met(tenant, store):
            raise AccessDeniedError(
                "the registry was not compared with the heads in this store since it started, or"
                " its database changed meanwhile: repeat the call"
            )

    def accept(self, tenant: str, lines: Sequence[str]) -> int:
        """Accepts the loss of the rows these heads attest: from now on the heads count as known.

        Returns:
            The number of the row that records this. If the log knows all heads, 0, and no row is
            added.

        Raises:
            IntegrityError: One of the lines is no head of this log.
        """
        with self._writer.refusals(tenant, SDK, ACCEPT, ""):
            places = {self._authentic(tenant, None, line).place for line in lines}
            if not (unknown := self._audit_log.unknown(tenant, [*places])):
                return 0
            with self._database.change() as tx:
                return self._writer.note_acceptance(tx, tenant, unknown)

    # --- ledgers -----------------------------------------------------------------------------

    def ledger_name(self, tenant: str, dataset: str) -> str:
        """Returns the pseudonym of a ledger, 64 hex digits: the store must not learn the names of
        datasets.

        The pseudonym is derived from a secret that is in no database, because the database may be
        the one that lost the dataset.
        """
        return self.ledger_names(tenant, dataset)[0]

    def ledger_names(self, tenant: str, dataset: str) -> list[str]:
        """Returns all pseudonyms under which a store may have heads of a ledger, the newest
        first."""
        purpose = context_of(tenant, dataset, _NAME)
        return [key.hex() for key in self._secrets.keys(PSEUDONYMS, purpose).values()]

    def ledger_head(self, tenant: str, dataset: str, after: int) -> str:
        """Returns the current head of a ledger as one line, with the entries after entry
        `after`."""
        with self._database.reading() as connection:
            ledger = self._book.known(connection, tenant, dataset)
            entries = self._book.stored(connection, tenant, dataset, after)
        context = context_of(tenant, dataset, _ENTRIES)
        key = self._secrets.newest(ENTRIES, context)
        sealed = base64.b64encode(seal(key, json.dumps(entries).encode(), context)).decode()
        name, now = self.ledger_name(tenant, dataset), datetime.now(UTC).isoformat()
        head = LedgerHead(tenant, name, ledger.length - 1, ledger.head, now, sealed)
        return head.signed(self._signing.private()).line()

    def signed_again(self, tenant: str, dataset: str, line: str) -> str:
        """Returns a head that the ledger goes through, signed by the signing key of today.

        Raises:
            IntegrityError: The line is no such head.
            LedgerMismatchError: The ledger does not go through it.
        """
        head = self._ledger_head(tenant, dataset, line)
        self._check_places(tenant, {dataset: [head.place]})
        return head.signed(self._signing.private()).line()

    def lost_ledgers(self, tenant: str, lines: Sequence[str]) -> list[str]:
        """Returns the pseudonyms of those ledgers of a tenant that have a head, signed here, among
        these lines."""
        found, publics = set(), self._signing.publics()
        for line in lines:
            with suppress(IntegrityError):
                head = LedgerHead.parse(line)
                head.check(*publics)
                found |= {head.ledger} if head.tenant == tenant else set()
        return sorted(found)

    def check_lineage(
        self, tenant: str, places: Mapping[str, str], artifact_id: str, who: str = SDK
    ) -> None:
        """Refuses an artifact whose ledgers were ahead of the current ones, or have forked.

        Args:
            places: The position at which each ledger ended when the artifact was saved, by dataset.

        Raises:
            LedgerMismatchError: See `meet_ledger`.
        """
        with self._database.reading() as connection:
            found = owned(connection, ARTIFACTS, tenant, artifact_id)
        subject = "" if found is None else artifact_id
        with self._writer.refusals(tenant, who, "artifact.load", subject):
            self._check_places(tenant, {dataset: [place] for dataset, place in places.items()})

    def book_missing(self, tenant: str, dataset: str, lines: Sequence[str]) -> int:
        """Restores the lost end of a ledger from heads, and returns the number of restored charges.

        Every restored entry equals the lost entry to the byte. Therefore nothing is charged twice,
        and no less is charged than was spent. Runs that appear in restored entries are closed,
        because a ledger does not record which units they used.

        Raises:
            LedgerMismatchError: An entry before one of the heads is in none of the heads, or the
                ledger has forked; nothing was changed.
            IntegrityError: See `meet_ledger`; nothing was changed.
        """
        with (
            self._writer.refusals(tenant, SDK, "budget.book", dataset),
            self._database.change() as tx,
        ):
            heads = [self._ledger_head(tenant, dataset, line) for line in lines]
            of_today = self._by_newest(heads)
            ordered = [*(head for head in heads if head not in of_today), *of_today]
            entries = [entry for head in ordered for entry in self._entries(dataset, head)]
            following = {entry["prev"]: entry for entry in entries}
            # Whoever has a replaced key could add charges behind the last head that counts.
            heads = of_today or heads
            end = max((head.seq for head in heads), default=-1)
            ledger = self._book.ledger(tx, tenant, dataset)
            if not ledger.length and ledger.head in following:
                self._book.new_dataset(tx, tenant, dataset)
            booked: list[Entry] = []
            while ledger.length <= end and (lost := following.get(ledger.head)) is not None:
                body = {name: value for name, value in lost.items() if name not in CHAIN}
                booked.append(self._book.append(tx, tenant, dataset, ledger, body, SDK))
            # This also detects a restored entry that differs from the lost one.
            for head in heads:
                _check_booked(ledger, head, dataset)
            if runs := sorted({entry["run"] for entry in booked if entry.get("run")}):
                body = {"type": "book", "runs": runs}
                ledger = self._book.upgraded(tx, tenant, dataset, SDK)
                self._book.append(tx, tenant, dataset, ledger, body, SDK)
                # The lost database may have told draws of which no head knows.
                self._book.draw_keys.replace(tx, tenant, dataset)
            return sum(entry["type"] in PAID for entry in booked)

    # --- inside ------------------------------------------------------------------------------

    def _sorted(
        self, tenant: str, dataset: str | None, lines: Mapping[str, str]
    ) -> tuple[dict[str, SignedHead], dict[str, str]]:
        """Returns the authentic heads of this chain, and why other objects are none; by name."""
        heads: dict[str, SignedHead] = {}
        others: dict[str, str] = {}
        for name, line in lines.items():
            try:
                heads[name] = self._authentic(tenant, dataset, line)
            except IntegrityError as error:
                others[name] = error.message
        return heads, others

    def _is_of_today(self, tenant: str, line: str) -> bool:
        """Returns whether a line is a head of this tenant that the signing key of today signed."""
        for kind in (AuditHead, LedgerHead):
            with suppress(IntegrityError):
                head = kind.parse(line)
                head.check(self._signing.public())
                return head.tenant == tenant
        return False

    def _authentic(self, tenant: str, dataset: str | None, line: str) -> SignedHead:
        """Returns a head of this chain that was signed here. Raises IntegrityError for anything
        else."""
        if dataset is None:
            return AuditHead.authentic(line, tenant, *self._signing.publics())
        return self._ledger_head(tenant, dataset, line)

    def _ledger_head(self, tenant: str, dataset: str, line: str) -> LedgerHead:
        head = LedgerHead.parse(line)
        head.check(*self._signing.publics())
        if head.tenant != tenant or head.ledger not in self.ledger_names(tenant, dataset):
            raise IntegrityError(
                f"a head that is kept for dataset {dataset!r} belongs to another ledger: it was"
                " moved here"
            )
        return head

    def _check_places(self, tenant: str, known: Mapping[str, Iterable[str]]) -> None:
        with self._database.reading() as connection:
            self._book.check_places(connection, tenant, known)

    def _entries(self, dataset: str, head: LedgerHead) -> list[Entry]:
        context = context_of(head.tenant, dataset, _ENTRIES)
        newest, *older = self._secrets.keys(ENTRIES, context).values()
        sealed = base64.b64decode(head.entries)
        for key in older:
            with suppress(IntegrityError):
                return list[Entry](json.loads(unseal(key, sealed, context)))
        return list[Entry](json.loads(unseal(newest, sealed, context)))

    def _by_newest(self, heads: Iterable[_Head]) -> list[_Head]:
        """Returns those of these heads that the signing key of today signed."""
        found, public_key = [], self._signing.public()
        for head in heads:
            with suppress(IntegrityError):
                head.check(public_key)
                found.append(head)
        return found


def _rolled_back(name: str, head: SignedHead, end: int) -> RollbackError:
    where = "has another row there" if head.seq <= end else f"ends at row {end}"
    return RollbackError(
        f"the store has a head of row {head.seq} of the audit log of tenant {head.tenant}, {name},"
        f" but the log in this registry {where}: its database is an older copy, or another"
        " database was in use meanwhile."
        " Nothing was opened or changed. Restore the newest copy of the database. If that copy is"
        " lost, `tg-tinker registry check` lists what is missing, and `tg-tinker registry accept`"
        " continues without it",
        details={"object": name, "row": head.seq, "last_row": end},
    )


def _check_booked(ledger: Ledger, head: LedgerHead, dataset: str) -> None:
    """Runs `Ledger.check_place`, but gives other advice: `Ledger.check_place` advises to book what
    is missing, which has just failed."""
    try:
        ledger.check_place(head.place, dataset)
    except LedgerMismatchError as error:
        reason = (
            f"has {ledger.length} entries, but entry {head.seq} is known, and the remaining heads"
            " do not contain all entries between: restore the heads that were removed from the"
            " store"
            if error.details["behind"]
            else f"forked: its entry {head.seq} differs from the known one. Two copies of the"
            " database were changed separately, and nothing can join them"
        )
        raise LedgerMismatchError(
            f"the ledger of dataset {dataset!r} {reason}. Nothing was charged or changed: restore"
            " the newest copy of the database, or continue with another dataset",
            details=error.details,
        ) from None
