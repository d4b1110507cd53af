"""Ledgers against the heads that are known of them: an older or another database is noticed.

A head that the store or a home keeps must lie on the ledger's chain. If it does not, nothing may
be charged. Heads carry the entries before them, sealed for this registry alone: so the end of a
ledger that was lost with its database can be put back, entry by entry.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from actors.registry.audit_log import SDK
from actors.registry.ledgers import Budgets
from tg_tinker.errors import IntegrityError, LedgerMismatchError
from tg_tinker.records.entries import CHAIN, Entry, is_place
from tg_tinker.records.heads import LedgerHead
from tg_tinker.records.ledger import Ledger
from tg_tinker.storage.envelope import context_of, derive_key, public_key_of, seal, unseal

_NAME, _ENTRIES = "ledger pseudonym", "ledger entries"


class HeadChecks(Budgets):
    """The part of the registry that states heads of ledgers and holds ledgers against them."""

    def ledger_name(self, tenant: str, dataset: str) -> str:
        """A ledger's pseudonym, 64 hex digits: the store shall not learn names of data sets.

        Made from the signing key, which never changes: not from the database, which may be the
        one that lost the data set, nor from the keyring, which rotates.
        """
        return self._ledger_key(tenant, dataset, _NAME).hex()

    def ledger_head(self, tenant: str, dataset: str, after: int) -> str:
        """The present head of a ledger as a line, with its entries after entry `after`."""
        with self._reading() as connection:
            ledger = self._known(connection, tenant, dataset)
            entries = self._stored(connection, tenant, dataset, after)
        key, context = self._sealing(tenant, dataset)
        sealed = base64.b64encode(seal(key, json.dumps(entries).encode(), context)).decode()
        name, now = self.ledger_name(tenant, dataset), datetime.now(UTC).isoformat()
        head = LedgerHead(tenant, name, ledger.length - 1, ledger.head, now, sealed)
        return head.signed(self._signing_key).line()

    def unknown_places(self, tenant: str, dataset: str, places: Sequence[str]) -> list[str]:
        """Those places, ``SEQ-HASH``, that the ledger does not go through, or that are none."""
        with self._reading() as connection:
            ledger = self._ledger(connection, tenant, dataset)
        return [place for place in places if not (is_place(place) and ledger.goes_through(place))]

    def no_heads(self, tenant: str, dataset: str, lines: Sequence[str]) -> dict[str, str]:
        """Those lines that are not heads of this ledger, signed here, and why they are not."""
        problems = {}
        for line in lines:
            try:
                self._authentic(tenant, dataset, [line])
            except IntegrityError as error:
                problems[line] = error.message
        return problems

    def lost_ledgers(self, tenant: str, lines: Sequence[str]) -> list[str]:
        """Pseudonyms of ledgers of a tenant that there are heads of, signed here, among these."""
        found, public_key = set(), public_key_of(self._signing_key)
        for line in lines:
            with suppress(IntegrityError):
                head = LedgerHead.parse(line)
                head.check(public_key)
                found |= {head.ledger} if head.tenant == tenant else set()
        return sorted(found)

    def check_heads(self, tenant: str, dataset: str, lines: Sequence[str], who: str = SDK) -> None:
        """Refuses a ledger that does not go through these heads of it.

        Raises:
            LedgerMismatchError: it is behind one of them, or another chain.
            IntegrityError: a head is damaged, of another ledger, or not signed here.
        """
        with self._refusals_noted(tenant, who, "ledger.check", dataset):
            heads = self._authentic(tenant, dataset, lines)
            self._check_places(tenant, {dataset: [head.place for head in heads]})

    def check_lineage(
        self, tenant: str, places: Mapping[str, str], artifact_id: str, who: str = SDK
    ) -> None:
        """Refuses an artifact whose ledgers were further than they are now, or other ones.

        Args:
            places: where each ledger ended when the artifact was saved, by data set.

        Raises:
            LedgerMismatchError: see `check_heads`.
        """
        with self._refusals_noted(tenant, who, "artifact.load", artifact_id):
            self._check_places(tenant, {dataset: [place] for dataset, place in places.items()})

    def book_missing(self, tenant: str, dataset: str, lines: Sequence[str]) -> int:
        """Puts the lost end of a ledger back from heads; how many of its charges.

        Every entry is the lost one to the byte, so nothing is charged twice and nothing less than
        was spent. Runs that appear in them are closed: which units they used is not in a ledger.

        Raises:
            LedgerMismatchError: an entry before one of the heads is in none of them, or the
                ledger went on from an earlier one; nothing was changed.
            IntegrityError: see `check_heads`; nothing was changed.
        """
        with (
            self._refusals_noted(tenant, SDK, "budget.book", dataset),
            self._change() as tx,
        ):
            heads = self._authentic(tenant, dataset, lines)
            entries = [entry for head in heads for entry in self._entries(dataset, head)]
            following = {entry["prev"]: entry for entry in entries}
            ledger = self._ledger(tx, tenant, dataset)
            if not ledger.length and ledger.head in following:
                self._new_dataset(tx, tenant, dataset)
            booked: list[Entry] = []
            while (lost := following.get(ledger.head)) is not None:
                body = {name: value for name, value in lost.items() if name not in CHAIN}
                booked.append(self._append(tx, tenant, dataset, ledger, body, SDK))
            for head in heads:  # also finds an entry that came out otherwise than it was
                _check_booked(ledger, head, dataset)
            if runs := sorted({entry["run"] for entry in booked if "run" in entry}):
                body = {"type": "book", "runs": runs}
                self._append(tx, tenant, dataset, ledger, body, SDK)
            return sum(entry["type"] in ("charge", "unnoised") for entry in booked)

    # --- inside ------------------------------------------------------------------------------

    def _authentic(self, tenant: str, dataset: str, lines: Sequence[str]) -> list[LedgerHead]:
        """Heads of this ledger that were signed here."""
        heads, public_key = [LedgerHead.parse(line) for line in lines], None
        for head in heads:
            public_key = public_key or public_key_of(self._signing_key)
            head.check(public_key)
            if (head.tenant, head.ledger) != (tenant, self.ledger_name(tenant, dataset)):
                raise IntegrityError(
                    f"a head that is kept for data set {dataset!r} is of another ledger: it was"
                    " moved here"
                )
        return heads

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
