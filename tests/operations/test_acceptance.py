"""Tests the acceptance of an older copy of the database: its conditions, its messages, its
limits."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import Headers

from actors.artifacts import copies, delete
from actors.operations import keys as keys_module
from actors.operations import restore
from actors.operations import verify as upkeep
from actors.operations.sweep import sweep
from actors.registry import rollback
from actors.registry.rollback import keep, meet
from actors.storage.home import KEYRING
from actors.storage.store import ArtifactStore
from serve_app.http.access import Access, HttpOptions
from support.artifacts import TENANT, Service, assert_same, checkpoint
from support.artifacts import service as service  # a fixture
from support.audit import US, LocalService, restored
from support.audit import place as place  # a fixture
from support.restored import Restored, loaded, old_copy, on, put_back, train
from support.restored import old as old  # a fixture
from tg_tinker import (
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    RollbackError,
    StorageError,
)
from tg_tinker.records.audit_log import ACCEPT, AuditRow, acceptance, chained, parse_rows, verify
from tg_tinker.records.files import verify_export, write_export
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.successions import Signers
from tg_tinker.storage.envelope import new_signing_key, public_key_of

# --- the row -------------------------------------------------------------------------------------


def forge(old: Restored, details: dict[str, str | int]) -> None:
    """Writes a row as somebody can who has access to the database and has no key."""
    with old.registry.database.change() as tx:
        old.registry.audit_log._writer.note(tx, TENANT, "sdk", ACCEPT, "", details)


def lost(old: Restored) -> list[str]:
    """Returns the heads that the older database does not know."""
    names = [path.stem for path in old.service.root.glob(f"t/{TENANT}/audit/*.json")]
    return old.registry.audit_log.unknown(TENANT, names)


def test_who_writes_to_the_database_cannot_let_an_older_copy_pass(old: Restored) -> None:
    heads, key = lost(old), old.registry.audit_log._signing.private()
    joined, before = " ".join(heads), old.rows()[-1].hash
    forgeries: list[Callable[[str], dict[str, str | int]]] = [
        lambda last: {"heads": joined},
        lambda last: {"heads": joined, "signature": "none"},
        lambda last: acceptance(heads, TENANT, last, new_signing_key()),
        lambda last: acceptance(heads, "bank", last, key),
        lambda last: acceptance([], TENANT, last, key) | {"heads": joined},
        lambda last: acceptance(heads, TENANT, before, key),  # genuine, after another row
    ]
    for made in forgeries:
        forge(old, made(old.rows()[-1].hash))
        assert old.registry.audit_log.unknown(TENANT, heads) == heads
        assert old.registry.audit_log.accepting(TENANT) == []
    with pytest.raises(RollbackError):
        loaded(old.service, old.deleted)


def test_what_is_verified_counts_a_signed_acceptance_only(old: Restored) -> None:
    own = [head for head in heads_of(old) if head.place in lost(old)]
    key = public_key_of(old.registry.audit_log._signing.private())
    forge(old, {"heads": " ".join(head.place for head in own)})
    with pytest.raises(IntegrityError):
        verify(old.rows(), own=own, public_key=key)
    row = old.accept().row
    assert verify(old.rows(), own=own, public_key=key).accepted == (row,)
    with pytest.raises(IntegrityError):
        verify(old.rows(), own=own, public_key=public_key_of(new_signing_key()))


def heads_of(old: Restored) -> list[Any]:
    signers = Signers(public_key_of(old.registry.audit_log._signing.private()))
    return rollback.kept(old.root, TENANT, signers)


def test_an_acceptance_lets_the_heads_be_that_it_names_and_no_others(old: Restored) -> None:
    newest = old.newest.registry
    newest.runs.create(TENANT, "{}")
    later = newest.audit_log.head(TENANT)  # known to whoever goes on with the newest copy
    old.accept()
    loaded(old.service, old.kept)
    keep(old.root, later)
    assert old.registry.audit_log.unknown(TENANT, [later.place]) == [later.place]
    with pytest.raises(RollbackError):
        loaded(on(old.service, Path(str(old.registry.database.engine.url.database))), old.kept)


def test_an_acceptance_whose_head_the_store_refused_is_finished_by_the_next(
    old: Restored, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "write_audit_head", full)
        with pytest.raises(StorageError, match=r"is in the audit log.*repeat the call"):
            old.accept()
    found = old.check()
    assert (found.missing, found.unfinished, found.sound) == ({}, True, False)
    again = old.accept()
    assert (again.row, again.openable) == (0, (old.kept, old.deleted))
    assert old.check().sound
    with pytest.raises(RollbackError):  # the newest copy is told all the same
        old.newest.fetch(old.kept)


# --- artifacts -----------------------------------------------------------------------------------


def test_an_artifact_whose_files_are_lost_can_be_deleted_and_then_a_key_retired(
    old: Restored,
) -> None:
    for path in old.service.files_of(old.deleted):
        path.unlink()
    assert old.accept().lost == {old.deleted: "its files are gone"}
    registry, root = old.registry, old.root
    registry.data_keys.rotate(TENANT)
    [*keys_module.rewrap(registry, root)]
    with pytest.raises(IntegrityError, match=old.deleted):
        keys_module.retire(registry, root, TENANT, "k1")
    with pytest.raises(NotFoundError, match="delete --lost"):
        delete.delete(registry, root, TENANT, old.deleted)
    delete.delete(registry, root, TENANT, old.deleted, lost=True)
    assert [one.artifact_id for one in registry.catalogue.find(TENANT)] == [old.kept]
    keys_module.retire(registry, root, TENANT, "k1")
    assert_same(old.service.fetch(old.kept), checkpoint())


def test_a_lost_artifact_of_an_older_database_is_not_deleted(old: Restored) -> None:
    with pytest.raises(RollbackError):
        delete.delete(old.registry, old.root, TENANT, old.kept, lost=True)


def test_an_artifact_without_its_key_file_is_lost(old: Restored) -> None:
    old.service.store.delete_key(TENANT, old.deleted)
    assert [*old.accept().lost] == [old.deleted]


@pytest.fixture
def resealed(service: Service, tmp_path: Path) -> Restored:
    """Returns a copy that is from before two reseals."""
    kept, deleted = service.publish(), service.publish()
    database = old_copy(service, tmp_path / "old.db")
    for _ in range(2):
        copies.reseal(service.registry, str(service.root), TENANT, kept)
    return Restored(on(service, database), service, kept, deleted)


def test_an_artifact_that_was_resealed_since_opens_and_is_not_swept(resealed: Restored) -> None:
    assert resealed.accept().openable == (resealed.kept, resealed.deleted)
    [*sweep(resealed.registry, resealed.service.store, TENANT, 0)]
    swept = [*sweep(resealed.registry, resealed.service.store, TENANT, 0)]
    assert resealed.kept not in {one.name for one in swept}
    assert_same(resealed.service.fetch(resealed.kept), checkpoint())
    assert resealed.registry.catalogue.stored_as(TENANT, resealed.kept) == f"{resealed.kept}.3"
    copies.reseal(resealed.registry, resealed.root, TENANT, resealed.kept)
    assert (
        resealed.registry.catalogue.stored_as(TENANT, resealed.kept) == f"{resealed.kept}.4"
    )  # a new name


def test_no_sweep_removes_what_may_be_left_of_a_lost_artifact(resealed: Restored) -> None:
    """The acceptance may have been interrupted before it found the artifact."""
    registry, store = resealed.registry, resealed.service.store
    lines = [head.line() for head in heads_of(resealed)]
    assert registry.heads.accept(TENANT, [one for one in lines if parsed(one) in lost(resealed)])
    for _ in range(3):
        swept = {one.name: one.state for one in sweep(registry, store, TENANT, 0)}
        assert swept[f"{resealed.kept}.3"] == "kept"
    assert resealed.accept().openable == (resealed.kept, resealed.deleted)
    assert_same(resealed.service.fetch(resealed.kept), checkpoint())


def parsed(line: str) -> str:
    return AuditHead.parse(line).place


def test_a_sweep_goes_on_once_a_lost_artifact_is_forgotten(resealed: Restored) -> None:
    registry, store = resealed.registry, resealed.service.store
    store.delete_key(TENANT, f"{resealed.kept}.3")
    assert [*resealed.accept().lost] == [resealed.kept]
    delete.delete(registry, resealed.root, TENANT, resealed.kept, lost=True)
    for _ in range(2):
        swept = {one.name: one.state for one in sweep(registry, store, TENANT, 0)}
    assert swept[f"{resealed.kept}.3"] == "removed"


def test_an_expired_artifact_that_was_resealed_is_found_again(resealed: Restored) -> None:
    registry = resealed.registry
    with registry.database.change() as tx:
        tx.exec_driver_sql(f"UPDATE artifacts SET expires_at = 1 WHERE id = '{resealed.kept}'")  # noqa: S608
    assert resealed.accept().openable == (resealed.kept, resealed.deleted)
    registry.catalogue.set_expiry(TENANT, resealed.kept, None)
    assert_same(resealed.service.fetch(resealed.kept), checkpoint())


def test_an_artifact_whose_key_is_in_no_keyring_here_does_not_open_and_is_not_gone(
    old: Restored,
) -> None:
    keyring = old.service.home / KEYRING
    before = keyring.read_bytes()
    old.newest.registry.data_keys.rotate(TENANT)
    [*keys_module.rewrap(old.newest.registry, old.root)]
    newest = keyring.read_bytes()
    keyring.write_bytes(before)
    accepted = old.accept()
    assert (accepted.openable, {*accepted.lost}) == ((old.deleted,), {old.kept})
    assert "gone" not in accepted.lost[old.kept]
    keyring.write_bytes(newest)
    assert old.accept().openable == (old.kept, old.deleted)


@pytest.mark.parametrize("damage", ["file", "buried"])
def test_what_is_left_of_a_sealing_is_not_adopted(resealed: Restored, damage: str) -> None:
    registry, name = resealed.registry, f"{resealed.kept}.3"
    if damage == "file":
        (resealed.service.root / f"t/{TENANT}/a/{name}/adapter_model.safetensors.enc").unlink()
    else:
        registry.orphans.note(TENANT, {name: "seen"}, 0)
        assert registry.orphans.bury(TENANT, name, 1, 1)
    accepted = resealed.accept()
    assert (accepted.openable, [*accepted.lost]) == ((resealed.deleted,), [resealed.kept])
    assert registry.catalogue.stored_as(TENANT, resealed.kept) == resealed.kept


def test_what_a_stranger_put_there_is_not_taken_for_a_reseal(resealed: Restored) -> None:
    folder = resealed.service.root / f"t/{TENANT}/a/{resealed.kept}.3"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: entry | {"size": 1} for name, entry in manifest["files"].items()}
    (folder / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    other = resealed.service.root / f"t/{TENANT}/a/{resealed.kept}.4"
    shutil.copytree(resealed.service.root / f"t/{TENANT}/a/{resealed.deleted}", other)
    keys = resealed.service.root / f"t/{TENANT}/keys"
    shutil.copy(keys / f"{resealed.deleted}.json", keys / f"{resealed.kept}.4.json")
    accepted = resealed.accept()
    assert (accepted.openable, [*accepted.lost]) == ((resealed.deleted,), [resealed.kept])


# --- the home ------------------------------------------------------------------------------------


def test_a_damaged_head_of_the_home_is_a_problem_and_stops_nothing(old: Restored) -> None:
    path = old.service.home / f"audit-head-{TENANT}"
    for content in ("torn\n", "torn", ""):
        path.write_text(content)
        found = old.check()
        assert ([*found.damaged], found.sound, len(found.missing)) == ([str(path)], False, 1)
    assert old.accept().row
    found = old.check()
    assert ([*found.damaged], found.missing, found.sound) == ([str(path)], {}, False)
    path.unlink()
    assert old.check().sound


def test_a_head_of_the_home_by_another_key_is_a_problem(old: Restored) -> None:
    path = old.service.home / f"audit-head-{TENANT}"
    stranger = replace(old.registry.audit_log.head(TENANT), seq=99).signed(new_signing_key())
    path.write_text(f"{stranger.line()}\n")
    old.accept()
    found = old.check()
    assert ([*found.damaged], found.foreign, found.sound) == ([str(path)], {}, False)


# --- heads after everything that must not come back ----------------------------------------------


def newest_in(store: str, tenant: str) -> int:
    names = ArtifactStore(store).audit_heads(tenant)
    return max((int(rollback.place_in(name).split("-")[0]) for name in names), default=0)


@pytest.mark.parametrize("models", [[], (), "art-1", [1], [["art-1"]]])
def test_a_key_for_no_model_in_particular_has_to_be_asked_for(place: Path, models: Any) -> None:
    sdk = LocalService(place)
    with pytest.raises(InvalidRequestError, match="or None for all"):
        sdk.create_api_key("narrow", models)
    assert sdk.list_api_keys() == []
    assert sdk.create_api_key("all", None)[1].models == ()
    assert sdk.create_api_key("narrow", ["art-1"])[1].models == ("art-1",)


def test_an_older_copy_changes_no_expiry_and_no_api_key(place: Path) -> None:
    """The copy would leave a head of its own branch, and that head would make the newest copy
    refuse."""
    sdk = LocalService(place)
    run = sdk._registry.runs.create(US, "{}")
    sdk._registry.artifacts.publish(
        US, run, sdk._registry.runs.claim(run), "art-1", 1, 1, False, b"{}", "k1"
    )
    _, info = sdk.create_api_key()

    def go_on() -> None:
        sdk.set_expiry("art-1", None)

    restored(sdk, go_on)
    before = sorted(ArtifactStore(sdk._store).audit_heads(US))
    for call in (
        lambda: sdk.set_expiry("art-1", None), sdk.create_api_key,
        lambda: sdk.revoke_api_key(info.key_id),
    ):  # fmt: skip
        with pytest.raises(RollbackError):
            call()
    assert [key.key_id for key in sdk.list_api_keys()] == [info.key_id]
    assert sorted(ArtifactStore(sdk._store).audit_heads(US)) == before


def test_expiry_and_api_keys_leave_a_head(place: Path) -> None:
    sdk = LocalService(place)
    registry = sdk._registry
    run = registry.runs.create(US, "{}")
    registry.artifacts.publish(US, run, registry.runs.claim(run), "art-1", 1, 1, False, b"{}", "k1")

    def kept() -> bool:
        return newest_in(sdk._store, US) == registry.audit_log.head(US).seq

    assert not kept()
    sdk.set_expiry("art-1", datetime.now(UTC) + timedelta(days=1))
    assert kept()
    sdk.set_expiry("art-1", None)
    assert kept()
    _, info = sdk.create_api_key()
    assert kept()
    sdk.revoke_api_key(info.key_id)
    assert kept()


def test_a_retired_key_and_a_new_actor_leave_a_head(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, root = service.registry, str(service.root)
    registry.data_keys.rotate(TENANT)
    keys_module.retire(registry, root, TENANT, "k1")
    assert newest_in(root, TENANT) == registry.audit_log.head(TENANT).seq
    with pytest.raises(NotFoundError):
        train(service)
    claims = [row.seq for row in rows_of(service) if row.event == "run.claim"]
    assert newest_in(root, TENANT) >= claims[-1]


def rows_of(service: Service) -> list[AuditRow]:
    return [*parse_rows(service.registry.audit_log.rows(TENANT, 0, 1000))]


def test_a_store_that_refuses_a_head_is_told(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(ArtifactStore, "write_audit_head", full)
    with caplog.at_level(logging.WARNING, "tg_tinker"):
        service.publish()
    assert "head of the audit log was not written to the store: the disk is full" in caplog.text


def asked(access: Access, token: str = "") -> str:
    headers = {"host": "localhost", "authorization": f"Bearer {token}"}
    request: Any = SimpleNamespace(headers=Headers(headers))
    return asyncio.run(access.caller(request)).key_id


def test_an_api_key_that_was_revoked_since_opens_nothing_on_an_older_copy(
    service: Service, tmp_path: Path
) -> None:
    token, info = service.registry.api_keys.create(TENANT, "", [], None)
    database = old_copy(service, tmp_path / "old.db")
    root, options = str(service.root), HttpOptions(TENANT)
    assert asked(Access(service.registry, options, root), token) == info.key_id
    service.registry.api_keys.revoke(TENANT, info.key_id)
    keep(root, service.registry.audit_log.head(TENANT))
    with pytest.raises(RollbackError):
        asked(Access(on(service, database).registry, options, root), token)


def test_a_server_that_had_keys_is_not_open_on_an_older_copy(
    service: Service, tmp_path: Path
) -> None:
    database = old_copy(service, tmp_path / "old.db")
    root, options = str(service.root), HttpOptions(TENANT, open=True)
    assert asked(Access(service.registry, options, root)) == "open"
    service.registry.api_keys.create(TENANT, "", [], None)
    keep(root, service.registry.audit_log.head(TENANT))
    with pytest.raises(RollbackError):
        asked(Access(on(service, database).registry, options, root))


def test_rows_that_accept_are_canonical(old: Restored) -> None:
    old.accept()
    row = old.rows()[-1]
    again = chained(
        old.rows()[-2], time=row.time, tenant=TENANT, who="sdk", event=ACCEPT, subject="",
        outcome="ok", details=dict(row.details),
    )  # fmt: skip
    assert again == row
    meet(old.registry, old.service.store, TENANT)


# --- what is held against what -------------------------------------------------------------------


def test_the_newest_head_that_is_missing_is_named(old: Restored) -> None:
    for _ in range(3):
        old.newest.publish()
    newest = old.newest.registry.audit_log.head(TENANT)
    with pytest.raises(RollbackError) as caught:
        loaded(old.service, old.kept)
    assert caught.value.details["row"] == newest.seq
    assert newest.place in caught.value.details["object"]


def test_only_heads_that_the_log_does_not_know_and_the_newest_of_the_others_are_read(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        service.publish()
    read, known = list[str](), service.store.audit_heads(TENANT)
    monkeypatch.setattr(ArtifactStore, "read_head", lambda _, name, __: read.append(name) or "")
    service = on(service, Path(str(service.registry.database.engine.url.database)))
    (service.root / f"t/{TENANT}/audit/99-{'0' * 64}.json").write_text("none\n")
    meet(service.registry, service.store, TENANT)
    newest = max(known, key=lambda name: int(name.rpartition("/")[2].split("-")[0]))
    assert read == [f"t/{TENANT}/audit/99-{'0' * 64}.json", newest]


def test_a_stranger_s_signature_under_a_known_place_stops_no_sweep(service: Service) -> None:
    service.publish()
    ours = service.registry.audit_log.head(TENANT).signed(new_signing_key())
    (service.root / f"t/{TENANT}/audit/94-{'0' * 64}.json").write_text(f"{ours.line()}\n")
    [*sweep(service.registry, service.store, TENANT, 0)]


def test_an_artifact_without_its_manifest_is_lost(old: Restored) -> None:
    (old.service.root / f"t/{TENANT}/a/{old.deleted}/manifest.json").unlink()
    assert [*old.accept().lost] == [old.deleted]


def test_a_tenant_that_nobody_knows_is_not_called_sound(old: Restored) -> None:
    with pytest.raises(NotFoundError, match=TENANT):
        restore.check(old.registry, old.root, "typo", old.service.home)


def test_a_stranger_s_long_objects_are_not_held_in_memory(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.publish()
    for number in range(3):
        with (service.root / f"t/{TENANT}/audit/{90 + number}-{'0' * 64}.json").open("wb") as file:
            file.truncate(2**20)
    found, _ = rollback.unknown_in(service.registry, service.store, TENANT)
    assert [*found.values()] == ["", "", ""]
    service = on(service, Path(str(service.registry.database.engine.url.database)))
    assert service.publish()


def test_a_stranger_s_link_among_the_tenants_is_none(service: Service) -> None:
    service.publish()
    (service.root / "t/no tenant").mkdir()
    (service.root / "t/evil").symlink_to("/")
    assert service.store.tenants() == [TENANT]
    service.registry.data_keys.rotate(TENANT)
    [*keys_module.rewrap(service.registry, str(service.root))]
    keys_module.retire(service.registry, str(service.root), TENANT, "k1")


# --- artifacts against the log -------------------------------------------------------------------


def test_verify_tells_what_was_undone_in_the_database(service: Service, tmp_path: Path) -> None:
    registry, root = service.registry, str(service.root)
    artifact = service.publish()
    copied = copies.copy(registry, root, TENANT, artifact).artifact_id
    for one in (artifact, copied):
        registry.catalogue.set_expiry(TENANT, one, datetime.now(UTC) + timedelta(days=1))
        registry.catalogue.set_expiry(TENANT, one, None)
    copies.reseal(registry, root, TENANT, artifact)

    def found() -> dict[str, str]:
        return dict(upkeep.verify(registry, root, TENANT))

    def edit(change: str) -> None:
        with registry.database.change() as tx:
            tx.exec_driver_sql(f"UPDATE artifacts SET {change} WHERE id = '{artifact}'")  # noqa: S608

    assert found() == {artifact: "", copied: ""}
    edit("expires_at = 9e9")
    assert "another expiry" in found()[artifact]
    edit("expires_at = NULL")
    digest = registry.catalogue.entries(TENANT)[artifact][0]
    edit("manifest_sha256 = 'f'")
    assert "another manifest" in found()[artifact]
    edit(f"manifest_sha256 = '{digest}'")
    assert found()[artifact] == ""
    shutil.copytree(service.root, tmp_path / "store")
    delete.shred(registry, root, TENANT, artifact)
    shutil.copytree(tmp_path / "store", service.root, dirs_exist_ok=True)
    edit("deleted_at = NULL")
    assert f"deleted at row {registry.audit_log.head(TENANT).seq}" in found()[artifact]
    assert found()[copied] == ""


# --- what a process remembers --------------------------------------------------------------------


def test_rows_of_another_process_count_once_this_one_was_asked(
    service: Service, tmp_path: Path
) -> None:
    artifact = service.publish()
    database = old_copy(service, tmp_path / "old.db")
    other = on(service, Path(str(service.registry.database.engine.url.database)))
    other.publish()
    assert service.fetch(artifact)  # it sees the other's row, and writes none that matters here
    shutil.rmtree(service.root / f"t/{TENANT}/audit")
    keep(str(service.root), other.registry.audit_log.head(TENANT))
    service.registry.audit_log._writer.reached[TENANT] = service.registry.audit_log._writer.end(
        TENANT
    )
    put_back(database, service)
    with pytest.raises(RollbackError):
        service.fetch(artifact)


def test_of_two_changes_at_once_the_later_row_is_remembered(service: Service) -> None:
    registry = service.registry
    registry.audit_log._writer._remember(TENANT, (90, "a"))
    registry.audit_log._writer._remember(TENANT, (80, "b"))
    assert registry.audit_log._writer.reached[TENANT] == (90, "a")


def test_a_head_in_the_store_counts_by_what_it_says_and_not_by_its_name(service: Service) -> None:
    service.publish()
    registry, root = service.registry, str(service.root)
    stored = restore.check(registry, root, TENANT, service.home).stored
    assert stored == registry.audit_log.head(TENANT).seq
    for path in service.root.glob(f"t/{TENANT}/audit/*.json"):
        path.write_text("junk\n")
    assert restore.check(registry, root, TENANT, service.home).stored == 0


def test_what_an_acceptance_finds_leaves_a_head(resealed: Restored) -> None:
    resealed.accept()
    assert resealed.check().stored == resealed.registry.audit_log.head(TENANT).seq


def test_a_keyring_whose_older_keys_were_retired_opens_an_older_copy(
    service: Service, tmp_path: Path
) -> None:
    artifact = service.publish()
    database = old_copy(service, tmp_path / "old.db")
    registry, root = service.registry, str(service.root)
    keys_module.rotate(registry, root, TENANT)
    [*keys_module.rewrap(registry, root)]
    keys_module.retire(registry, root, TENANT, "k1")
    older = on(service, database)
    assert older.registry.data_keys.missing_keys() == []  # k2 came after all that it knows
    restore.accept(older.registry, root, TENANT, service.home)
    assert older.fetch(artifact)


def test_an_export_says_which_row_accepted_an_older_copy(old: Restored, tmp_path: Path) -> None:
    row = old.accept().row
    head, path = old.registry.audit_log.head(TENANT), tmp_path / "export.jsonl"
    write_export(path, old.rows(), head)
    key = public_key_of(old.registry.audit_log._signing.private())
    assert verify_export(path, key).accepted == (row,)
