"""Stores sealed files in a local folder or a bucket, which sees only ciphertext, names and sizes.

    <root>/t/<tenant>/a/<artifact_id>/<file>      an artifact; its manifest.json is written last
    <root>/t/<tenant>/keys/<artifact_id>.json     its wrapped data key, the only mutable file
    <root>/t/<tenant>/audit/<place>.json          a signed head of the audit log
    <root>/t/<tenant>/ledgers/<pseudonym>/<place>.json    a signed head of a dataset's ledger
    <root>/t/<tenant>/clock                       empty; its time is the store's, for a sweep

An artifact exists when its manifest exists. After a resealing its files are under another name than
its id (`actors.registry.artifacts`). In this module, `artifact_id` means that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from actors.storage.bucket import Bucket
from actors.storage.filesystems import RetryPolicy
from actors.storage.objects import Content, LocalFolder, Objects, intended
from tg_tinker.errors import IntegrityError, InvalidRequestError, NotFoundError, StorageError
from tg_tinker.storage.stores import check_component, is_component, parse

MANIFEST = "manifest.json"
_TENANTS = "t"

MOST = 16 * 2**20
"""The largest number of bytes of a manifest, a wrapped key or a head. The longest object of
TG-Tinker, a head with all entries of a ledger that a store missed, has a few hundred thousand."""

MOST_OF_A_HEAD = 4096
"""The largest number of bytes of a head of an audit log; such a head has a few hundred."""

_MOST_OF_KEY = 1024
"""The largest number of bytes of a wrapped data key; TG-Tinker's have about 160."""

PARALLEL = 4
"""The number of files of an artifact that are written at the same time."""


def open_objects(root: str, policy: RetryPolicy) -> Objects:
    """Returns the objects of a store. Connects and creates nothing until the objects are used.

    Raises:
        InvalidRequestError: `root` is neither a folder nor a URI that `stores.parse` accepts.
    """
    location = parse(root)
    return LocalFolder(location) if isinstance(location, Path) else Bucket(location, policy)


