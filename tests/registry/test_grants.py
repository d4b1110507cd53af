"""Tests that whoever writes the database cannot grant: rows of API keys have MACs, and the audit
log says which keys were revoked."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.operations import keys, restore
from actors.operations.doctor import PROBLEM, examine
from actors.registry import api_keys, grants
from actors.registry.api_keys import ApiKeys
from actors.registry.registry import PARTS, Registry
from actors.registry.rollback import keep_newest, meet
from actors.registry.schema import API_KEYS
from actors.registry.upgrade import upgrade
from actors.storage.home import DATABASE, KEYRING, SEALED, STORE, create
from actors.storage.secrets import API_KEY_ROWS
from actors.storage.store import ArtifactStore
from support.audit import THEM, US
from support.audit import place as place  # a fixture
from support.databases import url_of
from support.old_homes import EXPECTED, old_home
from support.privacy_helpers import registry as on_any_database
from tg_tinker.cli.main import main
from tg_tinker.errors import AccessDeniedError, NotFoundError, RollbackError
from tg_tinker.records.audit_log import AuditRow, chained
from tg_tinker.storage.envelope import expand_key, extract_key

COLUMNS = ("id", "tenant", "label", "hash", "models", "created_at", "expires_at", "revoked_at")
SECRET = "a" * 43


def opened(place: Path) -> Registry:
    return Registry(f"sqlite:///{place / DATABASE}", place / KEYRING)


def write(place: Path, statement: str, *values: Any) -> None:
    """Writes to the database as a person who has it, and none of the keys."""
    with closing(sqlite3.connect(place / DATABASE)) as database:
        database.execute(statement, values)
        database.commit()


def row(place: Path, key_id: str) -> dict[str, Any]:
    with closing(sqlite3.connect(place / DATABASE)) as database:
        database.row_factory = sqlite3.Row
        return dict(database.execute("SELECT * FROM api_keys WHERE id = ?", [key_id]).fetchone())


def put(place: Path, values: dict[str, Any]) -> None:
    names = ", ".join(values)
    marks = ", ".join("?" * len(values))
    statement = f"INSERT OR REPLACE INTO api_keys ({names}) VALUES ({marks})"  # noqa: S608
    write(place, statement, *values.values())


def forged(key_id: str = "0" * 12, tenant: str = US, **changes: Any) -> dict[str, Any]:
    secret = hashlib.sha256(SECRET.encode()).hexdigest()
    plain = {"id": key_id, "tenant": tenant, "label": "", "hash": secret, "models": "[]"}
    return plain | {"created_at": 1.0, "expires_at": None, "revoked_at": None} | changes


def noted(place: Path, event: str, key_id: str, tenant: str = US) -> None:
    """Appends a row to the audit log; the chain needs no key."""
    with closing(sqlite3.connect(place / DATABASE)) as database:
        query = "SELECT row FROM audit_rows WHERE tenant = ? ORDER BY seq DESC LIMIT 1"
        found = database.execute(query, [tenant]).fetchone()
    last = AuditRow.parse(found[0]) if found else None
    time = "2026-05-01T10:00:00.000000+00:00"
    new = chained(
        last, time=time, tenant=tenant, who="sdk", event=event, subject=key_id, outcome="ok",
        details={},
    )  # fmt: skip
    write(place, "INSERT INTO audit_rows VALUES (?, ?, ?)", tenant, new.seq, new.line())


def refused(registry: Registry, token: str) -> None:
    with pytest.raises(AccessDeniedError, match="unknown, expired or revoked"):
        registry.api_keys.check(token, US)


# --- rows that others wrote ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "mac", [None, "", "0" * 64, b"\xff", "\u00e9", "of another key", "of another home"]
)
def test_a_row_that_the_registry_did_not_write_opens_nothing(
    place: Path, tmp_path: Path, mac: Any
) -> None:
    registry = opened(place)
    token, info = registry.api_keys.create(US, "", [], None)
    if mac == "of another key":
        mac = row(place, info.key_id)["mac"]
    if mac == "of another home":
        create(tmp_path / "other")
        there = opened(tmp_path / "other")
        mac = there.api_keys._macs.of(API_KEYS, forged())
    put(place, forged(mac=mac))
    noted(place, "api_key.create", "0" * 12)
    for known in (registry, opened(place)):
        refused(known, f"tgt-{'0' * 12}-{SECRET}")
        assert [one.key_id for one in known.api_keys.of(US)] == [info.key_id]
        assert known.api_keys.check(token, US)[0] == US
        assert [*known.api_keys.problems(US)] == ["0" * 12]
        last = AuditRow.parse(known.audit_log.rows(US, 0, 100)[-1])
        assert (last.who, last.event, last.subject) == ("anyone", "api_key.check", "")


@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "id"])
def test_a_row_that_was_changed_opens_nothing(place: Path, column: str) -> None:
    registry = opened(place)
    token, info = registry.api_keys.create(US, "label", ["art-1"], 3.0)
    others: dict[str, list[Any]] = {
        "tenant": [THEM], "label": ["", b"label"], "hash": [forged()["hash"], b"\x00", ""],
        "models": ["[]", '["art-1", "art-2"]', '["art-1"] '], "created_at": [1.0, 0, "x"],
        "expires_at": [None, 9e12], "revoked_at": [1.0, 9e12],
    }  # fmt: skip
    before = row(place, info.key_id)
    for value in others[column]:
        put(place, before | {column: value})
        refused(registry, token)
        assert info.key_id in registry.api_keys.problems()
        if column == "hash":
            refused(registry, f"tgt-{info.key_id}-{SECRET}")
    put(place, before)
    assert registry.api_keys.check(token, US)[1] == info


@pytest.mark.usefixtures("each_database")
def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    """The MAC is over what the database returns, times as fractions of a second among it."""
    home = tmp_path / "home"
    known = on_any_database(home)
    made = [
        known.api_keys.create(US, "\u00e9\U0001f600", ["b", "a"], days) for days in (None, 1 / 3)
    ]
    again = Registry(url_of(home), home / KEYRING)
    for token, info in made:
        assert again.api_keys.check(token, US) == (US, info)
    again.api_keys.revoke(US, made[0][1].key_id)
    refused(known, made[0][0])
    assert known.api_keys.problems() == {}
    assert len(known.api_keys.of(US)) == 1


def test_a_row_under_another_id_opens_nothing(place: Path) -> None:
    registry = opened(place)
    token, info = registry.api_keys.create(US, "", [], None)
    put(place, row(place, info.key_id) | {"id": "f" * 12})
    refused(registry, token.replace(info.key_id, "f" * 12))


def test_a_row_from_before_the_revocation_opens_nothing(place: Path) -> None:
    registry = opened(place)
    token, info = registry.api_keys.create(US, "", [], None)
    other, _ = registry.api_keys.create(US, "", [], None)
    before = row(place, info.key_id)
    registry.api_keys.check(token, US)
    registry.api_keys.revoke(US, info.key_id)
    put(place, before)
    for known in (registry, opened(place)):
        refused(known, token)
        assert known.api_keys.check(other, US)
        assert len(known.api_keys.of(US)) == 1
        assert "put back" in known.api_keys.problems(US)[info.key_id]
    registry.api_keys.revoke(US, info.key_id)
    assert registry.api_keys.problems(US) == {}


def test_a_trigger_of_the_database_makes_no_key(place: Path) -> None:
    """What is authenticated is what the registry wrote, not what the database made of it."""
    registry, stolen = opened(place), forged()["hash"]
    trigger = (
        "CREATE TRIGGER grant AFTER INSERT ON api_keys BEGIN"
        " UPDATE api_keys SET hash = 'STOLEN', models = '[]' WHERE id = NEW.id; END"
    )
    write(place, trigger.replace("STOLEN", stolen))
    _, info = registry.api_keys.create(US, "", ["art-1"], 1.0)
    refused(registry, f"tgt-{info.key_id}-{SECRET}")


def test_a_revocation_by_another_process_counts_at_once(place: Path) -> None:
    one, other = opened(place), opened(place)
    token, info = one.api_keys.create(US, "", [], None)
    before = row(place, info.key_id)
    assert other.api_keys.check(token, US)
    one.api_keys.revoke(US, info.key_id)
    put(place, before)
    refused(other, token)


def test_a_revocation_that_was_read_is_not_forgotten_with_the_log(place: Path) -> None:
    registry = opened(place)
    token, info = registry.api_keys.create(US, "", [], None)
    before = row(place, info.key_id)
    registry.api_keys.revoke(US, info.key_id)
    put(place, before)
    refused(registry, token)
    write(place, "DELETE FROM audit_rows WHERE seq > 1")
    refused(registry, token)


def test_a_log_without_the_revocation_is_behind_the_head_in_the_store(place: Path) -> None:
    registry, store = opened(place), ArtifactStore(str(place / STORE))
    token, info = registry.api_keys.create(US, "", [], None)
    before = row(place, info.key_id)
    registry.api_keys.revoke(US, info.key_id)
    keep_newest(registry, store, US)
    put(place, before)
    write(place, "DELETE FROM audit_rows WHERE seq > 1")
    noted(place, "run.create", "tc-1")
    again = opened(place)
    again.api_keys.check(token, US)  # the log says nothing of it
    with pytest.raises(RollbackError):  # which a server asks for each key that it takes
        meet(again, store, US)


@pytest.mark.parametrize("change", ["the event", "the subject", "both numbers", "split", "no JSON"])
def test_a_log_whose_revocation_was_changed_opens_nothing(place: Path, change: str) -> None:
    """The row keeps the hash that it stated, so every head in the store is still on the log."""
    registry, store = opened(place), ArtifactStore(str(place / STORE))
    token, info = registry.api_keys.create(US, "", [], None)
    before = row(place, info.key_id)
    registry.api_keys.revoke(US, info.key_id)
    keep_newest(registry, store, US)
    other, _ = registry.api_keys.create(US, "", [], None)
    keep_newest(registry, store, US)
    put(place, before)
    line = registry.audit_log.rows(US, 1, 1)[0]
    stated = f',"hash":"{AuditRow.parse(line).hash}"'
    changed = {
        "the event": line.replace("api_key.revoke", "api_key.revoked"),
        "the subject": line.replace(info.key_id, "f" * 12),
        "both numbers": line.replace('"seq":2', '"seq":3'),
        "split": line.replace(stated, "").replace("api_key.", f"api{stated}_key."),
        "no JSON": stated,
    }[change]
    write(place, "UPDATE audit_rows SET row = ? WHERE seq = 2", changed)
    again = opened(place)
    if change in ("the event", "the subject"):
        meet(again, store, US)
    for one in (token, other):
        refused(again, one)
    assert again.api_keys.of(US) == []
    assert len(again.api_keys.problems(US)) == 2
    write(place, "UPDATE audit_rows SET row = ? WHERE seq = 2", line)
    refused(again, token)
    assert again.api_keys.check(other, US)
    assert "put back" in again.api_keys.problems(US)[info.key_id]


def test_a_server_does_not_open_because_the_creations_of_its_keys_were_changed(place: Path) -> None:
    registry = opened(place)
    registry.api_keys.create(US, "", [], None)
    write(place, "DELETE FROM api_keys")
    write(place, "UPDATE audit_rows SET row = replace(row, 'api_key.create', 'api_key.creates')")
    assert opened(place).api_keys.wanted(US)
    assert not opened(place).api_keys.wanted(THEM)


def test_a_server_does_not_open_because_the_rows_of_its_keys_were_removed(place: Path) -> None:
    registry = opened(place)
    assert not registry.api_keys.wanted(US)
    _, info = registry.api_keys.create(US, "", [], None)
    write(place, "DELETE FROM api_keys")
    for known in (registry, opened(place)):
        assert known.api_keys.wanted(US)
        assert not known.api_keys.wanted(THEM)
        assert known.api_keys.problems(US) == {info.key_id: "its row was removed from the database"}


def test_a_row_that_others_wrote_can_be_revoked(place: Path) -> None:
    registry = opened(place)
    put(place, forged())
    registry.api_keys.revoke(US, "0" * 12)
    assert registry.api_keys.problems() == {}
    refused(registry, f"tgt-{'0' * 12}-{SECRET}")
    with pytest.raises(NotFoundError):
        registry.api_keys.revoke(US, "0" * 12)


def test_check_and_doctor_tell(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = opened(place)
    _, info = registry.api_keys.create(US, "", [], None)
    found = restore.check(registry, str(place / STORE), US, place)
    assert found.sound
    put(place, forged())
    found = restore.check(registry, str(place / STORE), US, place)
    assert not found.sound
    assert [*found.api_keys] == ["0" * 12]
    told = {one.check: one for one in examine(place, str(place / KEYRING), str(place / STORE))}
    assert told["registry"].status == PROBLEM
    assert "0" * 12 in told["registry"].message
    assert info.key_id not in told["registry"].message


# --- rows of an older release --------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return old_home(tmp_path / "old")


def upgraded(home: Path) -> Registry:
    upgrade(f"sqlite:///{home / DATABASE}", home / "before.db")
    return opened(home)


KEYS = EXPECTED["tenants"]["default"]["api_keys"]
WARD = EXPECTED["tenants"]["clinic"]["api_keys"]["live"]


def opens(registry: Registry) -> set[str]:
    """Returns the keys of the old home that open."""
    found = set()
    for name, key in (*KEYS.items(), ("ward", WARD)):
        try:
            registry.api_keys.check(key["secret"], "default")
        except AccessDeniedError:
            continue
        found.add(name)
    return found


def test_the_keys_of_an_old_home_open_what_they_opened(old: Path) -> None:
    registry = upgraded(old)
    assert opens(registry) == opens(opened(old)) == {"live", "narrow", "ward"}
    assert registry.api_keys.problems() == {}
    rows = [AuditRow.parse(line) for line in registry.audit_log.rows("default", 0, 10_000)]
    (sealed,) = [row for row in rows if row.event == "api_key.seal"]
    assert sealed.details == {"keys": len(KEYS), "refused": 0}
    assert (old / SEALED).stat().st_mode & 0o777 == 0o600


def stolen_mac(secret: bytes, values: dict[str, Any]) -> str:
    return grants._mac(expand_key(secret, grants._PURPOSE), API_KEYS, values)


@pytest.mark.parametrize("cut_off", [False, True])
def test_whoever_has_a_retired_secret_makes_no_key(
    old: Path, cut_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a home of an older release the secret follows from `audit.key`, which was stolen."""
    secret = extract_key((old / "audit.key").read_bytes())
    registry = upgraded(old)
    token, info = registry.api_keys.create("default", "", [], None)
    gone = row(old, info.key_id)
    registry.api_keys.revoke("default", info.key_id)
    early = forged("1" * 12, "default")
    put(old, early | {"mac": stolen_mac(secret, early)})  # the log does not tell of it
    with monkeypatch.context() as patch:
        if cut_off:  # between the files and the database
            patch.setattr(ApiKeys, "_renew_macs", lambda *_: None)
        keys.rotate_secret(registry, str(old / STORE), "default", API_KEY_ROWS)
    keys.retire_secret(registry, str(old / STORE), "default", API_KEY_ROWS)
    late = forged("2" * 12, "default")
    put(old, late | {"mac": stolen_mac(secret, late)})
    noted(old, "api_key.create", "2" * 12, "default")
    for known in (registry, opened(old)):
        assert opens(known) == {"live", "narrow", "ward"}
        assert {*known.api_keys.problems()} == {"1" * 12, "2" * 12}
        for one in ("1", "2"):
            refused(known, f"tgt-{one * 12}-{SECRET}")
    put(old, gone)
    refused(opened(old), token)


