"""Stores ledgers in the database, replays them, extends them, and keeps the keys of their units.

`ledgers` decides which entries are allowed; this module stores them. Each call works within a
transaction of its caller.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence

import sqlalchemy as sa

from actors.registry.audit_log import SDK, AuditWriter
from actors.registry.draws import DrawKeys
from actors.registry.schema import DATASETS, ENTRIES
from actors.registry.uses import forget_units
from actors.storage.key_providers import KeyProvider
from actors.storage.keyring import parse_wrapped
from tg_tinker.errors import IntegrityError, NotFoundError
from tg_tinker.records.entries import UPGRADE, VERSION, Entry
from tg_tinker.records.ledger import Ledger
from tg_tinker.storage.envelope import context_of, new_key

_EVENTS = {
    "register": "dataset.register", "open": "budget.reserve", "charge": "budget.charge",
    "unnoised": "budget.charge", "fall_back": "budget.fall_back", "release": "budget.release",
    "link": "budget.link", "book": "budget.book", "draw": "budget.draw", "drop": "budget.drop",
    "evaluation": "budget.charge", "upgrade": "dataset.upgrade",
    "unit": "dataset.unit",
}  # fmt: skip
"""The event in the audit log for each type of ledger entry. Every entry has a row there."""

_NOTED = ("run", "epoch", "charge", "count", "limit", "planned", "position", "version")


class Book:
    """All ledgers of a database. A ledger is also kept in memory, and used as long as its head is
    the stored head."""

    def __init__(self, writer: AuditWriter, keyring: KeyProvider) -> None:
        self._writer, self._keyring = writer, keyring
        self.draw_keys = DrawKeys(keyring)
        # A cache: each use compares the head with the stored head.
        self._ledgers: dict[tuple[str, str], Ledger] = {}

    def ledger(self, connection: sa.Connection, tenant: str, dataset: str) -> Ledger:
        """Returns the ledger as stored: from memory if its head is the stored head, otherwise
        replayed."""
        last = (
            sa.select(ENTRIES.c.hash)
            .where(ENTRIES.c.tenant == tenant, ENTRIES.c.dataset == dataset)
            .order_by(ENTRIES.c.seq.desc())
            .limit(1)
        )
        head = connection.execute(last).scalar()
        cached = self._ledgers.get((tenant, dataset))
        if cached is None or head is None or cached.head != head:
            cached = Ledger.replay(self.stored(connection, tenant, dataset))
            self._ledgers[tenant, dataset] = cached
        return cached

    def known(self, connection: sa.Connection, tenant: str, dataset: str) -> Ledger:
        ledger = self.ledger(connection, tenant, dataset)
        if not ledger.length:
            raise NotFoundError(
                f"no dataset {dataset!r}: register it with service.register_dataset, or create a"
                " private client that names it"
            )
        return ledger

    def ahead(self, connection: sa.Connection, tenant: str, dataset: str) -> Ledger:
        """Returns a known ledger by the rules of its next entry: an older ledger is upgraded in a
        copy, and nothing is stored."""
        ledger = self.known(connection, tenant, dataset)
        if ledger.version < VERSION:
            ledger = copy.deepcopy(ledger)
            ledger.append(UPGRADE)
        return ledger

    def upgraded(self, tx: sa.Connection, tenant: str, dataset: str, who: str) -> Ledger:
        """Returns a known ledger to which an entry is about to be added. An older ledger is
        upgraded first, in this transaction."""
        ledger = self.known(tx, tenant, dataset)
        if ledger.version < VERSION:
            self.append(tx, tenant, dataset, ledger, UPGRADE, who)
        return ledger

    def stored(
        self, connection: sa.Connection, tenant: str, dataset: str, after: int = -1
    ) -> list[Entry]:
        query = (
            sa.select(ENTRIES.c.entry)
            .where(ENTRIES.c.tenant == tenant, ENTRIES.c.dataset == dataset)
            .where(ENTRIES.c.seq > after)
            .order_by(ENTRIES.c.seq)
        )
        return [json.loads(text) for text in connection.execute(query).scalars()]

    def has(self, connection: sa.Connection, tenant: str, dataset: str, body: Entry) -> bool:
        """Returns whether the ledger has an entry with this content."""
        wanted = json.loads(json.dumps(body))
        return any(found | wanted == found for found in self.stored(connection, tenant, dataset))

    def append(
        self, tx: sa.Connection, tenant: str, dataset: str, ledger: Ledger, body: Entry, who: str
    ) -> Entry:
        """Applies an entry, stores it, adds its audit row, and returns the entry. If the
        transaction fails later, the ledger in memory is ahead of the stored head, and the next use
        replays it. The draw key moves to the ledger's position in the same transaction, and units
        that are no units any more are forgotten."""
        position = ledger.position
        entry = ledger.append(body)
        if entry["type"] == "unit":
            forget_units(tx, tenant, dataset)
        if ledger.position != position:
            self.draw_keys.advance(tx, tenant, dataset, ledger.position)
        tx.execute(
            ENTRIES.insert().values(
                tenant=tenant, dataset=dataset, seq=entry["seq"], hash=entry["hash"],
                entry=json.dumps(entry),
            )
        )  # fmt: skip
        details = {name: entry[name] for name in _NOTED if entry.get(name) is not None}
        details |= {"entry": entry["seq"], "head": entry["hash"]}
        if entry["type"] == "unnoised":
            details["noised"] = 0
        self._writer.note(tx, tenant, who, _EVENTS[entry["type"]], dataset, details)
        return entry

    def new_dataset(self, tx: sa.Connection, tenant: str, dataset: str) -> None:
        """Stores a new dataset with a fresh key for the hashes of its units."""
        key = self._keyring.wrap(new_key(), context_of(tenant, dataset, "unit key"))
        values = {"tenant": tenant, "id": dataset, "wrapped_key": json.dumps(key)}
        tx.execute(DATASETS.insert().values(values))

    def release(self, tx: sa.Connection, tenant: str, dataset: str, run_id: str) -> None:
        """Releases what a run reserved and has not used; nothing happens if nothing is left."""
        now = self.ledger(tx, tenant, dataset)
        account = now.accounts.get(run_id)
        # A run that counts uses holds its plan for each unit, however often one of them was used.
        used = 0 if account is None or now.counts_uses(account) else account.count
        if account is not None and account.reserved > used:
            ledger = self.upgraded(tx, tenant, dataset, SDK)
            self.append(tx, tenant, dataset, ledger, {"type": "release", "run": run_id}, SDK)

    def unit_key(self, connection: sa.Connection, tenant: str, dataset: str) -> bytes:
        query = sa.select(DATASETS.c.wrapped_key).where(
            DATASETS.c.tenant == tenant, DATASETS.c.id == dataset
        )
        wrapped = parse_wrapped(connection.execute(query).scalar_one().encode())
        return self._keyring.unwrap(wrapped, context_of(tenant, dataset, "unit key"))

    def evidence(
        self, tx: sa.Connection, tenant: str, dataset: str, run_id: str,
        calls: Sequence[tuple[str, str]],
    ) -> str:  # fmt: skip
        """Returns HMACs of a step's hashes under a key of the run. A plain hash would let whoever
        reads the database test membership."""
        key = hmac.digest(self.unit_key(tx, tenant, dataset), run_id.encode(), hashlib.sha256)
        sealed = [
            [hmac.new(key, part.encode(), hashlib.sha256).hexdigest() for part in call]
            for call in calls
        ]
        return json.dumps(sealed)

    def check_places(
        self, connection: sa.Connection, tenant: str, known: Mapping[str, Iterable[str]]
    ) -> None:
        """Refuses head positions, by dataset, that are not on the chain of that dataset's
        ledger."""
        for dataset, places in known.items():
            ledger = self.ledger(connection, tenant, dataset)
            for place in places:
                ledger.check_place(place, dataset)

    def rewrap_unit_keys(self, tx: sa.Connection) -> dict[str, str]:
        """Wraps the keys of all datasets under the keyring's primary key. A key that cannot be
        unwrapped stays as it is. Returns the reason for each of these keys, by ``dataset
        TENANT/NAME``."""
        problems = {}
        for row in tx.execute(sa.select(DATASETS)).all():
            context = context_of(row.tenant, row.id, "unit key")
            this = (DATASETS.c.tenant == row.tenant, DATASETS.c.id == row.id)
            try:
                key = self._keyring.unwrap(parse_wrapped(row.wrapped_key.encode()), context)
                self.draw_keys.rewrap(tx, row)
            except IntegrityError as error:
                problems[f"dataset {row.tenant}/{row.id}"] = error.message
            else:
                again = json.dumps(self._keyring.wrap(key, context))
                tx.execute(DATASETS.update().where(*this).values(wrapped_key=again))
        return problems
