"""Reads and writes audit logs and heads in files: exports, and heads that somebody keeps.

An export holds the rows and then a signed head. Each line is canonical JSON in ASCII and ends with
a line feed.
"""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from tg_tinker.errors import IntegrityError, InvalidRequestError, NotFoundError, StorageError
from tg_tinker.records.audit_log import AuditRow, empty, parse_rows, succession_of, verify
from tg_tinker.records.heads import AuditHead, LedgerHead
from tg_tinker.records.successions import SUCCEED, Signers, Succession
from tg_tinker.storage.files import new_file, written

ROWS_AT_A_TIME = 1000


def paged(read: Callable[[int, int], list[AuditRow]]) -> Iterator[AuditRow]:
    """Yields all rows of a log by reading it page by page, with `ServiceClient.audit_log`."""
    since = 0
    while page := read(since, ROWS_AT_A_TIME):
        yield from page
        since = page[-1].seq


def write_export(path: Path, rows: Iterable[AuditRow], head: AuditHead) -> None:
    """Writes an export as a new file; removes the file if it cannot be completed.

    Raises:
        InvalidRequestError: the file exists already, or cannot be created in its folder.
        StorageError: the rows cannot be written, for example because the disk is full.
    """
    try:
        with new_file(path) as file:
            file.writelines(f"{row.line()}\n".encode("ascii") for row in rows)
            file.write(f"{head.line()}\n".encode("ascii"))
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise InvalidRequestError(
            f"cannot write {path} ({error.strerror}): name a file that does not exist, in a folder"
            " that does"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


def verify_export(path: Path, public_key: bytes, known: AuditHead | None = None) -> AuditHead:
    """Verifies an export and returns its signed head. Needs no service.

    Args:
        public_key: `audit.pub` of the home that signed the export; an older one of this home
            counts too, if the log has the rows of the rotations since.
        known: a head that was kept before; the rows must go through it.

    Raises:
        NotFoundError: the file cannot be read.
        IntegrityError: a row or a head is wrong. The message names the first such row, or the
            head.
    """
    signed = read_head(path)
    signed.check(Signers(public_key, _successions(path)).at(signed.seq))
    earlier = [] if known is None else [known]
    reached = verify(
        read_rows(path), since=empty(signed.tenant), known=[*earlier, signed], public_key=public_key
    )
    if reached.seq != signed.seq:
        raise IntegrityError(f"rows follow after row {signed.seq}, the row of the signed head")
    return replace(signed, since=known, accepted=reached.accepted)


def _successions(path: Path) -> list[tuple[int, Succession]]:
    """Returns the rotations of the signing key in an export, each with the number of its row."""
    found = []
    for line in _lines(path):
        if SUCCEED in line:
            with suppress(IntegrityError):  # `verify` tells where a row is wrong
                row = AuditRow.parse(line)
                found += [(row.seq, step)] if (step := succession_of(row)) is not None else []
    return found


def read_rows(path: Path) -> Iterator[AuditRow]:
    """Yields the rows of an export. Raises what `read_head` and `parse_rows` raise."""
    return parse_rows(line for line, _ in pairwise(_lines(path)))  # the last line is the head


def read_head(path: Path) -> AuditHead:
    """Returns the signed head in the last line of an export, or of a file with only a head.

    Raises:
        NotFoundError: the file cannot be read.
        IntegrityError: the last line is no signed head, or the file is cut short or not ASCII.
    """
    last = ""
    for line in _lines(path):
        last = line
    return AuditHead.parse(last)


def read_public_key(path: Path) -> bytes:
    """Returns the contents of `audit.pub`. Raises NotFoundError if the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(
            f"cannot read the public key {path}: {error.strerror}. Pass the file audit.pub, which"
            " is beside the keyring file, or in the home directory for a keyring in the environment"
        ) from None


def keep_head(path: Path, head: AuditHead) -> None:
    """Writes a head to a file, durably.

    Raises:
        StorageError: see `keep_line`.
    """
    keep_line(path, head.line())


def keep_line(path: Path, line: str) -> None:
    """Writes a file of one line, durably. An old file stays until the new one is complete.

    Raises:
        StorageError: the file cannot be written, for example because the disk is full.
    """
    try:
        with written(path, f"{line}\n".encode("ascii")) as partial:
            partial.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write the head file {path}: {error.strerror}") from None


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="ascii", newline="\n") as file:
            for line in file:
                if not line.endswith("\n"):
                    raise IntegrityError(f"{path} was cut short: its last line is incomplete")
                yield line[:-1]
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise IntegrityError(f"{path} is not an audit log: it is not ASCII text") from None


_log = logging.getLogger("tg_tinker")


class KeptHead:
    """The newest known head of one ledger, kept in one file of the home.

    Any thread may call it. Other processes may keep their newest head in the same file.

    Attributes:
        newest: the newest head; None before the first one.
    """

    def __init__(self, home: Path, tenant: str, dataset: str) -> None:
        self._path = home / "ledger-heads" / tenant / f"{dataset}.json"
        self._lock = threading.Lock()
        self.newest = self._read()

    @property
    def place(self) -> str:
        """The position ``SEQ-HASH`` of the newest head; empty before the first one."""
        return self.newest.place if self.newest else ""

    @property
    def lines(self) -> list[str]:
        """The newest head as a list of one line; empty before the first one."""
        return [self.newest.line()] if self.newest else []

    def saw(self, line: str) -> None:
        """Keeps a head durably if it is newer than `newest` and than the head in the file.

        Logs a warning if the file cannot be written.
        """
        head = LedgerHead.parse(line)
        with self._lock:
            if self.newest is not None and head.seq <= self.newest.seq:
                return
            self.newest = head
            try:
                with self._alone():
                    self._keep(head)
            except (OSError, StorageError, IntegrityError) as error:
                # The step is done and charged: a failure to keep its head must not lose its result.
                _log.warning("cannot keep the ledger's head in %s: %s", self._path, error)

    def _keep(self, head: LedgerHead) -> None:
        kept = self._read()  # another client of the dataset may have kept a newer head
        if kept is None or kept.seq < head.seq:
            keep_line(self._path, head.line())
        else:
            self.newest = kept

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Excludes all other threads and processes that use this file."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._path.with_name(f".{self._path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held until the file is closed
            yield

    def _read(self) -> LedgerHead | None:
        try:
            return LedgerHead.parse(self._path.read_text("ascii").removesuffix("\n"))
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            raise IntegrityError(f"{self._path} is damaged: restore its backup") from None
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror}") from None