@pytest.mark.parametrize("rotated", ["the signing key", "api-key-rows"])
def test_api_keys_open_after_a_rotation(place: Path, old: Path, rotated: str) -> None:
    """Both a home with a file of secrets, and one where they follow from the signing key."""
    token, _ = opened(place).api_keys.create(US, "", [], None)
    upgraded(old)
    for home in (place, old):
        if rotated == "the signing key":
            keys.rotate_signing_key(opened(home), str(home / STORE))
        else:
            assert keys.rotate_secret(opened(home), str(home / STORE), US, rotated) == 2
    later, _ = opened(place).api_keys.create(US, "", [], None)
    for one in (token, later):
        assert opened(place).api_keys.check(one, US)[0] == US
    assert opens(opened(old)) == {"live", "narrow", "ward"}
    assert opened(place).api_keys.problems() == opened(old).api_keys.problems() == {}


def test_old_rows_that_the_log_does_not_tell_of_open_nothing(old: Path) -> None:
    put(old, forged(tenant="default"))
    gone = KEYS["revoked"]["id"]
    write(old, "UPDATE api_keys SET revoked_at = NULL WHERE id = ?", gone)
    registry = upgraded(old)
    assert opens(registry) == {"live", "narrow", "ward"}
    refused(registry, f"tgt-{'0' * 12}-{SECRET}")
    assert {*registry.api_keys.problems("default")} == {"0" * 12, gone}


