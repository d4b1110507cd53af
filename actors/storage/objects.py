"""The interface of every store, and the local folder that implements it.

A store keeps named objects: whole byte strings under names whose components are joined by `/`. This
module does not know what the bytes mean, or that they are sealed.
"""

from __future__ import annotations

import errno
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
"""The bytes of an object, whole or in pieces. A piece is used before the next one is requested."""

SMALL = 2**20
"""Bytes. Content that is given whole and is no larger is replaced in one step on every store but
`hdfs`."""


WRITE_BACK = 32 * 2**20
"""Bytes of a file on a local disk after which the system is asked to write them to the disk."""


_OWN = "check that this user may enter the folder of the store, and owns what is in it"
_REMEDIES = {
    errno.ENOSPC: "free space on the disk of the store",
    errno.EDQUOT: "have this user's quota on the disk raised, or free space",
    errno.EACCES: _OWN,
    errno.EPERM: _OWN,
    errno.EROFS: "mount the disk for writing, which is read-only now",
    errno.EIO: "check the disk, which does not read or write some of its parts",
    errno.ESTALE: "mount the network disk of the store again",
    errno.EMFILE: "raise the number of files that this user may open (ulimit -n)",
}
"""What to do about an error of a disk."""


class ObjectInfo(NamedTuple):
    name: str
    size: int  # bytes
    modified: datetime  # UTC, by the store's clock


