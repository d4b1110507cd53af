"""Tests that a manifest is parsed strictly, and that only the holder of the data key can make
one."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from actors.storage.manifest import Manifest, SealedFile
from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import new_key

KEY = bytes(range(32))
FILES = {"state.json.enc": SealedFile(100, "a" * 64), "w.safetensors.enc": SealedFile(7, "b" * 64)}
MANIFEST = Manifest("clinic", "art-1", "c" * 64, FILES)
WRITTEN = MANIFEST.to_bytes(KEY)


def parsed(content: bytes) -> Manifest:
    return Manifest.parse(content, "clinic", "art-1")


def edited(**changes: Any) -> bytes:
    described = json.loads(WRITTEN) | changes
    return json.dumps(described, sort_keys=True, separators=(",", ":")).encode()


def test_what_was_written_comes_back_and_is_its_keys() -> None:
    found = parsed(WRITTEN)
    assert (found.files, found.commitment) == (FILES, "c" * 64)
    found.check(KEY)
    with pytest.raises(IntegrityError, match="not written under"):
        found.check(new_key())


FILE = {"sha256": "a" * 64, "size": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"[" * 100_000, WRITTEN + b" ", b" " + WRITTEN, WRITTEN[:-1],
        WRITTEN.replace(b'"format":1', b'"format":1,"format":1'), WRITTEN.decode().encode("utf-16"),
        edited(more=1), edited(format=2), edited(format=1.0), edited(format=True),
        edited(algorithm="NONE"), edited(files={}), edited(files=[]), edited(commitment="C" * 64),
        edited(commitment=5), edited(tag="0" * 63), edited(files={"../x.enc": FILE}),
        edited(files={"x": FILE}), edited(files={".x.enc": FILE}), edited(files={"a/b.enc": FILE}),
        edited(files={"x.enc": FILE | {"more": 1}}), edited(files={"x.enc": FILE | {"size": -1}}),
        edited(files={"x.enc": FILE | {"size": True}}),
        edited(files={"x.enc": FILE | {"size": 1.0}}),
        edited(files={"x.enc": FILE | {"sha256": "A" * 64}}),
        edited(files={f"{i}.enc": FILE for i in range(1001)}),
    ],
)  # fmt: skip
def test_anything_else_is_no_manifest(content: bytes) -> None:
    with pytest.raises(IntegrityError, match="damaged"):
        parsed(content)


@pytest.mark.parametrize(("tenant", "artifact"), [("bank", "art-1"), ("clinic", "art-2")])
def test_one_of_another_artifact_or_tenant_is_refused(tenant: str, artifact: str) -> None:
    with pytest.raises(IntegrityError, match="belongs to another artifact"):
        Manifest.parse(WRITTEN, tenant, artifact)


def test_no_edit_keeps_the_tag() -> None:
    """Whatever parses after any change of a byte is refused with the key."""
    rng, survived = random.Random(5), 0
    for _ in range(3000):
        at, changed = rng.randrange(len(WRITTEN)), bytearray(WRITTEN)
        changed[at] = rng.randrange(256)
        if bytes(changed) == WRITTEN:
            continue
        try:
            found = parsed(bytes(changed))
        except IntegrityError:
            continue
        survived += 1
        with pytest.raises(IntegrityError):
            found.check(KEY)
    assert survived > 100  # hashes and sizes: well-formed, and not what was tagged


@pytest.mark.parametrize(
    "changes",
    [{"files": {"w.safetensors.enc": FILE}}, {"commitment": "d" * 64}],
    ids=["a file left out", "another key committed to"],
)
def test_a_well_formed_lie_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="not written under"):
        parsed(edited(**changes)).check(KEY)
