"""Tests the reader of `docs/security.md`: it opens artifacts, and nothing that the page forbids."""

from __future__ import annotations

import base64
import hmac
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from actors.artifacts import copies
from actors.storage.home import KEYRING
from actors.storage.manifest import DATA_KEY
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from tg_tinker.storage.envelope import context_of, manifest_key, new_key, seal, unwrap_key
from tg_tinker.storage.segments import SEGMENT, derive

Reader = Callable[[Path, Path, str, str], dict[str, bytes]]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Returns the functions of the reader in `docs/security.md`."""
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    names: dict[str, Any] = {}
    section = text.partition("## A reader\n")[2]
    exec(section.partition("```python\n")[2].partition("```")[0], names)  # noqa: S102 - our own page
    return names


@pytest.fixture
def reader(page: dict[str, Any]) -> Reader:
    found: Reader = page["read_artifact"]
    return found


def test_the_reader_of_the_documentation_opens_what_was_resealed(
    service: Service, reader: Reader
) -> None:
    artifact = service.publish()
    arguments = service.root, service.home / KEYRING, TENANT
    before = reader(*arguments, artifact)
    copies.reseal(service.registry, str(service.root), TENANT, artifact)
    assert reader(*arguments, f"{artifact}.2") == before


def _reversed(text: bytes) -> bytes:
    return json.dumps(dict(reversed(json.loads(text).items()))).encode()


def _other_base64(text: bytes) -> bytes:
    """Sets a bit that the decoding drops: 92 bytes leave two bits over in the last character."""
    wrapped = json.loads(text)
    kept = wrapped["wrapped"]
    assert kept.endswith("=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = alphabet[alphabet.index(kept[-2]) + 1]
    return json.dumps(wrapped | {"wrapped": f"{kept[:-2]}{other}="}).encode()


def _with(text: bytes, **more: Any) -> bytes:
    return json.dumps(json.loads(text) | more).encode()


WRAPPED_OTHERWISE: dict[str, Callable[[bytes], bytes]] = {
    "reversed": _reversed, "another Base64": _other_base64,
    "a line end in Base64": lambda text: text.replace(b'="}', b'=\\n"}'),
    "an unknown key": lambda text: _with(text, more=1), "a blank": lambda text: text + b" ",
    "a repeated key": lambda text: b'{"key_id": "k0", ' + text[1:],
    "no key": lambda text: b"{}", "a list": lambda text: b"[]",
    "too deep": lambda text: b"[" * 99999,
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED_OTHERWISE)
def test_the_reader_of_the_documentation_takes_one_spelling_of_a_wrapped_key(
    service: Service, reader: Reader, name: str
) -> None:
    artifact = service.publish()
    file = service.root / "t" / TENANT / "keys" / f"{artifact}.json"
    before = file.read_bytes()
    after = WRAPPED_OTHERWISE[name](before)
    assert after != before
    file.write_bytes(after)
    with pytest.raises(ValueError, match=r"\w"):
        reader(service.root, service.home / KEYRING, TENANT, artifact)


def _tagged(service: Service, artifact: str, **changes: Any) -> bytes:
    """Returns a manifest with other values, which a holder of the data key has tagged."""
    place = service.root / "t" / TENANT
    wrapped = json.loads((place / "keys" / f"{artifact}.json").read_text())
    keys = json.loads((service.home / KEYRING).read_text())["keys"]
    tenant_key = base64.b64decode(keys[wrapped["key_id"]])
    context = context_of(TENANT, artifact, DATA_KEY)
    data_key = unwrap_key(tenant_key, base64.b64decode(wrapped["wrapped"]), context)
    manifest = json.loads((place / "a" / artifact / "manifest.json").read_text()) | changes
    del manifest["tag"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    tag = hmac.digest(manifest_key(data_key), text, "sha256").hex()
    return json.dumps(manifest | {"tag": tag}, sort_keys=True, separators=(",", ":")).encode()


def _files(manifest: bytes, **changes: Any) -> dict[str, Any]:
    name, entry = next(iter(json.loads(manifest)["files"].items()))
    return {"files": json.loads(manifest)["files"] | {name: entry | changes}}


DESCRIBED_OTHERWISE: dict[str, Callable[[Service, str, bytes], bytes]] = {
    "a repeated key": lambda s, a, m: b'{"format":1,' + m[1:],
    "another notation": lambda s, a, m: json.dumps(json.loads(m)).encode(),
    "a line end": lambda s, a, m: m + b"\n",
    "an unknown key": lambda s, a, m: _tagged(s, a, more=1),
    "another format": lambda s, a, m: _tagged(s, a, format=2),
    "a format that is true": lambda s, a, m: _tagged(s, a, format=True),
    "another algorithm": lambda s, a, m: _tagged(s, a, algorithm="AES256_GCM_HKDF_4KB"),
    "another tenant": lambda s, a, m: _tagged(s, a, tenant="b"),
    "no files": lambda s, a, m: _tagged(s, a, files={}),
    "a path": lambda s, a, m: _tagged(s, a, files={"../x.enc": {"sha256": "a" * 64, "size": 1}}),
    "another commitment": lambda s, a, m: _tagged(s, a, commitment="a" * 64),
    "another size": lambda s, a, m: _tagged(s, a, **_files(m, size=1)),
    "more about a file": lambda s, a, m: _tagged(s, a, **_files(m, more=1)),
    "another tag": lambda s, a, m: json.dumps(
        json.loads(m) | {"tag": "0" * 64}, sort_keys=True, separators=(",", ":")
    ).encode(),
}


@pytest.mark.parametrize("name", DESCRIBED_OTHERWISE)
def test_the_reader_of_the_documentation_takes_one_notation_of_a_manifest(
    service: Service, reader: Reader, name: str
) -> None:
    artifact = service.publish()
    file = service.root / "t" / TENANT / "a" / artifact / "manifest.json"
    before = file.read_bytes()
    assert _tagged(service, artifact) == before
    after = DESCRIBED_OTHERWISE[name](service, artifact, before)
    assert after != before
    file.write_bytes(after)
    with pytest.raises(ValueError, match=r"\w"):
        reader(service.root, service.home / KEYRING, TENANT, artifact)


def test_the_reader_of_the_documentation_reads_each_length_and_refuses_other_forms(
    page: dict[str, Any],
) -> None:
    read_sealed = page["read_sealed"]
    key, first = new_key(), SEGMENT - 40 - 16
    for size in (0, 1, first - 1, first, first + 1, first + SEGMENT - 16):
        plain = secrets.token_bytes(size)
        assert read_sealed(seal(key, plain, b"here"), key, b"here") == plain
    sealed = seal(key, bytes(first + 1), b"here")
    cipher = AESGCM(derive(key, sealed[1:33], b"here"))
    parts = [
        cipher.encrypt(sealed[33:40] + index.to_bytes(4, "big") + bytes([index]), plain, b"")
        for index, plain in enumerate((bytes(first), b""))
    ]
    for other in (
        sealed[:40] + b"".join(parts),
        b"\x29" + sealed[1:],
        sealed[:SEGMENT],
        sealed[:40],
    ):
        with pytest.raises((ValueError, InvalidTag)):
            read_sealed(other, key, b"here")
