"""Tests the envelope against others: Tink, Project Wycheproof, and its own frozen form."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import (
    ALGORITHM,
    FORMAT_VERSION,
    check_commitment,
    commitment,
    context_of,
    open_payload,
    seal,
    sealed_parts,
    unseal,
    unwrap_key,
    wrap_key,
)
from tg_tinker.storage.segments import SEGMENT, derive, sealed_size

VECTORS = Path(__file__).parents[1] / "vectors" / "envelope"

KEY, CONTEXT = bytes(range(32)), b"artifact 7"
FIRST, FULL = SEGMENT - 40 - 16, SEGMENT - 16
"""Plaintext bytes of the first segment, and of each later one."""

SIZES = [
    0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL - 1, FIRST + FULL, FIRST + FULL + 1,
    40 * SEGMENT,
]  # fmt: skip
"""On both sides of each border; the last size is long enough for threads."""


def plain_of(size: int) -> bytes:
    return hashlib.shake_128(b"tg-tinker").digest(size)


# --- Tink ------------------------------------------------------------------------------------


class Tink:
    """Google's own reader and writer of AES256_GCM_HKDF_1MB, under KEY and with CONTEXT."""

    def __init__(self) -> None:
        reason = "PyPI's `tink` is not installed: pip install tink"
        tink = pytest.importorskip("tink", reason=reason)
        from tink import secret_key_access, streaming_aead
        from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

        streaming_aead.register()
        params = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
            ciphertext_segment_size=SEGMENT,
            derived_key_size=32,
            hkdf_hash_type=common_pb2.SHA256,
        )
        key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(key_value=KEY, params=params)
        data = tink_pb2.KeyData(
            type_url="type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey",
            value=key.SerializeToString(),
            key_material_type=tink_pb2.KeyData.SYMMETRIC,
        )
        entry = tink_pb2.Keyset.Key(
            key_data=data, status=tink_pb2.ENABLED, key_id=1, output_prefix_type=tink_pb2.RAW
        )
        keyset = tink_pb2.Keyset(primary_key_id=1, key=[entry]).SerializeToString()
        handle = tink.proto_keyset_format.parse(keyset, secret_key_access.TOKEN)
        self._primitive = handle.primitive(streaming_aead.StreamingAead)

    def write(self, plain: bytes) -> bytes:
        target = Kept()
        with self._primitive.new_encrypting_stream(target, CONTEXT) as stream:
            stream.write(plain)
        return target.content

    def read(self, sealed: bytes) -> bytes:
        with self._primitive.new_decrypting_stream(io.BytesIO(sealed), CONTEXT) as stream:
            content: bytes = stream.read()
            return content


class Kept(io.BytesIO):
    """A buffer that stays readable after Tink closes it."""

    content = b""

    def close(self) -> None:
        self.content = self.getvalue()
        super().close()


@pytest.fixture(scope="module")
def tink() -> Tink:
    return Tink()


@pytest.mark.parametrize("size", SIZES)
def test_tink_reads_ours_and_we_read_tinks(tink: Tink, size: int) -> None:
    plain = plain_of(size)
    written = tink.write(plain)
    assert len(written) == sealed_size(size)
    assert unseal(KEY, written, CONTEXT) == plain
    assert tink.read(seal(KEY, plain, CONTEXT)) == plain
    assert tink.read(b"".join(map(bytes, sealed_parts(KEY, plain, CONTEXT)))) == plain


# --- Project Wycheproof ----------------------------------------------------------------------


def cases(name: str) -> list[Any]:
    found: list[Any] = json.loads((VECTORS / f"wycheproof_{name}.json").read_text())
    return [
        pytest.param({k: decoded(v) for k, v in case.items()}, id=str(case["tcId"]))
        for case in found
    ]


def decoded(value: Any) -> Any:
    """Returns a hexadecimal text as bytes, and any other value unchanged."""
    try:
        return bytes.fromhex(value)
    except (TypeError, ValueError):
        return value


def draws(monkeypatch: pytest.MonkeyPatch, randomness: bytes) -> None:
    """Makes the operating system's next answers these bytes instead of random ones."""
    monkeypatch.setattr(secrets, "token_bytes", io.BytesIO(randomness).read)