@pytest.mark.parametrize("with_mark", [True, False])
def test_old_rows_get_their_macs_once(old: Path, with_mark: bool) -> None:
    """Without the mark, each tenant that had keys is safe: its log says that it is done."""
    upgraded(old)
    put(old, forged(tenant="default"))
    noted(old, "api_key.create", "0" * 12, "default")
    if not with_mark:
        (old / SEALED).unlink()
    registry = opened(old)
    refused(registry, f"tgt-{'0' * 12}-{SECRET}")
    assert [*registry.api_keys.problems("default")] == ["0" * 12]


def test_a_new_home_never_gives_a_row_its_mac_later(place: Path) -> None:
    opened(place)
    put(place, forged())
    noted(place, "api_key.create", "0" * 12)
    refused(opened(place), f"tgt-{'0' * 12}-{SECRET}")


def test_a_row_from_before_the_first_start_of_a_new_home_opens_nothing(tmp_path: Path) -> None:
    create(tmp_path / "home")
    create(tmp_path / "elsewhere")
    opened(tmp_path / "elsewhere").close()
    write(tmp_path / "elsewhere", "DELETE FROM keys")
    put(tmp_path / "elsewhere", forged())
    noted(tmp_path / "elsewhere", "api_key.create", "0" * 12)
    (tmp_path / "elsewhere" / DATABASE).rename(tmp_path / "home" / DATABASE)
    refused(opened(tmp_path / "home"), f"tgt-{'0' * 12}-{SECRET}")


