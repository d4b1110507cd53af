"""Tests sealing and opening large files: in order, in bounded memory, with nothing left after a
failure."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import IntegrityError
from tg_tinker.storage import segments
from tg_tinker.storage.envelope import Buffer, seal, sealed_parts, unseal
from tg_tinker.storage.segments import BUFFERS, SEGMENT, Segments, sealed_size

KEY, CONTEXT = bytes(range(32)), b"artifact 7"
HEADER, TAG = 40, 16
FIRST, FULL = SEGMENT - HEADER - TAG, SEGMENT - TAG
COUNT = 3 * BUFFERS
"""Segments of the long file."""


@pytest.fixture(scope="module")
def plain() -> bytes:
    """Returns bytes of which no two segments are equal, and no segment holds zeros only."""
    return os.urandom(FIRST + (COUNT - 2) * FULL + 1000)


@pytest.fixture(params=["threads", "no threads"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_THREADS_FROM", 2 if request.param == "threads" else 10**9)


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_THREADS_FROM", 2)


class Cipher:
    """AES-GCM that shows each call to a test, by its segment, and the buffer that was opened
    into."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: Callable[[int], None] = lambda index: None
        self.started: list[int] = []
        self.buffers: dict[int, memoryview] = {}
        monkeypatch.setattr(segments, "AESGCM", self._made)

    def _made(self, key: bytes) -> Cipher:
        self._cipher = AESGCM(key)
        return self

    def encrypt_into(self, nonce: bytes, data: Buffer, extra: None, buffer: memoryview) -> int:
        self._called(nonce)
        return self._cipher.encrypt_into(nonce, data, extra, buffer)

    def decrypt_into(self, nonce: bytes, data: Buffer, extra: None, buffer: memoryview) -> int:
        self.buffers[self._called(nonce)] = buffer
        return self._cipher.decrypt_into(nonce, data, extra, buffer)

    def _called(self, nonce: bytes) -> int:
        index = int.from_bytes(nonce[7:11], "big")
        self.started.append(index)
        self.before(index)
        return index


@pytest.fixture
def cipher(monkeypatch: pytest.MonkeyPatch) -> Cipher:
    return Cipher(monkeypatch)


def joined(parts: Iterator[memoryview]) -> bytes:
    return b"".join(bytes(part) for part in parts)


def damaged(sealed: bytes, index: int) -> bytes:
    changed = bytearray(sealed)
    changed[index * SEGMENT + 100] ^= 1
    return bytes(changed)


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    "size", [0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL, FIRST + FULL + 1, 9 * SEGMENT]
)
def test_parts_are_the_sealed_file_cut_at_every_mebibyte(size: int) -> None:
    plain = os.urandom(size)
    parts = [bytes(part) for part in sealed_parts(KEY, plain, CONTEXT)]
    assert unseal(KEY, b"".join(parts), CONTEXT) == plain
    assert [len(part) for part in parts[:-1]] == [SEGMENT] * (len(parts) - 1)
    assert sum(map(len, parts)) == len(seal(KEY, plain, CONTEXT)) == sealed_size(size)


