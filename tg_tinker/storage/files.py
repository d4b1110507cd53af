"""Writes files that must be complete and survive a crash, and opens files of others with care.

A file is written under a temporary name in its folder, made durable, and then renamed.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path

from tg_tinker.errors import InvalidRequestError


@contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[BufferedWriter]:
    """Yields a file of mode 0600 for a path, which leads to it once it is complete.

    It is a new file in any case: what was at the path keeps its content and its mode, where it has
    other names, and no link is followed. If the block fails, nothing is left of the file.

    Args:
        replace: whether the path may lead to another file, which then loses this name.

    Raises:
        FileExistsError: there is something at the path, and `replace` is false.
        OSError: the file cannot be written, or the path is a folder.
    """
    if not replace:
        refuse_existing(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with _made(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not replace:
            _made(path).close()  # fails if somebody else has made it meanwhile
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Raises if there is anything at a path, also a link that leads nowhere.

    Raises:
        FileExistsError: there is something.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def new_folder(path: Path) -> None:
    """Makes a folder and those above it, as far as they are missing, each of mode 0700.

    Raises:
        OSError: a folder cannot be made, or there is something else at its path.
    """
    for folder in (*reversed(path.parents), path):
        folder.mkdir(exist_ok=True, mode=0o700)


@contextmanager
def written(path: Path, content: bytes) -> Iterator[Path]:
    """Yields a durable file with this content and mode 0600, in the folder of `path`.

    Its name is `.NAME.` and 16 hex digits. The file is removed at the end of the block unless
    the block has renamed it.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with _made(partial) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _made(path: Path) -> BufferedWriter:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def sync(path: Path) -> None:
    """Makes a file durable; for a folder, the files that were added, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def opened_regular(path: Path) -> BufferedReader:
    """Returns a regular file, open for reading. Never waits, as for the writer of a pipe.

    Raises:
        InvalidRequestError: there is something else at this path.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidRequestError(f"{path} is not a regular file, so it was not read")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def opened_inside(folder: Path, name: str) -> BufferedReader:
    """Returns a file of a folder, open for reading.

    A link is followed within the folder and, as the hub's cache has it, from a snapshot of a
    repository to the blobs of that repository.

    Args:
        folder: the folder, without links in its own path.

    Raises:
        InvalidRequestError: the file is no regular file, or a link leads out of the folder.
        OSError: the file cannot be opened.
    """
    file = opened_regular(folder / name)
    homes = [folder]
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        homes.append(folder.parents[1] / "blobs")
    # Where the open file lies, not where its path leads now.
    place = Path(f"/proc/self/fd/{file.fileno()}")
    place = place.readlink() if place.is_symlink() else (folder / name).resolve()
    if not any(place.is_relative_to(home) for home in homes):
        file.close()
        raise InvalidRequestError(
            f"{folder / name} is a link that leads out of its folder, so it was not read: put the"
            " file itself there"
        )
    return file
