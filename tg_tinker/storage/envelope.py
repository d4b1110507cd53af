"""Sealing bytes: keys and contexts, files and payloads. It opens no files.

    key = new_key()
    assert unseal(key, seal(key, b"weights", b"artifact 7"), b"artifact 7") == b"weights"

The form of sealed bytes is Tink's, see `segments`. This file and that one are the only doors to
`cryptography`. Its cipher works without Python's lock, so two threads seal and open a large file.
"""

from __future__ import annotations

import io
import json
import pickle
import secrets
from collections.abc import Generator
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from tg_tinker.errors import IntegrityError
from tg_tinker.storage.segments import BUFFERS, SEGMENT, Segments, all_of, derive, in_order

ALGORITHM = "AES256_GCM_HKDF_1MB"
FORMAT_VERSION = 1
KEY_BYTES = 32

Buffer = bytes | bytearray | memoryview
"""Contiguous memory; an array comes in as `memoryview(array)`."""

_NONCE = 12
_PAYLOAD = b"tg-tinker payload v1"
_COMMITMENT = b"tg-tinker key commitment v1"
_MANIFEST = b"tg-tinker manifest v1"


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


# --- files -------------------------------------------------------------------------------------


def seal(key: bytes, plaintext: Buffer, context: bytes) -> bytes:
    """Ciphertext of `plaintext`, bound to `context`; `segments.sealed_size` tells how long."""
    plain = memoryview(plaintext).cast("B")
    segments = Segments.new(key, context, len(plain))
    whole = io.BytesIO(bytes(segments.sealed_size))
    with whole.getbuffer() as target:
        all_of(lambda i: segments.seal(i, plain, target[segments.place(i)]), segments.count)
    return whole.getvalue()  # the bytes themselves, not a copy


def sealed_parts(key: bytes, plaintext: Buffer, context: bytes) -> Generator[memoryview]:
    """What `seal` returns, in parts of 1 MiB, so that a large file is written as it is sealed.

    Up to three parts are sealed ahead of the reader, into four buffers that are used again. So a
    part is released when the next one is asked for: write or copy it before, and keep no view.

    Raises:
        BufferError: the reader still holds a slice or an array of the part before.
    """
    plain = memoryview(plaintext).cast("B")
    segments = Segments.new(key, context, len(plain))
    size = min(SEGMENT, segments.sealed_size)
    buffers = [io.BytesIO(bytes(size)) for _ in range(min(BUFFERS, segments.count))]

    def part(index: int) -> memoryview:
        place = segments.place(index)
        target = buffers[index % BUFFERS].getbuffer()[: place.stop - place.start]
        segments.seal(index, plain, target)
        return target

    for index, sealed in enumerate(in_order(part, segments.count)):
        with sealed:  # whoever keeps it meets an error, not the bytes of a later part
            yield sealed
        buffers[index % BUFFERS].truncate(size)  # changes nothing; fails if a view is left


def unseal(key: bytes, sealed: Buffer, context: bytes) -> bytes:
    """The plaintext, handed out only after the last segment verified.

    Raises:
        IntegrityError: another key or context, or any changed, missing or added byte. What was
            decrypted by then is overwritten with zeros.
    """
    source = memoryview(sealed).cast("B")
    segments = Segments.of(key, context, source)
    whole = io.BytesIO(bytes(segments.plain_size))
    with whole.getbuffer() as target:
        try:
            all_of(lambda i: segments.open(i, source, target[segments.plain(i)]), segments.count)
        except BaseException:
            # `decrypt_into` leaves behind what it could not authenticate.
            for start in range(0, len(target), SEGMENT):
                target[start : start + SEGMENT] = bytes(len(target[start : start + SEGMENT]))
            raise
    return whole.getvalue()  # the bytes themselves, not a copy


# --- keys --------------------------------------------------------------------------------------