@given(st.integers(0, 3 * SEGMENT) | st.integers(0, 2**45))
def test_every_size_has_one_sealed_size_and_the_segments_cover_it(size: int) -> None:
    file = Segments(KEY, CONTEXT, bytes(HEADER), sealed_size(size))
    assert file.plain_size == size
    assert file.count == 1 + max(0, -(-(size - FIRST) // FULL))
    for index in {0, file.count // 2, file.count - 2} if file.count > 2 else range(file.count - 1):
        assert file.place(index).stop == file.place(index + 1).start == (index + 1) * SEGMENT
        assert file.plain(index).stop == file.plain(index + 1).start == FIRST + index * FULL
    assert (file.plain(0).start, file.plain(file.count - 1).stop) == (0, size)
    assert file.place(file.count - 1).stop == sealed_size(size)


@pytest.mark.usefixtures("threaded")
def test_parts_come_in_order_however_long_each_takes(cipher: Cipher, plain: bytes) -> None:
    cipher.before = lambda index: time.sleep(0.02 * (index % 2 == 0))
    assert unseal(KEY, joined(sealed_parts(KEY, plain, CONTEXT)), CONTEXT) == plain


@pytest.mark.usefixtures("threaded")
def test_a_slow_reader_finds_its_part_unchanged_and_few_parts_ahead(
    cipher: Cipher, plain: bytes
) -> None:
    taken = []
    for number, part in enumerate(sealed_parts(KEY, plain, CONTEXT)):
        before = bytes(part)
        time.sleep(0.02)  # for the threads to go as far as they may
        assert part == before
        assert max(cipher.started) < number + BUFFERS
        taken.append(before)
    assert unseal(KEY, b"".join(taken), CONTEXT) == plain


@pytest.mark.usefixtures("either_way")
def test_a_part_that_is_kept_is_an_error_not_another_parts_bytes(plain: bytes) -> None:
    parts = sealed_parts(KEY, plain, CONTEXT)
    kept = next(parts)
    next(parts)
    with pytest.raises(ValueError, match="released"):
        bytes(kept)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("view", [lambda part: part[5:], np.frombuffer, memoryview])
def test_a_view_of_a_part_that_is_kept_stops_the_sealing(
    plain: bytes, view: Callable[[memoryview], Any]
) -> None:
    threads = threading.active_count()
    parts = sealed_parts(KEY, plain, CONTEXT)
    kept = view(next(parts))
    before = bytes(kept)
    with pytest.raises(BufferError) as caught:
        next(parts)
    assert bytes(kept) == before
    assert threading.active_count() == threads, f"still at work after {caught!r}"


@pytest.mark.usefixtures("threaded")
def test_a_reader_that_leaves_early_or_fails_leaves_no_thread(plain: bytes) -> None:
    before = threading.active_count()

    def write() -> None:
        for number, _ in enumerate(sealed_parts(KEY, plain, CONTEXT)):
            assert threading.active_count() > before
            if number == 2:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        write()
    assert threading.active_count() == before
    parts = sealed_parts(KEY, plain, CONTEXT)
    next(parts)
    parts.close()
    assert threading.active_count() == before


@pytest.mark.usefixtures("threaded")
def test_an_error_in_a_thread_reaches_the_reader(cipher: Cipher, plain: bytes) -> None:
    def fail(index: int) -> None:
        if index == 5:
            raise MemoryError

    cipher.before = fail
    parts = sealed_parts(KEY, plain, CONTEXT)
    for _ in range(5):
        next(parts)
    with pytest.raises(MemoryError):
        next(parts)


def test_a_small_file_costs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ThreadPoolExecutor", None)
    plain = os.urandom(2 * SEGMENT)
    assert unseal(KEY, seal(KEY, plain, CONTEXT), CONTEXT) == plain
    assert unseal(KEY, joined(sealed_parts(KEY, plain, CONTEXT)), CONTEXT) == plain


# --- memory ----------------------------------------------------------------------------------


def peak(work: Callable[[], Any]) -> int:
    """Returns the largest number of bytes that were held, beyond those before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("either_way")
def test_the_ciphertext_of_a_file_never_exists_whole(plain: bytes) -> None:
    def write() -> None:
        for part in sealed_parts(KEY, plain, CONTEXT):
            assert part.nbytes <= SEGMENT

    assert peak(write) < (BUFFERS + 0.5) * SEGMENT


@pytest.mark.usefixtures("either_way")
def test_whole_results_are_made_in_the_one_buffer_that_is_returned(plain: bytes) -> None:
    sealed = seal(KEY, plain, CONTEXT)
    assert peak(lambda: seal(KEY, plain, CONTEXT)) < len(sealed) + SEGMENT / 2
    assert peak(lambda: unseal(KEY, sealed, CONTEXT)) < len(plain) + SEGMENT / 2


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_any_contiguous_memory_is_sealed_and_opened_as_its_bytes(
    form: Callable[[bytes], Buffer],
) -> None:
    numbers = array("d", range(1000))
    for given_as in (form(numbers.tobytes()), memoryview(numbers)):
        sealed = seal(KEY, given_as, CONTEXT)
        assert unseal(KEY, form(sealed), CONTEXT) == numbers.tobytes()
        assert type(unseal(KEY, form(sealed), CONTEXT)) is bytes
        in_parts = joined(sealed_parts(KEY, given_as, CONTEXT))
        assert unseal(KEY, in_parts, CONTEXT) == numbers.tobytes()


# --- failures --------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("index", [0, 1, COUNT - 2, COUNT - 1])
def test_no_plaintext_is_left_where_a_segment_did_not_verify(
    cipher: Cipher, plain: bytes, index: int
) -> None:
    sealed = seal(KEY, plain, CONTEXT)
    with pytest.raises(IntegrityError, match=f"segment {index} of {COUNT} "):
        unseal(KEY, damaged(sealed, index), CONTEXT)
    assert index in cipher.buffers
    assert not any(any(buffer) for buffer in cipher.buffers.values())


@pytest.mark.usefixtures("threaded")
def test_it_is_wiped_after_the_last_thread_wrote(cipher: Cipher, plain: bytes) -> None:
    """The first segment fails at once, while another one is still being opened."""
    sealed = seal(KEY, plain, CONTEXT)
    cipher.before = lambda index: time.sleep(0.1 * (index > 0))
    with pytest.raises(IntegrityError, match="segment 0"):
        unseal(KEY, damaged(sealed, 0), CONTEXT)
    time.sleep(0.2)
    assert len(cipher.buffers) > 1
    assert not any(any(buffer) for buffer in cipher.buffers.values())


@pytest.mark.usefixtures("either_way")
def test_an_interrupt_wipes_too(cipher: Cipher, plain: bytes) -> None:
    sealed = seal(KEY, plain, CONTEXT)

    def interrupt(index: int) -> None:
        if index == COUNT - 1:
            raise KeyboardInterrupt

    cipher.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        unseal(KEY, sealed, CONTEXT)
    assert len(cipher.buffers) == COUNT - 1
    assert not any(any(buffer) for buffer in cipher.buffers.values())


def test_the_library_really_leaves_what_it_could_not_authenticate() -> None:
    """This is the reason why there is anything to wipe."""
    aes, nonce = AESGCM(KEY), bytes(12)
    sealed, buffer = bytearray(aes.encrypt(nonce, b"weights", None)), bytearray(7)
    sealed[-1] ^= 1
    with pytest.raises(InvalidTag):
        aes.decrypt_into(nonce, sealed, None, buffer)
    assert buffer == b"weights"


def test_a_file_has_one_form_an_empty_last_segment_is_refused() -> None:
    """Somebody with the key made this file as no writer makes it: with a last segment that holds
    no plaintext."""
    header = bytes([HEADER]) + os.urandom(39)
    aes = AESGCM(segments.derive(KEY, header[1:33], CONTEXT))
    first = aes.encrypt(header[33:] + bytes(5), bytes(FIRST), None)
    last = aes.encrypt(header[33:] + bytes([0, 0, 0, 1, 1]), b"", None)
    with pytest.raises(IntegrityError, match="cut short"):
        unseal(KEY, header + first + last, CONTEXT)
