"""What every store can do, and the local folder that does it.

A store keeps named objects: whole byte strings under names whose components are joined by `/`.
What the bytes mean, and that they are sealed, is not known here.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from tg_tinker.errors import IntegrityError, NotFoundError, StorageError
from tg_tinker.storage.files import sync
from tg_tinker.storage.stores import check_name, shown

Piece = bytes | bytearray | memoryview
Content = bytes | Iterable[Piece]
"""An object's bytes, whole or in pieces. A piece is used before the next one is asked for."""

SMALL = 2**20
"""Bytes. What is given whole and no larger is replaced in one step on every store but `hdfs`."""


WRITE_BACK = 32 * 2**20
"""Bytes of a file on a local disk after which the disk begins to write them."""


class ObjectInfo(NamedTuple):
    name: str
    size: int  # bytes
    modified: datetime  # UTC, by the store's clock


class Objects(Protocol):
    """Named objects in one place. Any thread may call; a repeated call does no harm.

    Every method raises InvalidRequestError for a name that is none (`check_name`), and
    StorageError, which says what to do, when the store refuses or does not answer.
    """

    def put(self, name: str, content: Content) -> int:
        """Writes an object durably, and returns its size in bytes, which the store confirmed.

        An object that exists is replaced: in one step on a local folder, and elsewhere if it is
        given whole and `SMALL`. What is larger or comes in pieces goes under a name of its own:
        when it fails, the name is removed as far as possible, and a crash may leave part of it.
        The pieces are gone through once per attempt; an iterator has one attempt only.
        """

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless there is one: False when there is, which stays as it was.

        Of several callers at once exactly one wins on a local folder. Elsewhere the library
        knows no conditional write (apache/arrow#44281): two that look at the same moment both
        write, and the later one's bytes stay.
        """

    def read(self, name: str, most: int | None = None) -> bytes:
        """The content, of which anybody who can write to the store may be the author.

        Args:
            most: bytes that it may have; more are not taken into memory.

        Raises:
            NotFoundError: there is none.
            IntegrityError: it is longer than `most`.
        """

    def size(self, name: str) -> int:
        """Bytes. Raises NotFoundError when there is none."""

    def list_below(self, folder: str = "") -> list[ObjectInfo]:
        """All objects below a folder at any depth, by name; none if there is no such folder.

        A name that `check_name` refuses, so none of ours, is told as text for a terminal (`shown`).
        Of a local folder only plain files are objects.

        On a local folder also what a killed `put` left, or one under way: the last component of
        such a name begins with a dot, and no other method takes it but `delete` and `delete_all`.
        """

    def list_folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder; none if there is no such folder."""

    def delete(self, name: str) -> None:
        """Removes an object, or what a killed `put` left; none there is fine."""

    def delete_all(self, folder: str) -> None:
        """Removes all objects below a folder; none there is fine."""


class LocalFolder:
    """Objects as files: written hidden, synchronised, renamed, the folder synchronised.

    Nothing is retried: after a failed fsync the pages may be gone (PostgreSQL, 2018), and a full
    disk stays full. Folders that it makes have mode 0700.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, content: Content) -> int:
        path = self._path(name)
        with _typed("write", name), self._written(path, content) as (partial, size):
            partial.replace(path)
            sync(path.parent)
        return size

    def create(self, name: str, content: bytes) -> bool:
        path = self._path(name)
        with _typed("write", name), self._written(path, content) as (partial, _):
            try:
                path.hardlink_to(partial)
            except FileExistsError:
                return False
            sync(path.parent)
        return True

    def read(self, name: str, most: int | None = None) -> bytes:
        path = self._path(name)
        with _typed("read", name), _opened(path) as file:
            return within(file.read(-1 if most is None else most + 1), name, most)

    def size(self, name: str) -> int:
        path = self._path(name)
        with _typed("read", name):
            _refuse_special(state := path.stat())
            return state.st_size

    def list_below(self, folder: str = "") -> list[ObjectInfo]:
        with _typed("list", folder or "its root"):
            return sorted(self._infos(self._path(folder) if folder else self._root))

    def list_folders(self, folder: str) -> list[str]:
        with _typed("list", folder), suppress(FileNotFoundError):
            found = self._path(folder).iterdir()
            return sorted(one.name for one in found if one.is_dir() and not one.is_symlink())
        return []

    def delete(self, name: str) -> None:
        check_name(intended(name))
        path = self._below(name)
        with _typed("delete", name), suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            sync(path.parent)

    def delete_all(self, folder: str) -> None:
        path = self._path(folder)
        with _typed("delete", folder), suppress(FileNotFoundError):
            for parent, folders, names in os.walk(path, topdown=False, onerror=_unless_gone):
                for name in [*names, *(n for n in folders if (Path(parent) / n).is_symlink())]:
                    (Path(parent) / name).unlink(missing_ok=True)
                Path(parent).rmdir()
            sync(path.parent)

    def _path(self, name: str) -> Path:
        return self._below(check_name(name))

    def _below(self, name: str) -> Path:
        """A link could lead out of the store: what is deleted or written would be another's."""
        path = self._root
        for part in name.split("/"):
            path = path / part
            if path.is_symlink():
                raise StorageError(
                    f"{path.relative_to(self._root)} in the store is a symbolic link, which nobody"
                    " here made: it is not followed. Look where it leads, and remove it"
                )
        return path

    def _infos(self, folder: Path) -> Iterator[ObjectInfo]:
        for parent, _, names in os.walk(folder, onerror=_unless_gone):
            for path in (Path(parent) / name for name in names):
                with suppress(FileNotFoundError):  # deleted or renamed meanwhile
                    state = path.lstat()
                    if stat.S_ISREG(state.st_mode):
                        name = shown(path.relative_to(self._root).as_posix())
                        modified = datetime.fromtimestamp(state.st_mtime, UTC)
                        yield ObjectInfo(name, state.st_size, modified)

    @contextmanager
    def _written(self, path: Path, content: Content) -> Iterator[tuple[Path, int]]:
        """A hidden, durable file beside `path` and its size; gone afterwards unless renamed."""
        _make_folder(path.parent)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        size = begun = 0
        try:
            with partial.open("xb") as file:
                for piece in pieces_of(content):
                    size += file.write(piece)
                    if size - begun >= WRITE_BACK:
                        _begin_write_back(file.fileno(), begun, size - begun)
                        begun = size
                file.flush()
                os.fsync(file.fileno())
            yield partial, size
        finally:
            partial.unlink(missing_ok=True)


def _begin_write_back(descriptor: int, start: int, length: int) -> None:
    """Has the system write what is in its cache while the next pieces are made, not at fsync only.

    Linux then drops from the cache what is written already: a saved file is rarely read soon.
    """
    with suppress(OSError, AttributeError):  # a hint; macOS has none
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _opened(path: Path) -> BinaryIO:
    """A file to read; what was put in its place waits for no writer."""
    _refuse_special(path.stat())
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")


def _refuse_special(state: os.stat_result) -> None:
    """A folder, a pipe, a socket or a device, which may have no end, is no object."""
    if not stat.S_ISREG(state.st_mode):
        raise FileNotFoundError


def within(content: bytes, name: str, most: int | None) -> bytes:
    """The content itself. Raises IntegrityError where it is longer than it may be."""
    if most is not None and len(content) > most:
        raise IntegrityError(
            f"{name} in the store is longer than what was put there ({most} bytes at most): put"
            " its backup back, or remove it"
        )
    return content


def intended(name: str) -> str:
    """The object that a `put` was about to write, of what it left when it was killed (`.NAME.x` on
    a local folder, `NAME.x` on Azure, x being 8 hex digits). Any other name is itself.
    """
    folder, slash, last = name.rpartition("/")
    partial = re.fullmatch(r"\.?(.+)\.[0-9a-f]{8}", last)
    return f"{folder}{slash}{partial[1]}" if partial else name


def pieces_of(content: Content) -> Iterable[Piece]:
    return [content] if isinstance(content, bytes) else content


def _make_folder(path: Path) -> None:
    """Each new folder is made durable in the one above it."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync(path.parent)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def _typed(action: str, name: str) -> Iterator[None]:
    """Errors of the disk become ours, without the paths of this machine."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if action == "read":
            raise NotFoundError(f"{name} is not in the store") from None
        raise _refusal(action, name, error) from None
    except OSError as error:
        raise _refusal(action, name, error) from None


def _refusal(action: str, name: str, error: OSError) -> StorageError:
    return StorageError(
        f"the store refused to {action} {name} ({error.strerror or type(error).__name__}): free"
        " or fix the disk and try again",
        details={"errno": error.errno},
    )
