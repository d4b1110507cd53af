"""The key that signs heads, its public half, and the statements by which it followed older keys.

All are beside the keyring file, or in the home directory if the keyring is an environment variable.

    audit.key      PEM, mode 0600; only the registry's process reads it
    audit.pub      PEM; give it to everyone who verifies exported logs
    audit.chain    one statement a line, see `tg_tinker.records.successions`; absent before the
                   first rotation

A rotation replaces the files in this order: chain, key, public key. The key decides: after a crash
the chain may end with a statement that leads past the key and means nothing, and the public key may
still be an older one, from which the chain leads to the key.
"""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from actors.storage.key_providers import locked, remove_partials
from tg_tinker.errors import IntegrityError, StorageError
from tg_tinker.records.successions import Succession, chain_to
from tg_tinker.storage.envelope import (
    new_signing_key,
    public_key_from,
    public_key_of,
    raw_public_key,
)
from tg_tinker.storage.files import sync, written

SIGNING_KEY, PUBLIC_KEY, CHAIN = "audit.key", "audit.pub", "audit.chain"


class SigningKey:
    """The signing key in one folder, as it is at each use: another process may have rotated it.

    Any method raises what `load` raises.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known = _loaded(folder)  # A defect of the files is reported here.

    def private(self) -> bytes:
        return self._now().private

    def public(self) -> bytes:
        return self._now().public

    def succession(self) -> list[Succession]:
        """Returns the statements that lead to the key, oldest first."""
        # Asked with each row of an audit log, and most homes have no chain.
        return self._now().steps if (self._folder / CHAIN).exists() else []

    def publics(self) -> list[bytes]:
        """Returns the public keys that this home ever had, the newest first."""
        older = [public_key_from(step.previous) for step in reversed(self.succession())]
        return [self.public(), *older]

    def rotate(self) -> str:
        """Replaces the key by a fresh one, which the old key endorses, and destroys the old one.
        Returns the new public key, 32 bytes in hex.

        Raises:
            StorageError: A file cannot be written. The key in `audit.key` is then the old or the
                new one, and both are whole.
        """
        # A link stays, and the file that has the old key is the one that is replaced.
        path = (self._folder / SIGNING_KEY).resolve()
        try:
            with locked(path):
                return self._replaced(path)
        except OSError as error:
            raise StorageError(
                f"cannot write {error.filename or path} ({error.strerror}): repair the disk, then"
                " look with `tg-tinker doctor`, and rotate again"
            ) from None

    def _now(self) -> _Loaded:
        if _contents(self._folder) != self._known.contents:
            self._known = _loaded(self._folder)
        return self._known

    def _replaced(self, path: Path) -> str:
        older, newer = self.private(), new_signing_key()
        steps = [*self.succession(), Succession.of(older, newer)]
        for one in (path, self._folder / PUBLIC_KEY, self._folder / CHAIN):
            remove_partials(one)
        with written(path, newer) as partial:
            _replace(self._folder / CHAIN, "".join(f"{one.line()}\n" for one in steps).encode())
            partial.replace(path)
            sync(path.parent)
        _replace(self._folder / PUBLIC_KEY, public_key_of(newer))
        return steps[-1].key


def create(folder: Path) -> None:
    """Creates key and public key. Files that exist stay as they are. If several processes create
    them at once, the first one makes the key."""
    write_new(folder / SIGNING_KEY, new_signing_key())
    write_new(folder / PUBLIC_KEY, public_key_of((folder / SIGNING_KEY).read_bytes()))


def load(folder: Path) -> bytes:
    """Returns the signing key.

    Raises:
        StorageError: A file is missing, or other users can read the key.
        IntegrityError: The key is damaged, or is neither the key that was pinned nor one that
            followed it.
    """
    return _loaded(folder).private


class _Loaded(NamedTuple):
    """What the files say, and their contents."""

    contents: tuple[bytes, bytes, bytes]
    private: bytes
    public: bytes
    steps: list[Succession]


def _loaded(folder: Path) -> _Loaded:
    key, pinned, chain = contents = _contents(folder)
    public = public_key_of(key)
    steps = chain_to(public, _parsed(folder / CHAIN, chain))
    # A crash may have come between the key and the public key.
    if public != pinned and raw_public_key(pinned) not in {step.previous for step in steps}:
        raise IntegrityError(
            f"{folder / SIGNING_KEY} is not the key that was pinned in {PUBLIC_KEY}, and {CHAIN}"
            " does not lead from that key to it: restore the newest backup of these files. Heads"
            " signed by another key prove nothing to those who have the pinned key"
        )
    return _Loaded(contents, key, public, steps)


def _contents(folder: Path) -> tuple[bytes, bytes, bytes]:
    """Returns the contents of key, public key and chain. They are read in the order opposite to
    that in which a rotation writes them, so that the chain leads from any public key to the key."""
    try:
        public = (folder / PUBLIC_KEY).read_bytes()
        key = private_file(folder / SIGNING_KEY, "the signing key")
    except OSError as error:
        raise StorageError(
            f"cannot read {error.filename} ({error.strerror}): {SIGNING_KEY} and {PUBLIC_KEY} must"
            " be where `tg-tinker init` made them. Restore their backup"
        ) from None
    try:
        return key, public, (folder / CHAIN).read_bytes()
    except FileNotFoundError:
        return key, public, b""
    except OSError as error:
        raise StorageError(f"cannot read {folder / CHAIN} ({error.strerror})") from None


def private_file(path: Path, what: str) -> bytes:
    """Returns the content of a file that holds keys.

    Raises:
        OSError: The file cannot be read.
        StorageError: Other users can read the file.
    """
    mode, content = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    if mode & 0o077:
        raise StorageError(
            f"{what} {path} has mode {mode:04o}, so other users can read it: chmod 600 it, and"
            " assume that others know it"
        )
    return content


def write_new(path: Path, content: bytes) -> None:
    """Writes a file, durable and whole, unless the file exists."""
    with written(path, content) as partial, suppress(FileExistsError):
        path.hardlink_to(partial)


def _parsed(path: Path, chain: bytes) -> list[Succession]:
    try:
        return [Succession.parse(line) for line in chain.decode("ascii").splitlines()]
    except (IntegrityError, UnicodeDecodeError):
        raise IntegrityError(f"{path} is damaged: restore its backup") from None


def _replace(path: Path, content: bytes) -> None:
    with written(path, content) as partial:
        partial.replace(path)
    sync(path.parent)
