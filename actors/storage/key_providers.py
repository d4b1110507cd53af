"""Defines what every holder of tenant keys must do, and implements two holders: a file and a
variable.

The tenant key stays in the process of the registry. A training actor receives only data keys.
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
"""Seconds to wait for another process that changes the keyring. A change takes milliseconds, and a
transaction may be waiting for this call."""


class KeyProvider(Protocol):
    """A holder of tenant keys that wraps data keys (32 bytes each) under them.

    A provider guarantees the following. No method, `repr`, error or log reveals a tenant key. What
    it wrapped can be opened only with the same `context`. A key that it has named in `key_ids`
    opens what it wrapped, until that key is retired. A change is durable when its method returns,
    or did not happen. Only the registry calls a provider, one call at a time.

    Any method may raise StorageError if the keys cannot be reached; a caller may try again. The
    methods describe what a key service (KMS), a security module (HSM, by PKCS#11) and age would do.
    age has no associated data, and only the tenant has its identity. An age provider could
    therefore only `wrap`: that suits copies that the operator must not read, but not a registry.
    """

    provider: str
    """A short name, which `EncryptionInfo.key_provider` shows."""

    @property
    def primary(self) -> str:
        """The id of the key that `wrap` uses. For a KMS, it is the version behind the key's
        name."""

    @property
    def key_ids(self) -> list[str]:
        """The ids of all keys that `unwrap` knows, oldest first."""

    def wrap(self, data_key: bytes, context: bytes) -> dict[str, str]:
        """Returns the data key in JSON form, wrapped under the primary key and bound to `context`.
        The form has two fields, `key_id` and `wrapped` (base64).

        KMS: Encrypt with `context` in the encryption context. HSM: AES-GCM with `context` as
        associated data, under a key that cannot be extracted.
        """

    def unwrap(self, wrapped: dict[str, str], context: bytes) -> bytes:
        """Returns the data key. KMS: Decrypt; HSM: AES-GCM; age refuses.

        Raises:
            IntegrityError: The wrapping key is not here, the context is another, or bytes have
                changed.
        """

    def derive(self, purpose: bytes, key_id: str | None = None) -> tuple[str, bytes]:
        """Returns the id of a key (the primary key if `key_id` is None) and 32 bytes derived from
        it for one purpose. The bytes are the same in each process, and do not help to find the key.

        KMS: GenerateMac over `purpose` under an HMAC key beside the wrapping key. HSM: the same
        with CKM_SHA256_HMAC. age refuses.
        """

    def rotate(self, used: Collection[str] = ()) -> str:
        """Makes a fresh primary key, and returns its id. The older keys stay, because data keys are
        wrapped under them. The id is not in `used`, which has ids of keys that may no longer be
        here.

        KMS: a new version of the key. HSM: a new key beside the old one.

        Raises:
            InvalidRequestError: This provider cannot or may not rotate; the error says who can.
        """

    def retire(self, key_id: str) -> None:
        """Forgets an older key for good: nothing can open what it wrapped any more.

        KMS: destroys the version, which takes effect after the number of days that the service
        sets. Destroying every version is the strong form of deletion. HSM: destroys the object.

        Raises:
            InvalidRequestError: The key does not exist or is primary; or this provider cannot or
                may not retire keys. Then the error says who can.
        """


def open_keyring(where: str | os.PathLike[str]) -> KeyProvider:
    """Opens the keyring that `ServiceClient(keyring=...)` names.

    Raises:
        InvalidRequestError: `where` cannot name a keyring.
        StorageError: The keyring does not exist, or other users can read it.
        IntegrityError: The keyring is damaged.
    """
    place = place_of(where)
    return EnvironmentKeyring(place) if isinstance(place, Variable) else FileKeyring(place)


def new_text(after: str | None = None) -> str:
    """Returns the text of a fresh keyring, or the text of the keyring `after` with a fresh primary
    key. Keep the text secret.

    `after` may name an older copy. Therefore the fresh key gets a random number: the next number
    could be that of a key that the registry knows, and the registry would then refuse the keyring.
    """
    if after is None:
        return Keys.new().text()
    older = _read(place_of(after))
    return older.rotated(random_name(older.by_id)).text()


class FileKeyring(Keyring):
    """A keyring in a JSON file of mode 0600, which is refused if any other user can read it.

    Several processes may use one file. Each call reads the file. A change starts from the current
    content, under a lock on the file (`flock`). Therefore nobody wraps under a key that another
    process has retired, or replaces a newer keyring by an older one.

    Raises:
        StorageError: From any call: the file is missing, or other users can read it.
        IntegrityError: From any call: the file is damaged.
    """

    provider = "file"

    def __init__(self, path: Path) -> None:
        self._path = path
        _read(path)  # A defect of the file is reported here.

    @property
    def _keys(self) -> Keys:
        # Read each time: after two changes a file may have its old size and inode again and, within
        # one tick of the clock, its old time.
        return _read(self._path)

    @classmethod
    def create(cls, path: Path) -> FileKeyring:
        """Creates a keyring with one fresh key. Never changes a keyring that exists."""
        with written(path, Keys.new().text().encode()) as partial:
            # Fails if the keyring exists: no key is ever overwritten.
            path.hardlink_to(partial)
        return cls(path)

    def rotate(self, used: Collection[str] = ()) -> str:
        return self._change(lambda keys: keys.rotated(next_name([*keys.by_id, *used]))).primary

    def retire(self, key_id: str) -> None:
        self._change(lambda keys: _retired(keys, key_id))

    def _change(self, change: Callable[[Keys], Keys]) -> Keys:
        """Replaces the file in one step, starting from its current content; returns the new
        keys."""
        _read(self._path)  # A defect of the file is reported here, before the lock.
        try:
            with locked(self._path):
                keys = change(self._keys)
                remove_partials(self._path)
                with written(self._path, keys.text().encode()) as partial:
                    partial.replace(self._path)
                _make_durable(self._path)
        except OSError as error:
            raise StorageError(
                f"cannot write the keyring {self._path} ({error.strerror}): nothing was changed"
            ) from None
        return keys


class EnvironmentKeyring(Keyring):
    """A keyring in an environment variable, where a secret manager puts it. It is read once and
    never written."""

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
            f" {self._variable}` prints into your secret manager, restart the cluster with it, and"
            " run `tg-tinker keys rotate --resume`"
        )

    def retire(self, key_id: str) -> NoReturn:
        raise InvalidRequestError(
            f"the keyring in {self._variable} is read-only: once `tg-tinker keys list` counts no"
            " artifact for a key, remove the key from the text in your secret manager and restart"
            " the cluster"
        )


def _retired(keys: Keys, key_id: str) -> Keys:
    older = [name for name in keys.by_id if name != keys.primary]
    if key_id not in older:
        raise InvalidRequestError(
            f"key {key_id!r} cannot be retired: choose among {older}, which a rotation replaced"
        )
    return keys.without(key_id)


def _read(place: Path | Variable) -> Keys:
    text = _text_of(place) if isinstance(place, Variable) else _content_of(place)
    try:
        return Keys.parse(text)
    except ValueError:
        named = place if isinstance(place, Path) else f"in the environment variable {place.name}"
        raise IntegrityError(
            f"the keyring {named} is damaged: restore its backup; without it no artifact can be"
            " opened"
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
            f"cannot read the keyring {path} ({error.strerror}): restore its backup, or"
            " correct `keyring`"
        ) from None
    if mode & 0o077:
        raise StorageError(
            f"the keyring {path} has mode {mode:04o}, so other users can read it: chmod 600 it,"
            " and assume that others know its keys"
        )
    return content


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets in one thread or process at a time. The lock of a killed process is released.

    The lock is on the file itself. A stranger might be able to open its folder, or a file beside
    it, and could then lock that forever.

    Args:
        path: A keyring, or another file of keys that every change replaces.
    """
    over = time.monotonic() + _PATIENCE_S
    while (descriptor := _lock_on(path)) is None:
        if time.monotonic() > over:
            raise StorageError(
                f"another process has been changing the file {path} for more than"
                f" {_PATIENCE_S} s: nothing was changed. Find the process that has it open"
                " (`fuser`), then repeat"
            )
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock_on(path: Path) -> int | None:
    """Returns a descriptor that locks the current keyring; None while another process changes
    it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Each change makes another file: the locked file must still be the keyring.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
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
            f"the keyring {path} was changed, but a crash may restore the old keyring"
            f" ({error.strerror}): repair its disk, and run `tg-tinker keys list` before you repeat"
        ) from None


def remove_partials(path: Path) -> None:
    """Removes files that `written` left in killed processes, and that hold keys in clear. Call it
    only under the lock: then nobody else is writing such a file."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}")
    for found in path.parent.iterdir():
        if ours.fullmatch(found.name):
            found.unlink()
