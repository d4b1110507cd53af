"""Tests the envelope: what opens, and that nothing else does."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import (
    ALGORITHM,
    KEY_BYTES,
    context_of,
    new_key,
    open_payload,
    seal,
    seal_payload,
    unseal,
    unwrap_key,
    wrap_key,
)

quick = settings(max_examples=60, deadline=None)

MIB = 2**20
HEADER, TAG = 40, 16
FIRST, FULL = MIB - HEADER - TAG, MIB - TAG
"""Plaintext bytes of the first segment, and of each later one."""

KEY, CONTEXT = bytes(range(32)), b"artifact 7"
TEXT = b"weights of one run"

SIZES = [
    0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL - 1, FIRST + FULL, FIRST + FULL + 1, 3 * MIB,
]  # fmt: skip

TINK = {
    b"": "283fa58a4263ed7782b769bde90bd64895c5cbcbe1741f46eecbae738bbf04f3b00b0bae89e75547dae24d91"
    "98ff385aa90f4a86db7e8011",
    TEXT: "28a6e2384f2476a4dce105d2dd1b29b385a01d3b1c5aceedcc25109b820aaa123a58606558e7c16e15334a6"
    "acf8a9bbc1a7c2221c27a2415c9e6f862b87d450fee7769135bc11a82b598",
}
"""Written by Tink's AES256_GCM_HKDF_1MB under KEY, with CONTEXT as associated data."""


def segments(sealed: bytes) -> list[bytes]:
    return [sealed[start : start + MIB] for start in range(0, len(sealed), MIB)]


