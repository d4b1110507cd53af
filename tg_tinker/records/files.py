"""Audit logs in files: an export (rows, then a signed head), and heads that somebody keeps.

Each line is canonical JSON, ASCII, ended by a line feed.
"""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from tg_tinker.errors import IntegrityError, InvalidRequestError, NotFoundError, StorageError
from tg_tinker.records.audit_log import AuditRow, empty, parse_rows, verify
from tg_tinker.records.heads import AuditHead, LedgerHead
from tg_tinker.storage.files import written

ROWS_AT_A_TIME = 1000


def paged(read: Callable[[int, int], list[AuditRow]]) -> Iterator[AuditRow]:
    """All rows of a log that is read by pages, as `ServiceClient.audit_log` does."""
    since = 0
    while page := read(since, ROWS_AT_A_TIME):
        yield from page
        since = page[-1].seq


def write_export(path: Path, rows: Iterable[AuditRow], head: AuditHead) -> None:
    """A new file; nothing is left of it when it cannot be completed.

    Raises:
        InvalidRequestError: there is a file already, or the folder does not allow one.
        StorageError: the disk is full.
    """
    try:
        file = path.open("x", encoding="ascii", newline="\n")
    except OSError as error:
        raise InvalidRequestError(f"cannot write {path}: {error.strerror}") from None
    try:
        with file:
            file.writelines(f"{row.line()}\n" for row in rows)
            file.write(f"{head.line()}\n")
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            raise StorageError(f"cannot write {path}: {error.strerror}") from None
        raise


def verify_export(path: Path, public_key: bytes, known: AuditHead | None = None) -> AuditHead:
    """The signed head of an export, all of whose rows hold; needs no service.

    Args:
        public_key: `audit.pub` of the home that signed it.
        known: a head that was kept before: the rows must go through it.

    Raises:
        NotFoundError: there is no such file.
        IntegrityError: names the first row that breaks, or the head that does not fit.
    """
    signed = read_head(path)
    signed.check(public_key)
    earlier = [] if known is None else [known]
    reached = verify(
        read_rows(path), since=empty(signed.tenant), known=[*earlier, signed], public_key=public_key
    )
    if reached.seq != signed.seq:
        raise IntegrityError(f"rows follow after row {signed.seq}, which the signed head is of")
    return replace(signed, since=known, accepted=reached.accepted)


def read_rows(path: Path) -> Iterator[AuditRow]:
    """The rows of an export; reading on may raise what `read_head` raises."""
    return parse_rows(line for line, _ in pairwise(_lines(path)))  # the last line is the head


def read_head(path: Path) -> AuditHead:
    """The signed head in the last line of an export, or of a file with nothing else.

    Raises:
        NotFoundError: there is no such file.
        IntegrityError: its last line is no signed head.
    """
    last = ""
    for line in _lines(path):
        last = line
    return AuditHead.parse(last)


def read_public_key(path: Path) -> bytes:
    """`audit.pub` of a home. Raises NotFoundError where there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(
            f"cannot read the public key {path}: {error.strerror}. `tg-tinker init` made it beside"
            " the keyring"
        ) from None


def keep_head(path: Path, head: AuditHead) -> None:
    """Remembers a head, durably."""
    keep_line(path, head.line())


def keep_line(path: Path, line: str) -> None:
    """A file of one line, durable: the old one stays until the new one is whole.

    Raises:
        StorageError: the disk is full or refuses.
    """
    try:
        with written(path, f"{line}\n".encode("ascii")) as partial:
            partial.replace(path)
    except OSError as error:
        raise StorageError(f"cannot keep a head in {path}: {error.strerror}") from None


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="ascii", newline="\n") as file:
            for line in file:
                if not line.endswith("\n"):
                    raise IntegrityError(f"{path} was cut short: its last line has no end")
                yield line[:-1]
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise IntegrityError(f"{path} is no audit log: it is not ASCII") from None


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
