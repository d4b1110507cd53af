"""Tests why a data key is committed to, and that another data key is refused."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB

from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import (
    check_commitment,
    commitment,
    new_key,
    seal,
    unseal,
    unwrap_key,
    wrap_key,
)
from tg_tinker.storage.segments import derive

KEY, CONTEXT = bytes(range(32)), b"artifact 7"


# --- one ciphertext, two keys ----------------------------------------------------------------
# Blocks are polynomials over GF(2), highest bit first (NIST SP 800-38D, section 6.3).


def times(x: int, y: int) -> int:
    product = 0
    for bit in range(127, -1, -1):
        product ^= y * (x >> bit & 1)
        y = y >> 1 ^ (0xE1 << 120) * (y & 1)
    return product


def inverse(x: int) -> int:
    """Returns x to the power of 2^128 - 2, that is 2 + 4 + ... + 2^127."""
    power, result = x, 1 << 127
    for _ in range(127):
        power = times(power, power)
        result = times(result, power)
    return result


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def tag(key: bytes, nonce: bytes, ciphertext: bytes, context: bytes) -> bytes:
    stream = AESGCM(key).encrypt(nonce, bytes(len(ciphertext)), None)[:-16]
    return AESGCM(key).encrypt(nonce, xor(ciphertext, stream), context)[-16:]


def hash_key(key: bytes) -> int:
    return int.from_bytes(Cipher(AES256(key), ECB()).encryptor().update(bytes(16)), "big")  # noqa: S305


def opens_under_both(one: bytes, other: bytes, nonce: bytes, start: bytes, context: bytes) -> bytes:
    """Returns `start` (whole blocks), a block that makes both keys' tags equal, and that tag.

    The last block adds itself times the square of the hash key to a tag. So it is the difference of
    both tags without the block, divided by the difference of both squares.
    """
    tags = [tag(key, nonce, start + bytes(16), context) for key in (one, other)]
    difference = int.from_bytes(xor(*tags), "big")
    squares = [times(h, h) for h in (hash_key(one), hash_key(other))]
    block = times(difference, inverse(squares[0] ^ squares[1])).to_bytes(16, "big")
    return start + block + tag(one, nonce, start + block, context)


def two_faced(keys: list[bytes]) -> bytes:
    """Returns a sealed file of our format that opens under both keys, in CONTEXT."""
    header = bytes([40]) + os.urandom(39)
    one, other = (derive(key, header[1:33], CONTEXT) for key in keys)
    return header + opens_under_both(one, other, header[33:] + b"\0\0\0\0\1", bytes(64), b"")


def test_a_file_can_open_under_two_keys_and_only_the_commitment_tells_them_apart() -> None:
    keys = [new_key(), new_key()]
    sealed = two_faced(keys)
    contents = [unseal(key, sealed, CONTEXT) for key in keys]
    assert contents[0] != contents[1]

    published = commitment(keys[0], CONTEXT)
    check_commitment(keys[0], CONTEXT, published)
    with pytest.raises(IntegrityError):
        check_commitment(keys[1], CONTEXT, published)


def test_a_wrapped_key_that_opens_under_two_keys_gives_one_data_key() -> None:
    keys = [new_key(), new_key()]
    nonce = os.urandom(12)
    body = opens_under_both(*keys, nonce, bytes(16), CONTEXT)
    data_keys = [AESGCM(key).decrypt(nonce, body, CONTEXT) for key in keys]
    assert [len(data_key) for data_key in data_keys] == [32, 32]

    wrapped = commitment(data_keys[0], CONTEXT) + nonce + body
    assert unwrap_key(keys[0], wrapped, CONTEXT) == data_keys[0]
    with pytest.raises(IntegrityError, match="not match its commitment"):
        unwrap_key(keys[1], wrapped, CONTEXT)


# --- the commitment --------------------------------------------------------------------------


def test_a_commitment_is_to_one_key_in_one_context() -> None:
    expected = commitment(KEY, CONTEXT)
    assert len(expected) == 32
    assert commitment(KEY, CONTEXT) == expected
    check_commitment(KEY, CONTEXT, expected)
    others = [
        (KEY[::-1], CONTEXT, expected), (KEY, b"artifact 8", expected), (KEY, b"", expected),
        (KEY, CONTEXT, expected[:-1]), (KEY, CONTEXT, b""), (KEY, CONTEXT, expected + b"\0"),
        (KEY, CONTEXT, bytes(32)),
    ]  # fmt: skip
    for key, context, committed in others:
        with pytest.raises(IntegrityError):
            check_commitment(key, context, committed)


def test_a_commitment_is_no_key_of_a_file_and_does_not_hold_the_key() -> None:
    """A segment key comes from the same derivation, under a salt that a forger may choose."""
    committed = commitment(KEY, CONTEXT)
    assert KEY not in committed
    for salt in (b"", bytes(32), CONTEXT):
        for info in (CONTEXT, b"", b"tg-tinker key commitment v1"):
            assert derive(KEY, salt, info) != committed


def test_a_wrapped_key_begins_with_its_commitment_whatever_key_wraps_it() -> None:
    data_key = new_key()
    for key in (KEY, new_key()):
        assert wrap_key(key, data_key, CONTEXT)[:32] == commitment(data_key, CONTEXT)


def test_the_commitment_of_another_data_key_or_context_is_refused() -> None:
    data_key = new_key()
    body = wrap_key(KEY, data_key, CONTEXT)[32:]
    for committed in (
        commitment(new_key(), CONTEXT), commitment(data_key, b"artifact 8"),
        commitment(KEY, CONTEXT), bytes(32),
    ):  # fmt: skip
        with pytest.raises(IntegrityError, match="not match its commitment"):
            unwrap_key(KEY, committed + body, CONTEXT)
    assert unwrap_key(KEY, commitment(data_key, CONTEXT) + body, CONTEXT) == data_key


def test_a_file_sealed_under_the_data_key_tells_nothing_of_the_commitment() -> None:
    assert commitment(KEY, CONTEXT) not in seal(KEY, b"weights", CONTEXT)