def commitment(key: bytes, context: bytes) -> bytes:
    """32 public bytes that fix `key` in `context`: HKDF-SHA256 under a salt of its own.

    AES-GCM does not commit to its key: whoever knows two keys can make one file that opens under
    both, to different contents (Albertini et al., "How to Abuse and Fix Authenticated Encryption
    Without Key Commitment", USENIX Security 2022). To find two keys with one commitment is to
    find a collision in SHA-256. The AWS Encryption SDK commits to its data key in the same way.
    """
    return derive(key, _COMMITMENT, context)


def manifest_key(key: bytes) -> bytes:
    """The key that authenticates an artifact's manifest, out of its data key."""
    return derive(key, _MANIFEST, b"")


def check_commitment(key: bytes, context: bytes, expected: bytes) -> None:
    """To be called before anything is opened with `key`; takes the same time for any `expected`.

    Raises:
        IntegrityError: `expected` was made of another key or for another context.
    """
    if not secrets.compare_digest(commitment(key, context), expected):
        raise IntegrityError(
            "the data key is not the one that was committed to: the wrapped key or the manifest"
            " was exchanged"
        )


def wrap_key(key: bytes, data_key: bytes, context: bytes) -> bytes:
    """`data_key` under `key`, bound to `context`: 60 bytes more than the key.

    The commitment to `data_key` (32), a random nonce (12), then AES-256-GCM with `context` as
    associated data. The commitment is here, in the one form in which a data key is stored: so
    every reader checks it, and a rotation of `key` leaves it as it is, to be compared with a
    manifest's without any key.
    """
    nonce = secrets.token_bytes(_NONCE)
    wrapped = AESGCM(key).encrypt(nonce, data_key, context)
    return commitment(data_key, context) + nonce + wrapped


def unwrap_key(key: bytes, wrapped: bytes, context: bytes) -> bytes:
    """The data key, after it was compared with its commitment.

    Raises:
        IntegrityError: another key or context, or changed bytes.
    """
    committed, sealed = wrapped[:KEY_BYTES], wrapped[KEY_BYTES:]
    try:
        data_key = AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], context)
    except (InvalidTag, ValueError):
        raise IntegrityError(
            "the wrapped data key does not open: it belongs to another artifact or keyring"
        ) from None
    check_commitment(data_key, context, committed)
    return data_key


# --- payloads ----------------------------------------------------------------------------------


def seal_payload(key: bytes, value: Any) -> bytes:
    """Any value as bytes that may enter Ray's object store, its spill files and its wires."""
    return seal(key, pickle.dumps(value, protocol=5), _PAYLOAD)


def open_payload(key: bytes, sealed: bytes) -> Any:
    """The value; unpickled only once its bytes are known to come from a holder of the key."""
    return pickle.loads(unseal(key, sealed, _PAYLOAD))  # noqa: S301


def derive_key(key: bytes, purpose: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) without salt: a key of its own for each purpose."""
    return derive(key, b"", purpose)


def new_signing_key() -> bytes:
    """A fresh Ed25519 key (RFC 8032), PEM (PKCS #8)."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_key_of(signing_key: bytes) -> bytes:
    """The public half, PEM (SubjectPublicKeyInfo)."""
    public = _signing(signing_key).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign(signing_key: bytes, message: bytes) -> bytes:
    """Ed25519 signature, 64 bytes. The caller separates domains by what the message begins with."""
    return _signing(signing_key).sign(message)


def check_signature(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Raises IntegrityError unless the holder of the signing key signed exactly this message."""
    try:
        known = load_pem_public_key(public_key)
    except ValueError:
        raise IntegrityError("the public key is no PEM file: take the audit.pub of init") from None
    if not isinstance(known, Ed25519PublicKey):
        raise IntegrityError("the public key is of another kind than Ed25519")
    try:
        known.verify(signature, message)
    except InvalidSignature:
        raise IntegrityError(
            "the signature does not verify: what was signed was changed, or another key signed it"
        ) from None


def _signing(signing_key: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(signing_key, password=None)
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise IntegrityError("the signing key is damaged: put its backup back") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise IntegrityError("the signing key is of another kind than Ed25519")
    return key
