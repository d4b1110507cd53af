"""Tests the secrets of a home: versions, rotation, homes without the file, and damage."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.registry import grants
from actors.registry.actor import _purpose
from actors.registry.registry import Registry
from actors.storage import secrets, signing
from actors.storage.capabilities import Issuer
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.secrets import (
    API_KEY_ROWS,
    CAPABILITIES,
    ENTRIES,
    FILE,
    NAMES,
    PSEUDONYMS,
    TRANSPORT,
    Secrets,
)
from support.kills import killed_at_every_step
from tg_tinker.errors import IntegrityError, InvalidRequestError, StorageError
from tg_tinker.storage.envelope import context_of, derive_key

PURPOSE = b"a purpose"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    create(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def old(home: Path) -> Path:
    """A home of an earlier release."""
    (home / FILE).unlink()
    return home


def keys(home: Path) -> dict[str, dict[int, bytes]]:
    return {name: Secrets(home).keys(name, PURPOSE) for name in NAMES}


def test_each_secret_of_a_new_home_is_its_own_and_none_follows_from_the_signing_key(
    home: Path,
) -> None:
    found = [key for versions in keys(home).values() for key in versions.values()]
    assert len({*found}) == len(NAMES) == len(found)
    assert derive_key(signing.load(home), PURPOSE) not in found
    assert (home / FILE).stat().st_mode & 0o777 == 0o600


def test_a_home_of_an_earlier_release_derives_as_before_and_writes_nothing(old: Path) -> None:
    before = {name: {1: derive_key(signing.load(old), PURPOSE)} for name in NAMES}
    assert keys(old) == before
    assert not (old / FILE).exists()


@pytest.mark.parametrize("rotated", NAMES)
def test_a_rotation_changes_one_secret_and_keeps_all_that_was(old: Path, rotated: str) -> None:
    before = keys(old)
    assert Secrets(old).rotate(rotated) == 2
    after = keys(old)
    assert [*after[rotated]] == [2, 1]
    assert after[rotated].pop(2) != before[rotated][1]
    assert after == before
    assert Secrets(old).newest(rotated, PURPOSE) != before[rotated][1]


def test_secrets_that_were_pinned_outlive_the_signing_key(old: Path) -> None:
    before, key = keys(old), signing.load(old)
    Secrets(old).pin()
    signing.SigningKey(old).rotate()
    assert keys(old) == before
    assert key not in (old / FILE).read_bytes()
    assert signing.load(old) != key


def test_a_retired_version_is_gone_and_no_number_is_given_twice(home: Path) -> None:
    ring = Secrets(home)
    ring.rotate(CAPABILITIES)
    ring.retire(CAPABILITIES)
    assert [*keys(home)[CAPABILITIES]] == [2]
    assert ring.rotate(CAPABILITIES) == 3


def test_a_rotation_beside_a_reader_changes_no_secret(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has found no file of secrets, and another process then rotates the key."""
    (home / FILE).unlink()
    before, load = Secrets(home).fingerprints(), signing.load

    def rotated(folder: Path) -> bytes:
        monkeypatch.setattr(signing, "load", load)
        Secrets(home).pin()
        signing.SigningKey(home).rotate()
        return load(folder)

    monkeypatch.setattr(signing, "load", rotated)
    assert Secrets(home).fingerprints() == before


@pytest.mark.parametrize("name", [PSEUDONYMS, ENTRIES])
def test_what_stores_need_for_ever_cannot_be_retired(home: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="among api-key-rows, capabilities, transport"):
        Secrets(home).retire(name)


@pytest.mark.parametrize("name", ["", "keyring", "../audit.key", "x" * 99])
def test_no_other_name_is_a_secret(home: Path, name: str) -> None:
    before = (home / FILE).read_bytes()
    for act in (Secrets(home).rotate, Secrets(home).retire):
        with pytest.raises(InvalidRequestError, match="choose among") as caught:
            act(name)
        assert not name or name not in caught.value.message
    assert (home / FILE).read_bytes() == before


def test_rotations_at_the_same_time_lose_no_version(home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: Secrets(home).rotate(ENTRIES), range(12))]
    assert sorted(found) == [*range(2, 14)]
    assert len({*keys(home)[ENTRIES].values()}) == 13


