"""Seals and opens the segments of a file, on several threads where the file is large.

The format is Tink's streaming AEAD, AES256_GCM_HKDF_1MB, as published
(https://developers.google.com/tink/streaming-aead/aes_gcm_hkdf_streaming). A file is a header of 40
bytes (its length, a salt of 32 bytes, a nonce prefix of 7 bytes) and then segments of 1 MiB; the
header counts as part of the first segment. The segment key is HKDF-SHA256(key, salt,
info=context). The nonce of a segment is the prefix, the big-endian index, and a byte that is 1 for
the last segment and 0 for the others. So verification fails for dropped, reordered, repeated or
appended segments, and for any other context.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tg_tinker.errors import IntegrityError

SEGMENT = 2**20
BUFFERS = 4
"""The number of results of `in_order` that exist at a time: one with the reader, one ready, and
one in progress on each of two threads."""

_KEY, _SALT, _PREFIX, _TAG = 32, 32, 7, 16
_HEADER = 1 + _SALT + _PREFIX
_THREADS = 2  # faster than a disk writes; more would take cores from a training actor
_THREADS_FROM = 32  # segments; for fewer, starting threads costs more than it saves

T = TypeVar("T")


def sealed_size(size: int) -> int:
    """Returns the sealed size of `size` bytes: 40 bytes more, and 16 more for each segment."""
    beyond_first = max(0, size - (SEGMENT - _HEADER - _TAG))
    return _HEADER + size + _TAG * (1 + -(-beyond_first // (SEGMENT - _TAG)))


class Segments:
    """The segments of one sealed file, counted from 0, and the cipher that seals and opens them.

    Attributes:
        header: the first 40 bytes of the file.
        count: the number of segments, at least 1.
        sealed_size, plain_size: the size of the whole file in bytes, sealed and in clear.
    """

    def __init__(self, key: bytes, context: bytes, header: bytes, sealed_size: int) -> None:
        self.header, self.sealed_size = header, sealed_size
        self.count = -(-sealed_size // SEGMENT)
        self.plain_size = sealed_size - _HEADER - _TAG * self.count
        salt, self._prefix = header[1 : 1 + _SALT], header[1 + _SALT :]
        self._cipher = AESGCM(derive(key, salt, context))

    @classmethod
    def new(cls, key: bytes, context: bytes, plain_size: int) -> Segments:
        """Returns the segments of a new file, under a fresh random salt and nonce prefix."""
        header = bytes([_HEADER]) + secrets.token_bytes(_SALT + _PREFIX)
        return cls(key, context, header, sealed_size(plain_size))

    @classmethod
    def of(cls, key: bytes, context: bytes, sealed: memoryview) -> Segments:
        """Returns the segments of a file that is sealed already.

        Raises:
            IntegrityError: no file of this format has this header and this size.
        """
        if len(sealed) < _HEADER + _TAG or sealed[0] != _HEADER:
            raise IntegrityError(
                "these bytes are not a sealed file of this format, or the file was cut short"
            )
        segments = cls(key, context, bytes(sealed[:_HEADER]), len(sealed))
        if sealed_size(segments.plain_size) != len(sealed):  # too short even for an empty segment
            raise IntegrityError("the last segment of these sealed bytes was cut short")
        return segments

    def place(self, index: int) -> slice:
        """Returns the range of a segment in the sealed file; the first includes the header."""
        return slice(index * SEGMENT, min((index + 1) * SEGMENT, self.sealed_size))

    def plain(self, index: int) -> slice:
        """Returns the range of a segment in the plaintext."""
        place, before = self.place(index), _HEADER + _TAG * index
        return slice(max(0, place.start - before), place.stop - before - _TAG)

    def seal(self, index: int, plain: memoryview, target: memoryview) -> None:
        """Seals one segment of the plaintext into `target`, the segment's range of the file."""
        body = target
        if index == 0:
            target[:_HEADER], body = self.header, target[_HEADER:]
        self._cipher.encrypt_into(self._nonce(index), plain[self.plain(index)], None, body)

    def open(self, index: int, sealed: memoryview, target: memoryview) -> None:
        """Opens one segment of the file into `target`, the segment's range of the plaintext.

        Raises:
            IntegrityError: the segment does not verify. The bytes in `target` are then not to be
                trusted.
        """
        place = self.place(index)
        body = sealed[max(_HEADER, place.start) : place.stop]
        try:
            self._cipher.decrypt_into(self._nonce(index), body, None, target)
        except InvalidTag:
            raise IntegrityError(
                f"segment {index} of {self.count} does not verify: the bytes were changed, or"
                " they were sealed under another key or in another context"
            ) from None

    def _nonce(self, index: int) -> bytes:
        return self._prefix + index.to_bytes(4, "big") + bytes([index == self.count - 1])


def in_order(work: Callable[[int], T], count: int) -> Generator[T]:
    """Yields `work(0)` to `work(count - 1)`, in this order.

    `work(i)` starts only after the reader has released result i - BUFFERS. Two threads work ahead
    of the reader; a small count uses none. Once the generator is closed or has raised, no thread
    is running.
    """
    if count < _THREADS_FROM:
        yield from map(work, range(count))
        return
    with ThreadPoolExecutor(_THREADS) as pool:  # the end of the block waits for running work
        ahead: deque[Future[T]] = deque()
        for index in range(count + BUFFERS - 1):
            if index < count:
                ahead.append(pool.submit(work, index))
            if index >= BUFFERS - 1:
                yield ahead.popleft().result()


def all_of(work: Callable[[int], None], count: int) -> None:
    """Runs `work(0)` to `work(count - 1)`, in any order.

    Raises the failure with the lowest number. On return, and after a failure, no thread is running.
    """
    if count < _THREADS_FROM:
        for index in range(count):
            work(index)
        return
    with ThreadPoolExecutor(_THREADS) as pool:  # the end of the block waits for running work
        for _ in pool.map(work, range(count)):
            pass


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    """Derives a 256-bit key by HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=_KEY, salt=salt, info=info).derive(key)