def decode(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """Decodes a file as an independent reader of the published format, straight on
    `cryptography`."""
    assert sealed[0] == HEADER
    salt, prefix = sealed[1:33], sealed[33:40]
    aes = AESGCM(HKDF(algorithm=SHA256(), length=32, salt=salt, info=context).derive(key))
    bodies = [sealed[HEADER:MIB], *segments(sealed)[1:]]
    plain = b""
    for index, body in enumerate(bodies):
        last = b"\x01" if index == len(bodies) - 1 else b"\x00"
        plain += aes.decrypt(prefix + index.to_bytes(4, "big") + last, body, None)
    return plain


# --- what opens ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_what_was_sealed_opens_here_and_with_an_independent_reader(size: int) -> None:
    plain = os.urandom(size)
    sealed = seal(KEY, plain, CONTEXT)
    assert unseal(KEY, sealed, CONTEXT) == plain
    assert decode(KEY, sealed, CONTEXT) == plain
    assert len(sealed) == HEADER + size + TAG * len(segments(sealed))


@quick
@given(st.binary(max_size=100), st.binary(max_size=20))
def test_any_bytes_in_any_context_come_back(plain: bytes, context: bytes) -> None:
    assert unseal(KEY, seal(KEY, plain, context), context) == plain


@pytest.mark.parametrize("plain", TINK)
def test_a_file_that_tink_wrote_opens(plain: bytes) -> None:
    assert unseal(KEY, bytes.fromhex(TINK[plain]), CONTEXT) == plain


def test_two_seals_of_one_text_share_no_bytes_to_compare() -> None:
    one, other = seal(KEY, TEXT, CONTEXT), seal(KEY, TEXT, CONTEXT)
    assert one[1:33] != other[1:33]
    assert one[33:40] != other[33:40]
    assert one[40:] != other[40:]


def test_the_plaintext_is_not_in_the_sealed_bytes() -> None:
    sealed = seal(KEY, TEXT * 10, CONTEXT)
    assert TEXT not in sealed
    assert CONTEXT not in sealed


def test_keys_are_256_bits_and_never_the_same() -> None:
    assert ALGORITHM == "AES256_GCM_HKDF_1MB"
    assert {len(new_key()) for _ in range(20)} == {KEY_BYTES} == {32}
    assert len({new_key() for _ in range(20)}) == 20


# --- what does not ---------------------------------------------------------------------------


def refused(sealed: bytes, key: bytes = KEY, context: bytes = CONTEXT) -> None:
    with pytest.raises(IntegrityError) as caught:
        unseal(key, sealed, context)
    assert TEXT.decode() not in str(caught.value)


def test_every_flipped_bit_pattern_of_every_byte_is_noticed() -> None:
    sealed = seal(KEY, TEXT, CONTEXT)
    for position in range(len(sealed)):
        for pattern in (0x01, 0x80, 0xFF):
            changed = bytearray(sealed)
            changed[position] ^= pattern
            refused(bytes(changed))


def test_every_truncation_and_every_appended_byte_of_a_small_file_is_noticed() -> None:
    sealed = seal(KEY, TEXT, CONTEXT)
    for length in range(len(sealed)):
        refused(sealed[:length])
    refused(sealed + b"\0")
    refused(sealed + sealed)
    refused(b"\0" + sealed)


@pytest.fixture(scope="module")
def long() -> bytes:
    """Returns four segments, the last one short, all others of equal content."""
    return seal(KEY, bytes(FIRST) + bytes(FULL) * 2 + TEXT, CONTEXT)


def test_truncation_at_or_near_every_segment_border_is_noticed(long: bytes) -> None:
    for border in range(MIB, len(long), MIB):
        for length in (border - 1, border, border + 1, border + TAG, border + TAG + 1):
            refused(long[:length])


def test_dropped_repeated_and_reordered_segments_are_noticed(long: bytes) -> None:
    a, b, c, d = segments(long)
    wrong_orders = (
        [a, b, d], [a, c, d], [a, d], [a, b, c], [b, c, d], [a, b, b, c, d], [a, b, c, c, d],
        [a, b, c, d, d], [a, c, b, d], [a, b, d, c], [a, b, c, d, a], [a, b, b, d],
    )  # fmt: skip
    for parts in wrong_orders:
        refused(b"".join(parts))
    assert len(unseal(KEY, a + b + c + d, CONTEXT)) == FIRST + 2 * FULL + len(TEXT)


def test_a_segment_of_another_file_under_the_same_key_is_noticed(long: bytes) -> None:
    a, b, c, d = segments(long)
    other = segments(seal(KEY, bytes(FIRST) + bytes(FULL) * 2 + TEXT, CONTEXT))
    refused(a + other[1] + c + d)
    refused(a + b + c + other[3])
    refused(other[0] + b + c + d)


def test_appended_bytes_after_a_long_file_are_noticed(long: bytes) -> None:
    for extra in (b"\0", bytes(TAG), bytes(MIB)):
        refused(long + extra)
    full = seal(KEY, bytes(FIRST), CONTEXT)
    refused(full + b"\0")
    refused(full + full)


def test_another_key_or_context_does_not_open() -> None:
    sealed = seal(KEY, TEXT, CONTEXT)
    for key in (bytes(32), KEY[::-1], KEY[:-1], KEY + b"\0", b""):
        refused(sealed, key=key)
    for context in (b"", b"artifact 8", CONTEXT + b" ", CONTEXT[:-1]):
        refused(sealed, context=context)


def test_other_files_are_refused() -> None:
    for junk in (b"", b"(", b"PK\x03\x04" * 30, bytes(100), bytes([HEADER]) * 100, bytes(2 * MIB)):
        refused(junk)


def test_contexts_of_two_places_never_meet() -> None:
    """They differ even when tenant, artifact and name only differ in where one of them ends."""
    places = [
        ("a", "b", "c"), ("a", "d", "c"), ("ab", "", "c"), ("a", "bc", ""), ("a", "b", "d"),
        ("b", "a", "c"), ('a", "artifact": "b', "", "c"), ("ä", "b", "c"),
    ]  # fmt: skip
    assert len({context_of(*place) for place in places}) == len(places)


# --- data keys -------------------------------------------------------------------------------


def test_a_wrapped_key_comes_back_under_its_key_and_context_only() -> None:
    data_key = new_key()
    wrapped = wrap_key(KEY, data_key, CONTEXT)
    assert unwrap_key(KEY, wrapped, CONTEXT) == data_key
    assert data_key not in wrapped
    assert wrap_key(KEY, data_key, CONTEXT) != wrapped
    for key, context in ((bytes(32), CONTEXT), (KEY, b"artifact 8"), (KEY, b""), (b"", CONTEXT)):
        with pytest.raises(IntegrityError):
            unwrap_key(key, wrapped, context)


def test_a_wrapped_key_with_any_byte_changed_or_missing_is_noticed() -> None:
    wrapped = wrap_key(KEY, new_key(), CONTEXT)
    for position in range(len(wrapped)):
        changed = bytearray(wrapped)
        changed[position] ^= 1
        for broken in (bytes(changed), wrapped[:position], wrapped + wrapped[:position] + b"\0"):
            with pytest.raises(IntegrityError):
                unwrap_key(KEY, broken, CONTEXT)


# --- payloads --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 5, "text", [1, (2, b"3")], {"a": {1, 2}}, bytes(2 * MIB)])
def test_a_payload_comes_back(value: Any) -> None:
    sealed = seal_payload(KEY, value)
    assert open_payload(KEY, sealed) == value


def test_a_payload_under_another_key_or_changed_is_refused() -> None:
    sealed = seal_payload(KEY, TEXT)
    for key, content in ((bytes(32), sealed), (KEY, sealed[:-1]), (KEY, sealed + b"\0")):
        with pytest.raises(IntegrityError):
            open_payload(key, content)


def test_a_sealed_file_does_not_pass_as_a_payload_nor_the_reverse() -> None:
    pickled = pickle.dumps(TEXT, protocol=5)
    with pytest.raises(IntegrityError):
        open_payload(KEY, seal(KEY, pickled, CONTEXT))
    with pytest.raises(IntegrityError):
        unseal(KEY, seal_payload(KEY, TEXT), CONTEXT)


RAN: list[str] = []


def run(what: str) -> None:
    RAN.append(what)


class Attack:
    """An object that runs code wherever it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return run, ("attack",)


def test_a_pickle_of_someone_without_the_key_is_never_run() -> None:
    RAN.clear()
    bare = pickle.dumps(Attack(), protocol=5)
    payload = seal_payload(bytes(32), Attack())
    own = bytearray(seal_payload(KEY, Attack()))
    own[-1] ^= 1
    for sealed in (payload, bare, bytes([HEADER]) + bare, bytes(own)):
        with pytest.raises(IntegrityError):
            open_payload(KEY, sealed)
    assert RAN == []
    open_payload(KEY, seal_payload(KEY, Attack()))
    assert RAN == ["attack"], "the pickle above would not have run anywhere"
