"""Sealing bytes: the only door to `cryptography`. It knows keys and contexts, no files.

    key = new_key()
    assert unseal(key, seal(key, b"weights", b"artifact 7"), b"artifact 7") == b"weights"

`seal` writes the published wire format of Tink's streaming AEAD, AES256_GCM_HKDF_1MB
(https://developers.google.com/tink/streaming-aead): a header of 40 bytes (its length, a salt of
32, a nonce prefix of 7), then segments of 1 MiB, the header counted into the first. The segment
key is HKDF-SHA256(key, salt, info=context); a segment's nonce is prefix, big-endian index, and
1 for the last one, so dropped, reordered, repeated or appended segments fail, and so does any
other context.
"""

from __future__ import annotations

import json
import pickle
import secrets
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tg_tinker.errors import IntegrityError

ALGORITHM = "AES256_GCM_HKDF_1MB"
FORMAT_VERSION = 1
KEY_BYTES = 32

_SALT, _PREFIX, _TAG = 32, 7, 16
_HEADER = 1 + _SALT + _PREFIX
_SEGMENT = 2**20
_PAYLOAD = b"tg-tinker payload v1"


def new_key() -> bytes:
    """A fresh 256-bit key from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def keystream(size: int) -> bytes:
    """Fresh random bytes: AES-256 in counter mode under a key that is used once and forgotten."""
    cipher = Cipher(AES256(new_key()), CTR(secrets.token_bytes(16)))
    return cipher.encryptor().update(bytes(size))


def context_of(tenant: str, artifact_id: str, name: str) -> bytes:
    """What a stored file or key is bound to: it opens in no other place."""
    place = {"format": FORMAT_VERSION, "tenant": tenant, "artifact": artifact_id, "file": name}
    return json.dumps(place, sort_keys=True).encode()


def seal(key: bytes, plaintext: bytes, context: bytes) -> bytes:
    """Ciphertext of `plaintext`, bound to `context`; 40 bytes header, 16 per MiB longer."""
    salt, prefix = secrets.token_bytes(_SALT), secrets.token_bytes(_PREFIX)
    cipher = AESGCM(_segment_key(key, salt, context))
    view = memoryview(plaintext)
    starts = [0, *range(_SEGMENT - _HEADER - _TAG, len(view), _SEGMENT - _TAG)]
    parts = [bytes([_HEADER]) + salt + prefix]
    for index, start in enumerate(starts):
        last = index == len(starts) - 1
        stop = len(view) if last else starts[index + 1]
        parts.append(cipher.encrypt(_nonce(prefix, index, last), view[start:stop], None))
    return b"".join(parts)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """The plaintext, handed out only after the last segment verified.

    Raises:
        IntegrityError: another key or context, or any changed, missing or added byte.
    """
    if len(sealed) < _HEADER + _TAG or sealed[0] != _HEADER:
        raise IntegrityError("these bytes are not a sealed file of this format, or cut short")
    view = memoryview(sealed)
    salt, prefix = bytes(view[1 : 1 + _SALT]), bytes(view[1 + _SALT : _HEADER])
    cipher = AESGCM(_segment_key(key, salt, context))
    starts = [_HEADER, *range(_SEGMENT, len(view), _SEGMENT)]
    parts = []
    for index, start in enumerate(starts):
        last = index == len(starts) - 1
        stop = len(view) if last else starts[index + 1]
        try:
            parts.append(cipher.decrypt(_nonce(prefix, index, last), view[start:stop], None))
        except (InvalidTag, ValueError):
            raise IntegrityError(
                f"segment {index} of {len(starts)} does not verify: the bytes were changed, or"
                " they were sealed under another key or for another place"
            ) from None
    return b"".join(parts)


def wrap_key(key: bytes, data_key: bytes, context: bytes) -> bytes:
    """`data_key` under `key` (AES-256-GCM, random nonce first), bound to `context`."""
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, data_key, context)


def unwrap_key(key: bytes, wrapped: bytes, context: bytes) -> bytes:
    """The data key.

    Raises:
        IntegrityError: another key or context, or changed bytes.
    """
    try:
        return AESGCM(key).decrypt(wrapped[:12], wrapped[12:], context)
    except (InvalidTag, ValueError):
        raise IntegrityError(
            "the wrapped data key does not open: it belongs to another artifact or keyring"
        ) from None


def seal_payload(key: bytes, value: Any) -> bytes:
    """Any value as bytes that may enter Ray's object store, its spill files and its wires."""
    return seal(key, pickle.dumps(value, protocol=5), _PAYLOAD)


def open_payload(key: bytes, sealed: bytes) -> Any:
    """The value; unpickled only once its bytes are known to come from a holder of the key."""
    return pickle.loads(unseal(key, sealed, _PAYLOAD))  # noqa: S301


def _segment_key(key: bytes, salt: bytes, context: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=context).derive(key)


def _nonce(prefix: bytes, index: int, last: bool) -> bytes:
    return prefix + index.to_bytes(4, "big") + bytes([last])
