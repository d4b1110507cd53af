"""Stores objects in a bucket: S3 and compatible stores, Google Cloud Storage, Azure, HDFS."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeVar

from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from actors.storage.answers import (
    UNEXPLAINED,
    Cause,
    NoBucketError,
    SizeDiffersError,
    cause_of,
)
from actors.storage.filesystems import (
    RetryPolicy,
    bucket_exists,
    failures,
    files_below,
    folders_in,
    open_filesystem,
)
from actors.storage.objects import SMALL, Content, ObjectInfo, pieces_of, within
from tg_tinker.errors import NotFoundError, StorageError
from tg_tinker.storage.stores import Location, check_name, shown

T = TypeVar("T")


class Bucket:
    """Objects below a prefix of a bucket.

    An operation is retried with jitter if its failure may be temporary. Every operation asks for
    the same result when it is repeated, so a lost reply does no harm.
    """

    def __init__(self, location: Location, policy: RetryPolicy) -> None:
        self._location = location
        self._policy = policy

    def put(self, name: str, content: Content) -> int:
        path = self._path(name)
        whole = isinstance(content, bytes) and len(content) <= SMALL
        upload = self._replace if whole and self._location.scheme == "abfss" else self._upload
        attempts = self._policy.attempts if iter(content) is not content else 1
        try:
            return self._repeat("write", name, lambda: upload(path, content), attempts)
        except BaseException:
            # A `put` of whole content leaves the old or the new object, which is worth keeping.
            if not whole:
                with suppress(*failures()):
                    self._files.delete_file(path)
            raise

    def create(self, name: str, content: bytes) -> bool:
        with suppress(NotFoundError):
            self.size(name)
            return False
        self.put(name, content)
        return True

    def read(self, name: str, most: int | None = None) -> bytes:
        path = self._path(name)
        return within(self._repeat("read", name, lambda: self._download(path, most)), name, most)

    def size(self, name: str) -> int:
        path = self._path(name)
        return self._repeat("read", name, lambda: self._size(path))

    def list_below(self, folder: str = "") -> list[ObjectInfo]:
        path = self._path(folder) if folder else self._location.root
        infos = self._repeat("list", folder or "all", lambda: files_below(self._files, path))
        return sorted(
            ObjectInfo(
                shown(info.path.removeprefix(self._location.root).lstrip("/")),
                info.size,
                info.mtime,
            )
            for info in infos
        )

    def list_folders(self, folder: str) -> list[str]:
        path = self._path(folder)
        return sorted(self._repeat("list", folder, lambda: folders_in(self._files, path)))

    def delete(self, name: str) -> None:
        path = self._path(name)
        with suppress(NotFoundError):
            self._repeat("delete", name, lambda: self._files.delete_file(path))

    def delete_all(self, folder: str) -> None:
        path = self._path(folder)
        self._repeat("delete", folder, lambda: self._delete_folder(path))

    # --- one attempt -----------------------------------------------------------------------------

    def _upload(self, path: str, content: Content) -> int:
        """Writes an object, and compares its size in the store with the size that was sent."""
        size = 0
        # Without `compression=None` a name that ends in .gz would be compressed.
        stream = self._files.open_output_stream(path, compression=None)
        try:
            for piece in pieces_of(content):
                stream.write(piece)
                size += memoryview(piece).nbytes
        except BaseException:
            # arrow cannot abort (apache/arrow#40502): leaving or dropping the stream publishes what
            # was written so far. Therefore it is closed now, and `put` deletes the object.
            with suppress(*failures()):
                stream.close()
            raise
        stream.close()
        if self._size(path) != size:
            raise SizeDiffersError
        return size

    def _replace(self, path: str, content: Content) -> int:
        """Writes an object in one step on Azure, where opening an object for writing empties it."""
        aside = f"{path}.{secrets.token_hex(4)}"
        try:
            size = self._upload(aside, content)
            self._files.copy_file(aside, path)
        finally:
            with suppress(*failures()):
                self._files.delete_file(aside)
        return size

    def _download(self, path: str, most: int | None) -> bytes:
        with self._files.open_input_stream(path, compression=None) as stream:
            content: bytes = stream.read(None if most is None else most + 1)
            return content

    def _size(self, path: str) -> int:
        info = self._files.get_file_info(path)
        if not info.is_file:
            raise FileNotFoundError
        size: int = info.size
        return size

    def _delete_folder(self, path: str) -> None:
        # The listing decides whether the folder exists: Azure reports a folder `a/b` beside `a/b-c`
        # as missing, and gs has no error of its own for a missing folder.
        if files_below(self._files, path):
            # On gs the library looks for a marker object after it has deleted the last object.
            with suppress(FileNotFoundError):
                self._files.delete_dir(path)

    # --- inside ----------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._location.root.rstrip('/')}/{check_name(name)}"

    @cached_property
    def _files(self) -> Any:
        """The filesystem, after a check that its bucket exists: some stores create a missing bucket
        on upload."""
        filesystem = open_filesystem(self._location, self._policy)
        if self._location.bucket and not bucket_exists(filesystem, self._location.bucket):
            raise NoBucketError
        return filesystem

    def _repeat(
        self, action: str, name: str, once: Callable[[], T], attempts: int | None = None
    ) -> T:
        """Runs an operation, and retries it while its failure may be temporary."""
        retrying = Retrying(
            stop=stop_after_attempt(attempts or self._policy.attempts)
            | stop_before_delay(self._policy.deadline_s),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            return retrying(once)
        except FileNotFoundError:
            # The bucket was removed.
            if action == "write":
                raise _refusal(action, name, cause_of(NoBucketError()), 1) from None
            raise NotFoundError(f"{name} is not in the store") from None
        except failures() as error:
            attempt = retrying.statistics["attempt_number"]
            raise _refusal(action, name, self._explained(cause_of(error)), attempt) from None

    def _explained(self, cause: Cause) -> Cause:
        """Returns the reason that the store gives for a refusal.

        S3 answers the requests for a size and for the existence of a bucket without a body, so
        with a number alone. The answer to a listing names the reason.
        """
        if self._location.scheme != "s3" or cause != UNEXPLAINED:
            return cause
        try:
            folders_in(open_filesystem(self._location, self._policy), self._location.root)
        except failures() as error:
            if not (told := cause_of(error)).may_pass:
                return told
        return cause


def _may_pass(error: BaseException) -> bool:
    missing = isinstance(error, FileNotFoundError)
    return isinstance(error, failures()) and not missing and cause_of(error).may_pass


def _refusal(action: str, name: str, cause: Cause, attempts: int) -> StorageError:
    return StorageError(
        f"the store refused to {action} {name} ({cause.text}; attempts: {attempts}):"
        f" {cause.remedy} try again",
        details={"reason": cause.reason, "attempts": attempts},
    )
