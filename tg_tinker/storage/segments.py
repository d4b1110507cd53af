"""The segments of a sealed file, and the threads that work on them.

Tink's streaming AEAD, AES256_GCM_HKDF_1MB, as published
(https://developers.google.com/tink/streaming-aead/aes_gcm_hkdf_streaming): a header of 40 bytes
(its length, a salt of 32, a nonce prefix of 7), then segments of 1 MiB, the header counted into
the first. The segment key is HKDF-SHA256(key, salt, info=context); a segment's nonce is prefix,
big-endian index, and 1 for the last one, so dropped, reordered, repeated or appended segments
fail, and so does any other context.
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
"""Results of `in_order` that exist at a time: one is the reader's, one is ready."""

_KEY, _SALT, _PREFIX, _TAG = 32, 32, 7, 16
_HEADER = 1 + _SALT + _PREFIX
_THREADS = 2  # faster than disks write, and no more of a training actor's cores
_THREADS_FROM = 32  # segments; to start threads for fewer costs more than it saves

T = TypeVar("T")


def sealed_size(size: int) -> int:
    """Bytes that `size` bytes take when sealed: 40 more, and 16 for each segment."""
    beyond_first = max(0, size - (SEGMENT - _HEADER - _TAG))
    return _HEADER + size + _TAG * (1 + -(-beyond_first // (SEGMENT - _TAG)))


class Segments:
    """The segments of one sealed file, counted from 0: where each lies, and their cipher.

    Attributes:
        header: the first 40 bytes of the file.
        count: of segments, at least 1.
        sealed_size, plain_size: bytes of the whole file.
    """

    def __init__(self, key: bytes, context: bytes, header: bytes, sealed_size: int) -> None:
        self.header, self.sealed_size = header, sealed_size
        self.count = -(-sealed_size // SEGMENT)
        self.plain_size = sealed_size - _HEADER - _TAG * self.count
        salt, self._prefix = header[1 : 1 + _SALT], header[1 + _SALT :]
        self._cipher = AESGCM(derive(key, salt, context))

    @classmethod
    def new(cls, key: bytes, context: bytes, plain_size: int) -> Segments:
        """Of a file to be sealed, under a salt and a prefix that were never used."""
        header = bytes([_HEADER]) + secrets.token_bytes(_SALT + _PREFIX)
        return cls(key, context, header, sealed_size(plain_size))

    @classmethod
    def of(cls, key: bytes, context: bytes, sealed: memoryview) -> Segments:
        """Of a sealed file.

        Raises:
            IntegrityError: no file of this format has such a header and size.
        """
        if len(sealed) < _HEADER + _TAG or sealed[0] != _HEADER:
            raise IntegrityError("these bytes are not a sealed file of this format, or cut short")
        segments = cls(key, context, bytes(sealed[:_HEADER]), len(sealed))
        if sealed_size(segments.plain_size) != len(sealed):  # not even with an empty last segment
            raise IntegrityError("the last segment of these sealed bytes is cut short")
        return segments

    def place(self, index: int) -> slice:
        """Where a segment lies in the file, the header counted into the first."""
        return slice(index * SEGMENT, min((index + 1) * SEGMENT, self.sealed_size))

    def plain(self, index: int) -> slice:
        """Where it lies in the plaintext."""
        place, before = self.place(index), _HEADER + _TAG * index
        return slice(max(0, place.start - before), place.stop - before - _TAG)

    def seal(self, index: int, plain: memoryview, target: memoryview) -> None:
        """Seals a segment of the plaintext into `target`: its place in the file."""
        body = target
        if index == 0:
            target[:_HEADER], body = self.header, target[_HEADER:]
        self._cipher.encrypt_into(self._nonce(index), plain[self.plain(index)], None, body)

    def open(self, index: int, sealed: memoryview, target: memoryview) -> None:
        """Opens a segment of the file into `target`: its place in the plaintext.

        Raises:
            IntegrityError: it does not verify; what `target` holds then is not to be trusted.
        """
        place = self.place(index)
        body = sealed[max(_HEADER, place.start) : place.stop]
        try:
            self._cipher.decrypt_into(self._nonce(index), body, None, target)
        except InvalidTag:
            raise IntegrityError(
                f"segment {index} of {self.count} does not verify: the bytes were changed, or"
                " they were sealed under another key or for another place"
            ) from None

    def _nonce(self, index: int) -> bytes:
        return self._prefix + index.to_bytes(4, "big") + bytes([index == self.count - 1])


def in_order(work: Callable[[int], T], count: int) -> Generator[T]:
    """`work(0)`, `work(1)`, ... of `count`; work(i) starts after the reader left i - BUFFERS.

    Two threads work ahead, none for a small count. Once the generator is closed or has raised,
    no thread is at work any more.
    """
    if count < _THREADS_FROM:
        yield from map(work, range(count))
        return
    with ThreadPoolExecutor(_THREADS) as pool:  # its end waits for what still runs
        ahead: deque[Future[T]] = deque()
        for index in range(count + BUFFERS - 1):
            if index < count:
                ahead.append(pool.submit(work, index))
            if index >= BUFFERS - 1:
                yield ahead.popleft().result()


def all_of(work: Callable[[int], None], count: int) -> None:
    """`work(0)` to `work(count - 1)`, in any order; the first failure by number is raised.

    No thread is at work afterwards, whatever happened.
    """
    if count < _THREADS_FROM:
        for index in range(count):
            work(index)
        return
    with ThreadPoolExecutor(_THREADS) as pool:  # its end waits for what still runs
        for _ in pool.map(work, range(count)):
            pass


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    """Another 256-bit key: HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=_KEY, salt=salt, info=info).derive(key)