@pytest.mark.parametrize("case", cases("aes_256_gcm"))
def test_wycheproof_aes_256_gcm_under_the_wrapping_of_keys(
    monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    committed = commitment(case["msg"], case["aad"])
    wrapped = committed + case["iv"] + case["ct"] + case["tag"]
    if case["result"] == "valid":
        draws(monkeypatch, case["iv"])
        assert wrap_key(case["key"], case["msg"], case["aad"]) == wrapped
        assert unwrap_key(case["key"], wrapped, case["aad"]) == case["msg"]
    else:
        with pytest.raises(IntegrityError):
            unwrap_key(case["key"], wrapped, case["aad"])


@pytest.mark.parametrize("case", cases("hkdf_sha256"))
def test_wycheproof_hkdf_sha256(case: dict[str, Any]) -> None:
    output = derive(case["ikm"], case["salt"], case["info"])
    shared = min(len(output), case["size"])
    assert len(output) == 32
    assert output[:shared] == case["okm"][:shared]


def test_the_cases_were_all_read() -> None:
    gcm = [param.values[0]["result"] for param in cases("aes_256_gcm")]
    assert (gcm.count("valid"), gcm.count("invalid")) == (39, 27)
    assert len(cases("hkdf_sha256")) == 79


# --- frozen vectors --------------------------------------------------------------------------

FROZEN = {path.stem: json.loads(path.read_text()) for path in VECTORS.glob("v*.json")}


def test_the_version_that_is_written_has_a_frozen_file() -> None:
    """A change of the format needs another FORMAT_VERSION and another frozen file."""
    newest = FROZEN[f"v{FORMAT_VERSION}"]
    assert (newest["format"], newest["algorithm"]) == (FORMAT_VERSION, ALGORITHM)
    assert context_of(*newest["place"]) == newest["context"].encode()


@pytest.mark.parametrize("size", [file["size"] for file in FROZEN[f"v{FORMAT_VERSION}"]["files"]])
def test_files_are_written_as_they_were_frozen(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    frozen = FROZEN[f"v{FORMAT_VERSION}"]
    [expected] = [file for file in frozen["files"] if file["size"] == size]
    key, context = bytes.fromhex(frozen["key"]), frozen["context"].encode()

    draws(monkeypatch, bytes.fromhex(frozen["randomness"]))
    whole = seal(key, plain_of(size), context)
    draws(monkeypatch, bytes.fromhex(frozen["randomness"]))
    parts = [bytes(part) for part in sealed_parts(key, plain_of(size), context)]

    assert b"".join(parts) == whole
    assert expected["sealed_sha256"] == hashlib.sha256(whole).hexdigest()
    assert unseal(key, whole, context) == plain_of(size)


@pytest.mark.parametrize("version", FROZEN)
def test_small_files_keys_and_payloads_of_every_version_open(version: str) -> None:
    frozen = FROZEN[version]
    key, context = bytes.fromhex(frozen["key"]), frozen["context"].encode()
    small = [file for file in frozen["files"] if "sealed" in file]
    for file in small:
        assert unseal(key, bytes.fromhex(file["sealed"]), context) == plain_of(file["size"])
    assert len(small) == 3

    data_key = bytes.fromhex(frozen["data_key"])
    check_commitment(data_key, context, bytes.fromhex(frozen["commitment"]))
    assert unwrap_key(key, bytes.fromhex(frozen["wrapped"]), context) == data_key
    assert open_payload(key, bytes.fromhex(frozen["payload_sealed"])) == frozen["payload"]


def test_keys_are_wrapped_as_they_were_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = FROZEN[f"v{FORMAT_VERSION}"]
    key, context = bytes.fromhex(frozen["key"]), frozen["context"].encode()
    data_key = bytes.fromhex(frozen["data_key"])
    assert commitment(data_key, context).hex() == frozen["commitment"]
    draws(monkeypatch, bytes.fromhex(frozen["randomness"]))
    assert wrap_key(key, data_key, context).hex() == frozen["wrapped"]
