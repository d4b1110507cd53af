"""Seals and opens bytes: keys and contexts, files and payloads. It touches no file on disk.

    key = new_key()
    assert unseal(key, seal(key, b"weights", b"artifact 7"), b"artifact 7") == b"weights"

Sealed bytes have Tink's format, see `segments`. Only this module and `segments` import
`cryptography`. Its cipher releases Python's lock, so two threads seal or open a large file.
"""

from __future__ import annotations

import hmac
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
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
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
"""Contiguous memory; pass an array as `memoryview(array)`."""

_NONCE = 12
_PAYLOAD = b"tg-tinker payload v1"
_COMMITMENT = b"tg-tinker key commitment v1"
_MANIFEST = b"tg-tinker manifest v1"


def new_key() -> bytes:
    """Returns a fresh 256-bit key from the operating system's random source."""
    return secrets.token_bytes(KEY_BYTES)


def permuted(key: bytes, blocks: bytes) -> bytes:
    """Returns AES-256 of each block of 16 bytes (FIPS 197): a pseudorandom permutation of them.

    Equal blocks give equal results. It is for pseudorandom numbers, and hides no data.
    """
    cipher = Cipher(AES256(key), ECB()).encryptor()  # noqa: S305
    return cipher.update(blocks) + cipher.finalize()


def keystream(size: int) -> bytes:
    """Returns `size` fresh random bytes: AES-256 in counter mode under a key that is used once."""
    cipher = Cipher(AES256(new_key()), CTR(secrets.token_bytes(16)))
    return cipher.encryptor().update(bytes(size))


def context_of(tenant: str, artifact_id: str, name: str) -> bytes:
    """Returns the context that binds a stored file or key to its tenant, artifact and name.

    What is sealed under one context does not open under another.
    """
    place = {"format": FORMAT_VERSION, "tenant": tenant, "artifact": artifact_id, "file": name}
    return json.dumps(place, sort_keys=True).encode()


# --- files -------------------------------------------------------------------------------------


def seal(key: bytes, plaintext: Buffer, context: bytes) -> bytes:
    """Returns the ciphertext of `plaintext`, bound to `context`.

    `segments.sealed_size` returns its length.
    """
    plain = memoryview(plaintext).cast("B")
    segments = Segments.new(key, context, len(plain))
    whole = io.BytesIO(bytes(segments.sealed_size))
    with whole.getbuffer() as target:
        all_of(lambda i: segments.seal(i, plain, target[segments.place(i)]), segments.count)
    return whole.getvalue()  # shares the buffer: no copy is made