def test_a_folder_that_cannot_be_written_is_told_and_opens_nothing(
    old: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "tg_tinker"):
        patch.setattr(api_keys, "written", read_only)
        assert opens(upgraded(old)) == set()
    assert "until the folder is writable" in caplog.text
    assert opens(opened(old)) == {"live", "narrow", "ward"}


def test_a_registry_that_only_looks_makes_no_mac(old: Path) -> None:
    upgrade(f"sqlite:///{old / DATABASE}", old / "before.db")
    Registry(f"sqlite:///{old / DATABASE}", old / KEYRING, looks_only=True)
    assert not (old / SEALED).exists()
    assert row(old, KEYS["live"]["id"])["mac"] is None


def test_a_process_that_ends_before_the_mark_does_no_harm(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", end)
        with pytest.raises(KeyboardInterrupt):
            upgraded(old)
    assert not (old / SEALED).exists()
    assert opens(opened(old)) == {"live", "narrow", "ward"}
    assert (old / SEALED).exists()


def test_no_caller_can_have_rows_sealed() -> None:
    """Whoever may call the registry could otherwise have a row sealed that others wrote."""
    named = {name for kind in PARTS.values() for name in dir(kind) if name[0] != "_"}
    assert not [name for name in named if "seal" in name and "reseal" not in name]


def test_the_command_names_the_keys(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.audit import LocalService

    opened(place).api_keys.create(US, "", [], None)
    put(place, forged())
    monkeypatch.setattr("tg_tinker.cli.registry.connector", lambda _: lambda tenant: Entered(place))

    class Entered(LocalService):
        pass

    said = CliRunner().invoke(main, ["registry", "check", "--tenant", US])
    assert said.exit_code == 1
    assert f"PROBLEM: API key {'0' * 12}: its row has no MAC" in said.output
