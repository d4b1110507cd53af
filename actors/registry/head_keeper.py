"""Signed heads of one ledger, put into the artifact store beside training: out of reach of who puts
a database back."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from actors.registry.registry import Registry
from actors.registry.rollback import meet_ledger
from actors.storage.store import ArtifactStore
from tg_tinker.errors import LedgerMismatchError, StorageError, TGTinkerError
from tg_tinker.records.heads import LedgerHead

EVERY = 8
"""Charges of a run from one head in the store to the next."""

MOST = 512
"""Entries from before a charge that its result carries, at most, while the store fails."""

_log = logging.getLogger("tg_tinker")


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
        self._name = registry.heads.ledger_name(tenant, dataset)
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
            self.newest = self._registry.heads.ledger_head(*self._ledger, self._after())
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
        head = LedgerHead.parse(self._registry.heads.ledger_head(*self._ledger, self._stored))
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
        return meet_ledger(self._registry, self._store, *self._ledger, who=self._who)