def sealed_parts(key: bytes, plaintext: Buffer, context: bytes) -> Generator[memoryview]:
    """Yields the bytes that `seal` returns in parts of 1 MiB, so that sealing and writing overlap.

    Up to three parts are sealed ahead of the reader, into four buffers that are reused. A part is
    therefore valid only until the next part is requested: write or copy it before, and keep no
    view of it.

    Raises:
        BufferError: the reader still holds a slice or an array of the previous part.
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
        with sealed:  # a reader that keeps the part gets an error, not bytes of a later part
            yield sealed
        buffers[index % BUFFERS].truncate(size)  # keeps the size; fails if a view is left


def unseal(key: bytes, sealed: Buffer, context: bytes) -> bytes:
    """Returns the plaintext, and only after the last segment has verified.

    Raises:
        IntegrityError: the key or the context differs, or a byte was changed, removed or added.
            The bytes that were decrypted before the failure are overwritten with zeros.
    """
    source = memoryview(sealed).cast("B")
    segments = Segments.of(key, context, source)
    whole = io.BytesIO(bytes(segments.plain_size))
    with whole.getbuffer() as target:
        try:
            all_of(lambda i: segments.open(i, source, target[segments.plain(i)]), segments.count)
        except BaseException:
            # `decrypt_into` leaves bytes in the buffer that it could not authenticate.
            for start in range(0, len(target), SEGMENT):
                target[start : start + SEGMENT] = bytes(len(target[start : start + SEGMENT]))
            raise
    return whole.getvalue()  # shares the buffer: no copy is made


# --- keys --------------------------------------------------------------------------------------


def commitment(key: bytes, context: bytes) -> bytes:
    """Returns 32 public bytes that commit to `key` in `context`: HKDF-SHA256 under its own salt.

    AES-GCM does not commit to its key: whoever knows two keys can make one file that opens under
    both keys, to different contents (Albertini et al., "How to Abuse and Fix Authenticated
    Encryption Without Key Commitment", USENIX Security 2022). Two keys with the same commitment
    would be a collision in SHA-256. The AWS Encryption SDK commits to its data key in the same way.
    """
    return derive(key, _COMMITMENT, context)


def manifest_key(key: bytes) -> bytes:
    """Derives the key that authenticates an artifact's manifest from the artifact's data key."""
    return derive(key, _MANIFEST, b"")


def check_commitment(key: bytes, context: bytes, expected: bytes) -> None:
    """Checks that `expected` commits to `key` in `context`. Call it before you open with `key`.

    The comparison takes the same time for every `expected` of 32 bytes.

    Raises:
        IntegrityError: `expected` commits to another key or is for another context.
    """
    if not secrets.compare_digest(commitment(key, context), expected):
        raise IntegrityError(
            "the data key does not match its commitment: the wrapped key or the manifest was"
            " replaced"
        )


def wrap_key(key: bytes, data_key: bytes, context: bytes) -> bytes:
    """Wraps `data_key` under `key`, bound to `context`; the result is 60 bytes longer.

    The result is the commitment to `data_key` (32 bytes), a random nonce (12 bytes), and
    AES-256-GCM with `context` as associated data. Every stored data key has this form, so every
    reader checks the commitment. A rotation of `key` leaves the commitment unchanged, so it can be
    compared with the manifest's commitment without any key.
    """
    nonce = secrets.token_bytes(_NONCE)
    wrapped = AESGCM(key).encrypt(nonce, data_key, context)
    return commitment(data_key, context) + nonce + wrapped


def unwrap_key(key: bytes, wrapped: bytes, context: bytes) -> bytes:
    """Returns the data key, after comparing it with its commitment.

    Raises:
        IntegrityError: the key or the context differs, or bytes were changed.
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
    """Returns any value as sealed bytes, for Ray's object store, its spill files and its network.

    `key` is the only way to read the value from these bytes.
    """
    return seal(key, pickle.dumps(value, protocol=5), _PAYLOAD)


def open_payload(key: bytes, sealed: bytes) -> Any:
    """Returns the value. Unpickles it only after its bytes verify under the key."""
    return pickle.loads(unseal(key, sealed, _PAYLOAD))  # noqa: S301


def derive_key(key: bytes, purpose: bytes) -> bytes:
    """Derives a separate key for each purpose: HKDF-SHA256 (RFC 5869) without salt."""
    return derive(key, b"", purpose)


def extract_key(key: bytes) -> bytes:
    """Returns the secret of 32 bytes from which `expand_key` derives what `derive_key` derives from
    `key`: HKDF-Extract (RFC 5869) without salt. It does not help to find the key."""
    return hmac.digest(bytes(KEY_BYTES), key, "sha256")


def expand_key(secret: bytes, purpose: bytes) -> bytes:
    """Derives a separate key for each purpose from a secret of 32 bytes: HKDF-Expand (RFC 5869)."""
    return HKDFExpand(SHA256(), KEY_BYTES, purpose).derive(secret)


def new_signing_key() -> bytes:
    """Returns a fresh Ed25519 private key (RFC 8032) as PEM (PKCS #8)."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_key_of(signing_key: bytes) -> bytes:
    """Returns the public key of a signing key as PEM (SubjectPublicKeyInfo)."""
    public = _signing(signing_key).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def raw_public_key(public_key: bytes) -> str:
    """Returns the 32 bytes of a public key in hex (RFC 8032), from its PEM.

    Raises:
        IntegrityError: the text is not the PEM of an Ed25519 public key.
    """
    return _verifying(public_key).public_bytes_raw().hex()


def public_key_from(raw: str) -> bytes:
    """Returns the PEM of a public key, from its 32 bytes in hex."""
    known = Ed25519PublicKey.from_public_bytes(bytes.fromhex(raw))
    return known.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign(signing_key: bytes, message: bytes) -> bytes:
    """Returns an Ed25519 signature of 64 bytes.

    The caller separates domains: messages of each kind begin with a prefix of their own.
    """
    return _signing(signing_key).sign(message)


def check_signature(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Raises IntegrityError unless the holder of the signing key signed exactly this message."""
    known = _verifying(public_key)
    try:
        known.verify(signature, message)
    except InvalidSignature:
        raise IntegrityError(
            "the signature does not verify: the signed text was changed, or another key signed it"
        ) from None


def _verifying(public_key: bytes) -> Ed25519PublicKey:
    try:
        known = load_pem_public_key(public_key)
    except ValueError:
        raise IntegrityError(
            "the public key is not a PEM file: use the audit.pub that `tg-tinker init` made"
        ) from None
    if not isinstance(known, Ed25519PublicKey):
        raise IntegrityError("the public key is not an Ed25519 key")
    return known


def _signing(signing_key: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(signing_key, password=None)
    except (ValueError, TypeError):  # TypeError: the key is encrypted
        raise IntegrityError("the signing key is damaged: restore its backup") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise IntegrityError("the signing key is not an Ed25519 key")
    return key