def test_a_rotation_that_is_killed_anywhere_leaves_the_old_or_the_new_secrets(old: Path) -> None:
    before, seen = keys(old), set()
    for _ in killed_at_every_step(lambda: Secrets(old).rotate(ENTRIES)):
        after = keys(old)
        versions = [*after[ENTRIES]]
        seen.add(len(versions))
        assert after[ENTRIES][1] == before[ENTRIES][1]
        (old / FILE).unlink(missing_ok=True)
    assert seen == {1, 2}
    Secrets(old).rotate(ENTRIES)
    assert [path.name for path in old.iterdir() if FILE in path.name] == [FILE]


def damages(text: str) -> list[str]:
    content = json.loads(text)
    lists = content["secrets"]
    return [
        "", "{}", "[]", "5", text[:-1], text.replace("secrets", "others"),
        json.dumps(content | {"format": 2}),
        *(json.dumps(content | {"secrets": lists | {ENTRIES: wrong}})
          for wrong in ([], None, 5, [None], ["AAAA"], [5], ["!"], [lists[ENTRIES][0], None])),
    ]  # fmt: skip


def test_a_damaged_file_is_refused_without_showing_it(home: Path) -> None:
    text = (home / FILE).read_text()
    for damage in damages(text):
        (home / FILE).write_text(damage)
        with pytest.raises(IntegrityError, match=f"{FILE} is damaged: restore its backup") as error:
            Secrets(home).newest(ENTRIES, PURPOSE)
        assert json.loads(text)["secrets"][ENTRIES][0] not in str(error.value)


def test_a_file_without_one_of_the_secrets_does_not_fall_back(home: Path) -> None:
    content = json.loads((home / FILE).read_text())
    del content["secrets"][ENTRIES]
    (home / FILE).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="has no secret 'entries'"):
        Secrets(home).newest(ENTRIES, PURPOSE)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_file_that_others_may_touch_is_refused(home: Path, mode: int) -> None:
    (home / FILE).chmod(mode)
    with pytest.raises(StorageError, match=rf"mode {mode:04o}.*chmod 600"):
        Secrets(home).newest(ENTRIES, PURPOSE)


def test_a_file_that_exists_is_never_made_anew(home: Path) -> None:
    before = (home / FILE).read_bytes()
    secrets.create(home)
    assert (home / FILE).read_bytes() == before


# --- frozen --------------------------------------------------------------------------------------

VECTORS = Path(__file__).parents[1] / "vectors" / "home_keys"
EXPECTED: dict[str, Any] = json.loads((VECTORS / "expected.json").read_text())


def derived(home: Path) -> dict[str, str]:
    """Returns what the code makes from the secrets of a home."""
    secrets, ledger = Secrets(home), EXPECTED["ledger"]
    registry = Registry(f"sqlite:///{home / DATABASE}", home / KEYRING)
    entries = secrets.newest(ENTRIES, context_of(*ledger, "ledger entries"))
    return {
        "api_key_rows": secrets.newest(API_KEY_ROWS, grants._PURPOSE).hex(),
        "capability_tag": Issuer(secrets).issue(*EXPECTED["capability"]).tag.hex(),
        "pseudonym": registry.heads.ledger_name(*ledger),
        "entries": entries.hex(),
        "transport": secrets.newest(TRANSPORT, _purpose(EXPECTED["life"])).hex(),
    }


def test_keys_are_derived_as_they_were_frozen(home: Path) -> None:
    secret = base64.b64encode(bytes.fromhex(EXPECTED["secret"])).decode()
    text = json.dumps({"format": 1, "secrets": {name: [secret] for name in NAMES}})
    (home / FILE).write_text(text)
    assert derived(home) == EXPECTED["from_secret"]


def test_a_home_of_an_earlier_release_derives_as_it_was_frozen(old: Path) -> None:
    (old / signing.SIGNING_KEY).write_text(EXPECTED["signing_keys"][0])
    (old / signing.PUBLIC_KEY).write_bytes((VECTORS / "audit1.pub").read_bytes())
    assert derived(old) == EXPECTED["from_first_signing_key"]
    registry = Registry(f"sqlite:///{old / DATABASE}", old / KEYRING)
    registry.home_keys.rotate_signing_key()
    assert derived(old) == EXPECTED["from_first_signing_key"]
