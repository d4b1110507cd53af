"""Tests the rotation of the signing key in its folder: the chain, crashes, and damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.storage.home import create
from actors.storage.signing import CHAIN, PUBLIC_KEY, SIGNING_KEY, SigningKey, load
from support.kills import killed_at_every_step
from tg_tinker.errors import IntegrityError
from tg_tinker.records.successions import Succession
from tg_tinker.storage.envelope import new_signing_key, public_key_of


@pytest.fixture
def home(tmp_path: Path) -> Path:
    create(tmp_path / "home")
    return tmp_path / "home"


def contents(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.iterdir() if "audit" in path.name}


def put(home: Path, files: dict[str, bytes]) -> None:
    for path in home.iterdir():
        if "audit" in path.name:
            path.unlink()
    for name, content in files.items():
        (home / name).write_bytes(content)
        (home / name).chmod(0o600)


def test_a_rotation_destroys_the_old_key_and_leads_from_the_old_public_key(home: Path) -> None:
    old = load(home)
    signing = SigningKey(home)
    publics = [public_key_of(old)]
    for _ in range(3):
        signing.rotate()
        publics.insert(0, signing.public())
    assert signing.publics() == publics == SigningKey(home).publics()
    assert (home / PUBLIC_KEY).read_bytes() == publics[0] == public_key_of(load(home))
    assert all(old not in content for content in contents(home).values())
    assert {*contents(home)} == {SIGNING_KEY, PUBLIC_KEY, CHAIN}
    assert (home / SIGNING_KEY).stat().st_mode & 0o777 == 0o600


def test_other_processes_sign_with_the_new_key_at_once(home: Path) -> None:
    one, other = SigningKey(home), SigningKey(home)
    one.rotate()
    assert other.private() == one.private() == load(home)
    assert other.publics() == one.publics()


def test_a_rotation_that_is_killed_anywhere_leaves_a_home_that_opens_and_rotates(
    home: Path,
) -> None:
    before, first, seen = contents(home), SigningKey(home).public(), set()
    for _ in killed_at_every_step(lambda: SigningKey(home).rotate()):
        signing = SigningKey(home)
        seen.add(signing.public() == first)
        assert first in signing.publics()
        # A public key that was pinned or handed out meanwhile leads to the key.
        assert (home / PUBLIC_KEY).read_bytes() in signing.publics()
        signing.rotate()
        assert first in SigningKey(home).publics()
        assert {*contents(home)} == {SIGNING_KEY, PUBLIC_KEY, CHAIN}, "a partial file is left"
        put(home, before)
    assert seen == {True, False}


def test_a_link_to_the_key_leaves_the_old_key_nowhere(home: Path, tmp_path: Path) -> None:
    old, elsewhere = load(home), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (home / SIGNING_KEY).rename(elsewhere / "key")
    (home / SIGNING_KEY).symlink_to(elsewhere / "key")
    SigningKey(home).rotate()
    assert (home / SIGNING_KEY).is_symlink()
    assert all(
        old not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )  # fmt: skip
    assert [path.name for path in elsewhere.iterdir()] == ["key"]


@pytest.mark.parametrize("damage", [b"x", b"{}\n", b"\xff", b"null\n"])
def test_a_damaged_chain_is_named(home: Path, damage: bytes) -> None:
    SigningKey(home).rotate()
    (home / CHAIN).write_bytes((home / CHAIN).read_bytes() + damage)
    with pytest.raises(IntegrityError, match=f"{CHAIN} is damaged: restore"):
        SigningKey(home)


def test_a_chain_of_another_home_leads_nowhere(home: Path, tmp_path: Path) -> None:
    create(tmp_path / "other")
    SigningKey(tmp_path / "other").rotate()
    (home / CHAIN).write_bytes((tmp_path / "other" / CHAIN).read_bytes())
    assert len(SigningKey(home).publics()) == 1
    (home / PUBLIC_KEY).write_bytes((tmp_path / "other" / PUBLIC_KEY).read_bytes())
    with pytest.raises(IntegrityError, match="does not lead"):
        load(home)


def test_a_key_that_the_pinned_one_did_not_endorse_is_refused(home: Path) -> None:
    """Somebody who writes the folder, but never had the key, cannot put a key there."""
    thief = new_signing_key()
    (home / SIGNING_KEY).write_bytes(thief)
    (home / CHAIN).write_text(f"{Succession.of(new_signing_key(), thief).line()}\n")
    with pytest.raises(IntegrityError, match="does not lead"):
        SigningKey(home)


@pytest.mark.parametrize("read", [SIGNING_KEY, PUBLIC_KEY, CHAIN])
def test_a_rotation_between_two_reads_damages_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    other, plain = SigningKey(home), Path.read_bytes

    def reads(path: Path) -> bytes:
        try:
            return plain(path)
        finally:
            if path.name == read:
                monkeypatch.setattr(Path, "read_bytes", plain)
                other.rotate()

    monkeypatch.setattr(Path, "read_bytes", reads)
    found = SigningKey(home)
    assert found.public() in other.publics()
    assert found.publics() == other.publics()
