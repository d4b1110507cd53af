"""Who holds the tenant key: what every holder must do, and the two there are.

The tenant key stays in the process of the registry; a training actor gets data keys only.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Protocol

from actors.storage.keyring import Keyring, Keys, next_name, random_name
from tg_tinker.errors import IntegrityError, InvalidRequestError, StorageError
from tg_tinker.storage.files import sync, written
from tg_tinker.storage.keyrings import Variable, place_of

_PATIENCE_S = 10.0
"""Another process needs the keyring for milliseconds, and a transaction may be waiting."""


class KeyProvider(Protocol):
    """Holds the tenant key and wraps data keys (32 bytes each) under it.

    A provider guarantees that the tenant key leaves it by no method, `repr`, error or log; that
    what it wrapped opens under the same `context` alone; that a key which it has named in
    `key_ids` opens what it wrapped until it is retired; and that a change is durable when its
    method returns, or did not happen. Only the registry calls it, one call at a time.

    Any method may raise StorageError where the keys cannot be reached: a caller may try again.
    The methods say what a key service (KMS), a security module (HSM, by PKCS#11) and age would
    do. age knows no associated data and its identity is with the tenant alone, so an age provider
    could only `wrap`: good for copies that the operator must not read, not for a registry.
    """

    provider: str
    """A short name, which `EncryptionInfo.key_provider` shows."""

    @property
    def primary(self) -> str:
        """Id of the key that `wrap` uses. Of a KMS: the version behind the key's name."""

    @property
    def key_ids(self) -> list[str]:
        """All keys that `unwrap` knows, oldest first."""

    def wrap(self, data_key: bytes, context: bytes) -> dict[str, str]:
        """A JSON form of the data key under the primary key, bound to `context`: two fields,
        `key_id` and `wrapped` (base64).

        KMS: Encrypt with `context` in the encryption context. HSM: AES-GCM with `context` as
        associated data under a key that cannot be extracted.
        """

    def unwrap(self, wrapped: dict[str, str], context: bytes) -> bytes:
        """The data key. KMS: Decrypt; HSM: AES-GCM; age refuses.

        Raises:
            IntegrityError: a key that is not here, another context, or changed bytes.
        """

    def derive(self, purpose: bytes, key_id: str | None = None) -> tuple[str, bytes]:
        """Id of a key, the primary one if none is named, and 32 bytes made from it for one
        purpose: the same in each process, and of no use to find the key.

        KMS: GenerateMac over `purpose` under an HMAC key beside the wrapping key. HSM: the same
        by CKM_SHA256_HMAC. age refuses.
        """

    def rotate(self, used: Collection[str] = ()) -> str:
        """A fresh primary key; the older ones stay, for what they have wrapped. Its id, which is
        none of `used` either: these were of keys that may not be here any more.

        KMS: a new version of the key. HSM: a new key beside the old one.

        Raises:
            InvalidRequestError: this provider cannot, or may not; says who can.
        """

    def retire(self, key_id: str) -> None:
        """Forgets an older key for good: what it wrapped opens nowhere any more.

        KMS: destroys the version, which takes effect after the days that the service sets; the
        destruction of every version is the strong form of deletion. HSM: destroys the object.

        Raises:
            InvalidRequestError: there is no such key, or it is the primary one; or this provider
                cannot, or may not: says who can.
        """


def open_keyring(where: str | os.PathLike[str]) -> KeyProvider:
    """What `ServiceClient(keyring=...)` names.

    Raises:
        InvalidRequestError: it names nothing that could be a keyring.
        StorageError: there is none, or others may read it.
        IntegrityError: it is damaged.
    """
    place = place_of(where)
    return EnvironmentKeyring(place) if isinstance(place, Variable) else FileKeyring(place)


def new_text(after: str | None = None) -> str:
    """The text of a fresh keyring, or that of `after` with a fresh primary key. Keep it secret.

    `after` may be an older copy, so the fresh key gets a number by chance: one that follows could
    be that of a key which the registry knows, and then it would refuse the keyring.
    """
    if after is None:
        return Keys.new().text()
    older = _read(place_of(after))
    return older.rotated(random_name(older.by_id)).text()


class FileKeyring(Keyring):
    """Keys in a JSON file of mode 0600; refused when anyone else may read it.

    Several processes may use one file: each call reads it, and a change is made to what is there
    under a lock on it (`flock`). So nobody wraps under a key that another process has retired, or
    writes an older ring over a newer one.

    Raises:
        StorageError: from any call: the file is gone, or others may read it.
        IntegrityError: from any call: it is damaged.
    """

    provider = "file"

    def __init__(self, path: Path) -> None:
        self._path = path
        _read(path)  # what is wrong with it shows here first

    @property
    def _keys(self) -> Keys:
        # Read each time: after two changes a file may have its old size, inode and, within a tick
        # of the clock, time again.
        return _read(self._path)

    @classmethod
    def create(cls, path: Path) -> FileKeyring:
        """A keyring with one fresh key; never touches one that exists."""
        with written(path, Keys.new().text().encode()) as partial:
            path.hardlink_to(partial)  # fails if the keyring exists: no key is ever overwritten
        return cls(path)

    def rotate(self, used: Collection[str] = ()) -> str:
        return self._change(lambda keys: keys.rotated(next_name([*keys.by_id, *used]))).primary

    def retire(self, key_id: str) -> None:
        self._change(lambda keys: _retired(keys, key_id))

    def _change(self, change: Callable[[Keys], Keys]) -> Keys:
        """The file in one step, from what it holds at this moment."""
        _read(self._path)  # what is wrong with it shows here first
        try:
            with _locked(self._path):
                keys = change(self._keys)
                _remove_partials(self._path)
                with written(self._path, keys.text().encode()) as partial:
                    partial.replace(self._path)
                _make_durable(self._path)
        except OSError as error:
            raise StorageError(
                f"cannot write the keyring {self._path} ({error.strerror}): nothing was changed"
            ) from None
        return keys


class EnvironmentKeyring(Keyring):
    """Keys in an environment variable, as a secret manager puts them there: read once, never
    written."""

    provider = "env"

    def __init__(self, variable: Variable) -> None:
        self._variable = variable
        self._found = _read(variable)

    @property
    def _keys(self) -> Keys:
        return self._found

    def rotate(self, used: Collection[str] = ()) -> NoReturn:
        raise InvalidRequestError(
            f"the keyring in {self._variable} is read-only: put what `tg-tinker keys new --after"
            f" {self._variable}` prints into your secret manager, restart the cluster with it,"
            " then `tg-tinker keys rotate --resume`"
        )

    def retire(self, key_id: str) -> NoReturn:
        raise InvalidRequestError(
            f"the keyring in {self._variable} is read-only: once `tg-tinker keys list` counts no"
            " artifact for a key, take it out of the text in your secret manager and restart the"
            " cluster"
        )


def _retired(keys: Keys, key_id: str) -> Keys:
    older = [name for name in keys.by_id if name != keys.primary]
    if key_id not in older:
        raise InvalidRequestError(
            f"key {key_id!r} cannot be retired: choose among {older}, which a rotation has replaced"
        )
    return keys.without(key_id)


def _read(place: Path | Variable) -> Keys:
    text = _text_of(place) if isinstance(place, Variable) else _content_of(place)
    try:
        return Keys.parse(text)
    except ValueError:
        named = place if isinstance(place, Path) else f"in the environment variable {place.name}"
        raise IntegrityError(
            f"the keyring {named} is damaged: put its backup back; without it no artifact opens"
        ) from None


def _text_of(variable: Variable) -> str:
    text = os.environ.get(variable.name)
    if not text:
        raise StorageError(
            f"the environment variable {variable.name} holds no keyring: set it where the cluster"
            " starts (`ray start`, or the program of an embedded one), or correct `keyring`;"
            " `tg-tinker keys new` prints a fresh one"
        )
    return text


def _content_of(path: Path) -> bytes:
    try:
        mode, content = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read the keyring {path} ({error.strerror}): put its backup back, or"
            " correct `keyring`"
        ) from None
    if mode & 0o077:
        raise StorageError(
            f"the keyring {path} has mode {mode:04o}, others may read it: chmod 600 it, and"
            " treat its keys as known to others"
        )
    return content


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One at a time, of all threads and processes; the lock of a killed process is free.

    It is on the keyring itself: its folder, or a file beside it, a stranger may be able to open,
    and could lock for ever.
    """
    over = time.monotonic() + _PATIENCE_S
    while (descriptor := _lock_on(path)) is None:
        if time.monotonic() > over:
            raise StorageError(
                f"another process changes the keyring {path} for more than {_PATIENCE_S} s:"
                " nothing was changed. See who has it open (`fuser`), then repeat"
            )
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock_on(path: Path) -> int | None:
    """A descriptor that locks the keyring of this moment; None while somebody else changes it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):  # each change makes another file
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _make_durable(path: Path) -> None:
    try:
        sync(path.parent)
    except OSError as error:
        raise StorageError(
            f"the keyring {path} was changed, but may be the old one again after a crash"
            f" ({error.strerror}): mend its disk, then see `tg-tinker keys list` before you repeat"
        ) from None


def _remove_partials(path: Path) -> None:
    """What killed processes left of `written`, which holds keys in clear. Only under the lock:
    there nobody else is writing one."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}")
    for found in path.parent.iterdir():
        if ours.fullmatch(found.name):
            found.unlink()
