"""The newest head of a data set's ledger that this home has seen, kept for the next process."""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tg_tinker.errors import IntegrityError, StorageError
from tg_tinker.records.files import keep_line
from tg_tinker.records.heads import LedgerHead

_log = logging.getLogger("tg_tinker")


class KeptHead:
    """One head in one file. Any thread may call, and other processes may keep theirs there.

    Attributes:
        newest: None before the first.
    """

    def __init__(self, home: Path, tenant: str, dataset: str) -> None:
        self._path = home / "ledger-heads" / tenant / f"{dataset}.json"
        self._lock = threading.Lock()
        self.newest = self._read()

    @property
    def place(self) -> str:
        """``SEQ-HASH`` of its entry; empty before the first."""
        return self.newest.place if self.newest else ""

    @property
    def lines(self) -> list[str]:
        """The head as a line, if there is one."""
        return [self.newest.line()] if self.newest else []

    def saw(self, line: str) -> None:
        """Remembers a head that is newer than the one it has and than the file's, durably."""
        head = LedgerHead.parse(line)
        with self._lock:
            if self.newest is not None and head.seq <= self.newest.seq:
                return
            self.newest = head
            try:
                with self._alone():
                    self._keep(head)
            except (OSError, StorageError, IntegrityError) as error:
                # The step is made and charged: its result must not be lost over this.
                _log.warning("cannot keep the ledger's head in %s: %s", self._path, error)

    def _keep(self, head: LedgerHead) -> None:
        kept = self._read()  # another client of the data set may have seen more
        if kept is None or kept.seq < head.seq:
            keep_line(self._path, head.line())
        else:
            self.newest = kept

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other thread or process is in here for this file."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._path.with_name(f".{self._path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            yield

    def _read(self) -> LedgerHead | None:
        try:
            return LedgerHead.parse(self._path.read_text("ascii").removesuffix("\n"))
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            raise IntegrityError(f"{self._path} is damaged: put its backup back") from None
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror}") from None