class ArtifactStore:
    """A store of whole files, which are written durably or not at all.

    Args:
        root: A local folder, or a URI `s3://`, `gs://`, `abfss://`, `hdfs://` or `file:///` with
            bucket and prefix. It has no credentials: these come from the environment
            (`filesystems`).
        policy: How long a store outside this machine may take.

    Attributes:
        root: The root as it was given.
        objects: All objects in the store, by name below the root.
    """

    def __init__(self, root: str, policy: RetryPolicy | None = None) -> None:
        self.root = root
        self.objects = open_objects(root, policy or RetryPolicy())

    def write_artifact(
        self, tenant: str, artifact_id: str, files: Mapping[str, Content], key: bytes,
        manifest: Callable[[], bytes],
    ) -> None:  # fmt: skip
        """Writes the files, several at a time, then the wrapped key, then the manifest. `manifest`
        is called once the files are written.

        The store confirms the size of each file. After a failure, the written files are removed as
        far as the store permits. A file that stays does not count, because its manifest is missing
        or the registry does not know it. Writing the same again does no harm.

        Raises:
            StorageError: The store fails or does not answer; the error says what to do.
        """
        folder, key_name = _folder(tenant, artifact_id), _key_name(tenant, artifact_id)
        if MANIFEST in files:
            raise InvalidRequestError(f"{MANIFEST} is written last: leave it out of the files")
        contents = {f"{folder}/{check_component(name)}": files[name] for name in files}
        try:
            self._put_all(contents)
            self.objects.put(key_name, key)
            self.objects.put(f"{folder}/{MANIFEST}", manifest())
        except StorageError as error:
            left = self._discard(tenant, artifact_id)
            raise StorageError(
                f"the artifact was not saved; training is not affected: {error.message}{left}",
                details=error.details,
            ) from None
        except BaseException:
            self._discard(tenant, artifact_id)
            raise

    def read(
        self, tenant: str, artifact_id: str, name: str, size: int | None = None
    ) -> bytes:  # fmt: skip
        """Returns the content of an artifact's file. If `size` is None, any size is allowed, except
        for a manifest.

        Raises:
            NotFoundError: The file does not exist.
            IntegrityError: The file has more than `size` bytes.
        """
        most = MOST if name == MANIFEST else size
        name = f"{_folder(tenant, artifact_id)}/{check_component(name)}"
        return self._read(name, artifact_id, most)

    def read_key(self, tenant: str, artifact_id: str) -> bytes:
        return self._read(_key_name(tenant, artifact_id), artifact_id)

    def tenants(self) -> list[str]:
        """Returns the tenants that have, or had, anything in this store."""
        return [name for name in self.objects.list_folders(_TENANTS) if is_component(name)]

    def whole(self, tenant: str) -> set[str]:
        """Returns the names of all artifacts that have a manifest and a wrapped key."""
        there = {info.name for info in self.objects.list_below(_artifacts(tenant))}
        return {name for name in self.with_key(tenant) if _manifest(tenant, name) in there}

    def with_key(self, tenant: str) -> set[str]:
        """Returns the names of all artifacts, known to the registry or not, that have a key file of
        a wrapped key's size."""
        found = self.objects.list_below(_keys(tenant))
        names = (info.name.rpartition("/")[2] for info in found if info.size <= _MOST_OF_KEY)
        return {name.removesuffix(".json") for name in names}

    def holds(self, tenant: str, artifact_id: str) -> bool:
        """Returns whether the store has any file of an artifact, or its wrapped key."""
        if self.objects.list_below(_folder(tenant, artifact_id)):
            return True
        try:
            self.objects.size(_key_name(tenant, artifact_id))
        except NotFoundError:
            return False
        return True

    def write_key(self, tenant: str, artifact_id: str, key: bytes) -> None:
        """Replaces a wrapped data key, in one step if the store can do that."""
        self.objects.put(_key_name(tenant, artifact_id), key)

    def delete_key(self, tenant: str, artifact_id: str) -> None:
        """Removes a wrapped data key. Without a copy of that key, no copy of the files can be
        opened."""
        self.objects.delete(_key_name(tenant, artifact_id))

    def write_audit_head(self, tenant: str, place: str, line: str) -> None:
        """Writes a signed head of the audit log. Its name is its position, ``SEQ-HASH``, so the
        head of another log has another name."""
        self.objects.put(f"{_audit(tenant)}/{place}.json", f"{line}\n".encode())

    def audit_heads(self, tenant: str) -> list[str]:
        """Returns the names of objects that may be heads of the audit log."""
        return self._whole_below(_audit(tenant))

    def write_ledger_head(self, tenant: str, ledger: str, place: str, line: str) -> None:
        """Writes a signed head of a ledger. Its name is its position, so no head ever replaces
        another; it replaces only itself, signed by a newer key."""
        self.objects.put(f"{_ledger(tenant, ledger)}/{place}.json", f"{line}\n".encode())

    def ledger_heads(self, tenant: str, ledger: str) -> list[str]:
        """Returns the names of objects that may be heads of a ledger."""
        return self._whole_below(_ledger(tenant, ledger))

    def all_ledger_heads(self, tenant: str) -> list[str]:
        """Returns the names of objects that may be heads of any ledger; `ledger_in` returns the
        ledger of each name."""
        return self._whole_below(_ledgers(tenant))

    def read_head(self, name: str, most: int = MOST) -> str:
        """Returns the line of an object that may be a head. Anybody who can write to the store may
        have put it there. Returns an empty string for an object that cannot be a head."""
        try:
            content = self.objects.read(name, most)
        except (InvalidRequestError, IntegrityError):
            return ""  # No head: TG-Tinker writes no head of such a name or size.
        return content.decode("ascii", "replace").removesuffix("\n")

    def delete(self, tenant: str, artifact_id: str) -> None:
        """Deletes the manifest first, so that the artifact stops existing, then the key, then the
        data."""
        folder = _folder(tenant, artifact_id)
        try:
            self.objects.delete(f"{folder}/{MANIFEST}")
            self.objects.delete(_key_name(tenant, artifact_id))
            self.objects.delete_all(folder)
        except StorageError as error:
            raise StorageError(
                f"the store kept files of {artifact_id}: {error.message}, or remove {folder}"
                " in the store by hand",
                details=error.details,
            ) from None

    def _whole_below(self, folder: str) -> list[str]:
        """Returns the names of all objects below a folder, except hidden ones and remains of killed
        writes."""
        names = [info.name for info in self.objects.list_below(folder)]
        hidden = {name for name in names if name.rpartition("/")[2].startswith(".")}
        return [name for name in names if name not in hidden and intended(name) == name]

    def _put_all(self, contents: Mapping[str, Content]) -> None:
        """Writes all objects. When it returns or raises, no upload is running any more."""
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="tg-store") as pool:
            uploads = [pool.submit(self.objects.put, *item) for item in contents.items()]
            try:
                for upload in as_completed(uploads):
                    upload.result()
            except BaseException:
                # The end of the `with` block waits for the uploads that run.
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _discard(self, tenant: str, artifact_id: str) -> str:
        """Removes the files that a failed save wrote. Returns a clause about files that stay; empty
        if none stay."""
        try:
            self.delete(tenant, artifact_id)
        except StorageError:
            folder = _folder(tenant, artifact_id)
            return f"; parts of it may be left in {folder} of the store and do not count"
        return ""

    def _read(self, name: str, artifact_id: str, most: int | None = MOST) -> bytes:
        try:
            return self.objects.read(name, most)
        except NotFoundError:
            file = name.rpartition("/")[2]
            raise NotFoundError(
                f"artifact {artifact_id}: its file {file} is not in the store"
            ) from None


def place_in(name: str) -> str:
    """Returns the position, ``SEQ-HASH``, that the name of a head's object states."""
    return name.rpartition("/")[2].removesuffix(".json")


def ledger_in(name: str) -> str:
    """Returns the pseudonym of the ledger that the name of a head's object states."""
    return name.split("/")[3]


def _artifacts(tenant: str) -> str:
    return f"{_TENANTS}/{check_component(tenant)}/a"


def _folder(tenant: str, artifact_id: str) -> str:
    return f"{_artifacts(tenant)}/{check_component(artifact_id)}"


def _manifest(tenant: str, artifact_id: str) -> str:
    return f"{_artifacts(tenant)}/{artifact_id}/{MANIFEST}"


def _audit(tenant: str) -> str:
    return f"{_TENANTS}/{check_component(tenant)}/audit"


def _ledgers(tenant: str) -> str:
    return f"{_TENANTS}/{check_component(tenant)}/ledgers"


def _ledger(tenant: str, ledger: str) -> str:
    return f"{_ledgers(tenant)}/{check_component(ledger)}"


def _keys(tenant: str) -> str:
    return f"{_TENANTS}/{check_component(tenant)}/keys"


def _key_name(tenant: str, artifact_id: str) -> str:
    return f"{_keys(tenant)}/{check_component(artifact_id)}.json"