class Objects(Protocol):
    """Named objects in one location. Any thread may call the methods; a repeated call does no harm.

    Every method raises InvalidRequestError for a name that `check_name` refuses. It raises
    StorageError, which says what to do, when the store fails or does not answer.
    """

    def put(self, name: str, content: Content) -> int:
        """Writes an object durably, and returns its size in bytes, which the store has confirmed.

        An existing object is replaced. The replacement is one step on a local folder, and on other
        stores if the content is given whole and is at most `SMALL`. Larger content, and content in
        pieces, must go under a name of its own: after a failure the name is removed as far as
        possible, and a crash may leave part of the object. Each attempt iterates over the pieces
        once; an iterator therefore allows one attempt only.
        """

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless it exists. Returns False if it exists; that object stays as it
        was.

        If several callers create an object at once on a local folder, exactly one of them succeeds.
        On other stores the library has no conditional write (apache/arrow#44281): two callers that
        look at the same moment both write, and the bytes of the later one stay.
        """

    def read(self, name: str, most: int | None = None) -> bytes:
        """Returns the content, which anybody who can write to the store may have written.

        Args:
            most: The largest number of bytes allowed. No more than one byte above it is read into
                memory.

        Raises:
            NotFoundError: The object does not exist.
            IntegrityError: The object is longer than `most`.
        """

    def size(self, name: str) -> int:
        """Returns the size in bytes. Raises NotFoundError if the object does not exist."""

    def list_below(self, folder: str = "") -> list[ObjectInfo]:
        """Returns all objects below a folder at any depth, sorted by name; none if the folder does
        not exist.

        A name that `check_name` refuses, and that TG-Tinker therefore never gave, is returned as
        text that is safe for a terminal (`shown`). In a local folder only plain files are objects.

        In a local folder the list includes what a killed `put` left, or what a running `put`
        writes. The last component of such a name begins with a dot. Only `delete` and `delete_all`
        accept such a name.
        """

    def list_folders(self, folder: str) -> list[str]:
        """Returns the names of the folders directly in a folder; none if the folder does not
        exist."""

    def delete(self, name: str) -> None:
        """Removes an object, or what a killed `put` left of it. Does nothing if the object does not
        exist."""

    def delete_all(self, folder: str) -> None:
        """Removes all objects below a folder. Does nothing if there are none."""


class LocalFolder:
    """Objects as files: each is written under a hidden name, synchronized and renamed, and then its
    folder is synchronized.

    Nothing is retried: after a failed fsync the pages may be lost (PostgreSQL, 2018), and a full
    disk stays full. New folders have mode 0700, files 0600.
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
        """Returns the path of a name. Refuses a symbolic link, which could lead out of the store: a
        write or a deletion would then hit other files."""
        path = self._root
        for part in name.split("/"):
            path = path / part
            if path.is_symlink():
                raise StorageError(
                    f"{path.relative_to(self._root)} in the store is a symbolic link, which"
                    " TG-Tinker never makes: it is not followed. Look where it leads, and remove it"
                )
        return path

    def _infos(self, folder: Path) -> Iterator[ObjectInfo]:
        for parent, _, names in os.walk(folder, onerror=_unless_gone):
            for path in (Path(parent) / name for name in names):
                # The file may be deleted or renamed meanwhile.
                with suppress(FileNotFoundError):
                    state = path.lstat()
                    if stat.S_ISREG(state.st_mode):
                        name = shown(path.relative_to(self._root).as_posix())
                        modified = datetime.fromtimestamp(state.st_mtime, UTC)
                        yield ObjectInfo(name, state.st_size, modified)

    @contextmanager
    def _written(self, path: Path, content: Content) -> Iterator[tuple[Path, int]]:
        """Yields a hidden, durable file beside `path`, and its size. The file is removed afterwards
        unless it was renamed."""
        _make_folder(path.parent)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        size = begun = 0
        try:
            with partial.open("xb") as file:
                # Whatever the umask of the program: the folder may be older, and open.
                os.fchmod(file.fileno(), 0o600)
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
    """Asks the system to write its cache to the disk while the next pieces are made, and not only
    at fsync.

    Linux then drops from its cache what is already written, because a saved file is rarely read
    soon.
    """
    # It is only a hint, which macOS does not have.
    with suppress(OSError, AttributeError):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _opened(path: Path) -> BinaryIO:
    """Opens a file for reading. If a pipe has replaced the file, opening does not wait for a
    writer."""
    _refuse_special(path.stat())
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")


def _refuse_special(state: os.stat_result) -> None:
    """Refuses a folder, a pipe, a socket or a device as an object: reading a device may never
    end."""
    if not stat.S_ISREG(state.st_mode):
        raise FileNotFoundError


def within(content: bytes, name: str, most: int | None) -> bytes:
    """Returns the content itself. Raises IntegrityError if it is longer than `most` bytes."""
    if most is not None and len(content) > most:
        raise IntegrityError(
            f"{name} in the store is longer than what was put there ({most} bytes at most):"
            " restore its backup, or remove it"
        )
    return content


def intended(name: str) -> str:
    """Returns the name of the object that a killed `put` was about to write. The `put` has left
    `.NAME.x` in a local folder, or `NAME.x` on Azure, where x is 8 hex digits. Any other name is
    returned as it is."""
    folder, slash, last = name.rpartition("/")
    partial = re.fullmatch(r"\.?(.+)\.[0-9a-f]{8}", last)
    return f"{folder}{slash}{partial[1]}" if partial else name


def pieces_of(content: Content) -> Iterable[Piece]:
    return [content] if isinstance(content, bytes) else content


def _make_folder(path: Path) -> None:
    """Makes a folder and those above it. Each new folder is made durable in its parent."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        sync(path.parent)


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def _typed(action: str, name: str) -> Iterator[None]:
    """Turns errors of the disk into typed errors without the paths of this machine."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if action == "read":
            raise NotFoundError(f"{name} is not in the store") from None
        raise _refusal(action, name, error) from None
    except OSError as error:
        raise _refusal(action, name, error) from None


def _refusal(action: str, name: str, error: OSError) -> StorageError:
    remedy = _REMEDIES.get(error.errno or 0, "free or fix the disk")
    return StorageError(
        f"the store refused to {action} {name} ({error.strerror or type(error).__name__}):"
        f" {remedy}, and try again",
        details={"errno": error.errno},
    )
