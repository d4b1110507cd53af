"""Puts signed heads of one ledger into the artifact store while training runs.

Somebody who replaces the database, but cannot change the store, leaves these heads in place.
"""

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
"""The number of charges of a run from one head in the store to the next."""

MOST = 512
"""The largest number of earlier entries that the result of a charge carries while the store
fails."""

_log = logging.getLogger("tg_tinker")


class HeadKeeper:
    """A writer that puts the heads of one run's ledger into the store while the run trains.

    A store that does not answer delays no step. The next head carries the entries that the store
    has missed. With each head that it writes, the keeper also looks for the heads of others,
    because two databases may be in use at once.

    Attributes:
        newest: The head after the last charge, as one line; empty before the first charge.
        problem: Why the store has no newer head; empty if all is well.
    """

    def __init__(
        self, registry: Registry, root: str, tenant: str, dataset: str, who: str,
        every: int = EVERY,
    ) -> None:  # fmt: skip
        """Compares the ledger with the heads in the store.

        Args:
            every: The number of charges from one head in the store to the next.

        Raises:
            LedgerMismatchError: The ledger is behind a head in the store, or has forked.
        """
        self._registry, self._store = registry, ArtifactStore(root)
        self._who, self._ledger = who, (tenant, dataset)
        self._stored = self._meet()
        self._charges, self._every = 0, every
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-heads")
        self._writing: Future[None] | None = None
        self._mismatch: LedgerMismatchError | None = None
        self.newest, self.problem = "", ""

    def check(self) -> None:
        """Raises LedgerMismatchError once the store has shown a head of another chain. Call it
        before each charge."""
        if self._mismatch is not None:
            raise self._mismatch.with_traceback(None)

    def charged(self) -> None:
        """Keeps the head after a charge, and starts writing it if a write is due. Call it after
        each charge. Never raises: the step is already made."""
        with suppress(TGTinkerError):
            self.newest = self._registry.heads.ledger_head(*self._ledger, self._after())
        due = self._charges % self._every == 0
        if due and (self._writing is None or self._writing.done()):
            self._writing = self._writer.submit(self._write_or_tell)
        self._charges += 1

    def _after(self) -> int:
        """Returns the number of the entry after which a result carries entries: all that the store
        lacks, up to `MOST`."""
        last = LedgerHead.parse(self.newest).seq if self.newest else 0
        return max(self._stored, last - MOST)

    def keep(self, timeout_s: float | None = None) -> None:
        """Writes the current head, and returns when the store has it.

        Raises:
            StorageError: The store rejects the head.
            TimeoutError: The store has not answered within `timeout_s` seconds.
        """
        try:
            self._writer.submit(self._write).result(timeout_s)
        except StorageError as error:
            raise StorageError(
                f"the head of the ledger was not stored; training is not affected: {error.message}",
                details=error.details,
            ) from None

    def _write_or_tell(self) -> None:
        try:
            self._write()
        except TGTinkerError as error:
            self.problem = (
                "heads of the ledger could not be written to the artifact store or read there, so"
                f" the store would not reveal an older database: {error.message}"
            )
            _log.warning("%s", self.problem)

    def _write(self) -> None:
        head = LedgerHead.parse(self._registry.heads.ledger_head(*self._ledger, self._stored))
        if head.seq > self._stored:
            self._store.write_ledger_head(head.tenant, head.ledger, head.place, head.line())
            self._stored = head.seq
        self._look()
        self.problem = ""

    def _look(self) -> None:
        """Looks for the heads of others, always after writing: if two keepers write and look at
        once, at least one of them sees the head of the other."""
        try:
            self._meet()
        except LedgerMismatchError as error:
            # `check` raises it before the next charge: steps already paid for may still be saved.
            self._mismatch = error
            _log.warning("%s", error.message)

    def _meet(self) -> int:
        return meet_ledger(self._registry, self._store, *self._ledger, who=self._who)
