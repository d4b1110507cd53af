"""Signed heads of ledgers in the artifact store, out of reach of who puts a database back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from actors.registry.audit_log import SDK
from actors.registry.registry import Registry
from actors.storage.store import ArtifactStore, place_in
from tg_tinker.errors import LedgerMismatchError, StorageError, TGTinkerError
from tg_tinker.records.entries import parse_place
from tg_tinker.records.heads import LedgerHead

EVERY = 8
"""Charges of a run from one head in the store to the next."""

MOST = 512
"""Entries from before a charge that its result carries, at most, while the store fails."""

_log = logging.getLogger("tg_tinker")


def meet(
    registry: Registry, root: str, tenant: str, dataset: str, kept: Sequence[str] = (),
    who: str = SDK,
) -> int:  # fmt: skip
    """Holds a ledger against every head of it in the store, and against others that are kept.

    Of the heads in the store only those are read that the ledger does not go through. An object
    among them that is no head is passed over and told: anybody who can write there may put one.

    Args:
        kept: heads that the caller has, a line each.
        who: asks, for the audit log.

    Returns:
        The number of the newest entry that the store knows; -1 if it has no head.

    Raises:
        LedgerMismatchError: the ledger is behind a head, or another chain.
        IntegrityError: a head that the caller has is damaged.
        StorageError: the store does not answer: what it knows must not be passed over.
    """
    return _met(registry, ArtifactStore(root), tenant, dataset, kept, who)


def _met(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str, kept: Sequence[str],
    who: str,
) -> int:  # fmt: skip
    """`meet` of a store that is open."""
    names = store.ledger_heads(tenant, registry.ledger_name(tenant, dataset))
    places = {place_in(name) for name in names}
    unknown = set(registry.unknown_places(tenant, dataset, [*places]))
    found = _read(registry, store, tenant, dataset, [n for n in names if place_in(n) in unknown])
    registry.check_heads(tenant, dataset, [*found, *kept], who)
    return max((parse_place(place)[0] for place in places - unknown), default=-1)


def book_missing(
    registry: Registry, root: str, tenant: str, dataset: str, kept: Sequence[str] = ()
) -> int:
    """See `HeadChecks.book_missing`, from all heads in the store and others that are kept."""
    store = ArtifactStore(root)
    names = store.ledger_heads(tenant, registry.ledger_name(tenant, dataset))
    found = _read(registry, store, tenant, dataset, names)
    return registry.book_missing(tenant, dataset, [*found, *kept])


def _read(
    registry: Registry, store: ArtifactStore, tenant: str, dataset: str, names: Sequence[str]
) -> list[str]:
    """The heads among these objects; the others are told."""
    lines = {name: store.read_head(name) for name in names}
    problems = registry.no_heads(tenant, dataset, [*lines.values()]) if lines else {}
    for name, line in lines.items():
        if line in problems:
            _log.warning(
                "%s in the artifact store is passed over, remove it: %s", name, problems[line]
            )
    return [line for line in lines.values() if line not in problems]


class HeadKeeper:
    """Puts the heads of one run's ledger into the store, beside training.

    A store that does not answer holds up no step. What it misses goes with the next head. With
    each head that it writes it looks for those of others: two databases may be in use at once.

    Attributes:
        newest: the head after the last charge, a line; empty before the first.
        problem: why the store has no newer head; empty where all is well.
    """

    def __init__(
        self, registry: Registry, root: str, tenant: str, dataset: str, who: str
    ) -> None:  # fmt: skip
        self._registry, self._store = registry, ArtifactStore(root)
        self._who, self._ledger = who, (tenant, dataset)
        self._name = registry.ledger_name(tenant, dataset)
        self._stored = self._meet()
        self._charges = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-heads")
        self._writing: Future[None] | None = None
        self._mismatch: LedgerMismatchError | None = None
        self.newest, self.problem = "", ""

    def check(self) -> None:
        """Before each charge. Raises LedgerMismatchError once the store has another chain."""
        if self._mismatch is not None:
            raise self._mismatch.with_traceback(None)

    def charged(self) -> None:
        """After each charge. Never raises: the step is made."""
        with suppress(TGTinkerError):
            self.newest = self._registry.ledger_head(*self._ledger, self._after())
        due = self._charges % EVERY == 0
        if due and (self._writing is None or self._writing.done()):
            self._writing = self._writer.submit(self._write_or_tell)
        self._charges += 1

    def _after(self) -> int:
        """The entry after which a result has them: all that the store lacks, up to a bound."""
        last = LedgerHead.parse(self.newest).seq if self.newest else 0
        return max(self._stored, last - MOST)

    def keep(self, timeout_s: float | None = None) -> None:
        """Returns when the store has the present head.

        Raises:
            StorageError: it refuses.
            TimeoutError: it has not answered within `timeout_s`.
        """
        try:
            self._writer.submit(self._write).result(timeout_s)
        except StorageError as error:
            raise StorageError(
                f"the head of the ledger was not stored, training is not affected: {error.message}",
                details=error.details,
            ) from None

    def _write_or_tell(self) -> None:
        try:
            self._write()
        except TGTinkerError as error:
            self.problem = (
                "the artifact store did not take or show heads of the ledger, so an older database"
                f" would not be noticed by it: {error.message}"
            )
            _log.warning("%s", self.problem)

    def _write(self) -> None:
        head = LedgerHead.parse(self._registry.ledger_head(*self._ledger, self._stored))
        if head.seq > self._stored:
            self._store.write_ledger_head(head.tenant, self._name, head.place, head.line())
            self._stored = head.seq
        self._look()
        self.problem = ""

    def _look(self) -> None:
        """Only after writing: of two that write and look at once, one sees the other's head."""
        try:
            self._meet()
        except LedgerMismatchError as error:
            self._mismatch = error  # what is paid for may still be saved
            _log.warning("%s", error.message)

    def _meet(self) -> int:
        return _met(self._registry, self._store, *self._ledger, (), self._who)
