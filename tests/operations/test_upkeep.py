"""Tests the rotation of keys, the verification of artifacts, and saves that run beside training."""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from actors.artifacts.publish import Draft, publish, write
from actors.engine.checkpoint import to_files
from actors.operations import keys as keys_module
from actors.operations import restore, verify
from actors.registry.backup import backup
from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING
from actors.storage.key_providers import FileKeyring, new_text
from actors.storage.keyring import next_name
from actors.storage.store import ArtifactStore
from actors.training.place import Place
from actors.training.saving import MOST_COPIES
from actors.training.worker import Worker
from support.artifacts import TENANT, Service, assert_same, checkpoint
from support.artifacts import service as service  # a fixture
from support.helpers import assert_equal, examples, weights
from tg_tinker import (
    IntegrityError,
    InvalidRequestError,
    LoRAConfig,
    OptimizerConfig,
    RollbackError,
    ServiceClient,
    StorageError,
    TrainingConfig,
)
from tg_tinker.cli.main import main
from tg_tinker.cluster.messages import Saving

KEY = base64.b64encode(b"k" * 32).decode()

# --- keys ----------------------------------------------------------------------------------------


def wrapped_under(service: Service, artifact: str) -> str:
    return str(service.registry.data_keys.key_of(service.store.read_key(TENANT, artifact)))


def rewrapped(service: Service) -> list[tuple[str, str]]:
    return [*keys_module.rewrap(service.registry, str(service.root))]


def test_a_rotation_touches_no_data_and_everything_opens_before_and_after(
    service: Service,
) -> None:
    old = [service.publish(), service.publish(checkpoint(step=4))]
    service.registry.ledgers.register(TENANT, "chats", 8.0, 1e-5, "example")
    units = service.registry.ledgers.unit_key(TENANT, "chats")
    data = {path: path.read_bytes() for path in service.files() if path.suffix == ".enc"}
    assert service.registry.data_keys.rotate(TENANT) == "k2"
    new = service.publish()
    assert [wrapped_under(service, a) for a in (*old, new)] == ["k1", "k1", "k2"]
    assert_same(service.fetch(old[0]), checkpoint())
    assert rewrapped(service) == [(artifact, "") for artifact in (*old, new)]
    assert {wrapped_under(service, a) for a in (*old, new)} == {"k2"}
    assert all(path.read_bytes() == content for path, content in data.items())
    keys_module.retire(service.registry, str(service.root), TENANT, "k1")
    rows = [json.loads(row) for row in service.registry.audit_log.rows(TENANT, 0, 1000)]
    assert [(r["event"], r["subject"]) for r in rows if r["event"].startswith("key.")] == [
        ("key.rotate", "k2"), ("key.retire", "k1"),
    ]  # fmt: skip
    again = Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    assert again.data_keys.key_ids() == ["k2"]
    assert again.ledgers.unit_key(TENANT, "chats") == units
    assert_same(service.fetch(old[0]), checkpoint())


@pytest.mark.parametrize("broken_at", range(4))
def test_a_rotation_that_is_broken_off_is_finished_later(
    service: Service, monkeypatch: pytest.MonkeyPatch, broken_at: int
) -> None:
    known = [service.publish() for _ in range(4)]
    service.registry.data_keys.rotate(TENANT)
    write, count = ArtifactStore.write_key, iter(range(100))

    def dying(self: ArtifactStore, *arguments: Any) -> None:
        if next(count) == broken_at:
            raise KeyboardInterrupt
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "write_key", dying)
        with pytest.raises(KeyboardInterrupt):
            rewrapped(service)
    under = [wrapped_under(service, artifact) for artifact in known]
    assert under.count("k2") == broken_at
    for artifact in known:
        assert_same(service.fetch(artifact), checkpoint())
    with pytest.raises(InvalidRequestError, match=f"opens {4 - broken_at} artifacts"):
        keys_module.retire(service.registry, str(service.root), TENANT, "k1")
    assert rewrapped(service) == [(artifact, "") for artifact in known]
    keys_module.retire(service.registry, str(service.root), TENANT, "k1")
    for artifact in known:
        assert_same(service.fetch(artifact), checkpoint())


@pytest.mark.parametrize("retired", [[], ["k1"], ["k1", "k2"]])
def test_a_key_file_written_late_is_wrapped_again_though_its_key_was_destroyed(
    service: Service, monkeypatch: pytest.MonkeyPatch, retired: list[str]
) -> None:
    """One shell stalls in its write, while another rotates, wraps and retires."""
    artifact, root = service.publish(), str(service.root)
    shell = reopened(service)
    keys_module.rotate(service.registry, root, TENANT)
    write = ArtifactStore.write_key

    def stalled(store: ArtifactStore, *arguments: Any) -> None:
        monkeypatch.setattr(ArtifactStore, "write_key", write)
        keys_module.rotate(shell, root, TENANT)
        assert [*keys_module.rewrap(shell, root)] == [(artifact, "")]
        for key_id in retired:
            keys_module.retire(shell, root, TENANT, key_id)
        write(store, *arguments)

    monkeypatch.setattr(ArtifactStore, "write_key", stalled)
    assert rewrapped(service) == [(artifact, "")]
    assert wrapped_under(service, artifact) == "k3"
    assert_same(service.fetch(artifact), checkpoint())


def test_a_key_that_was_primary_when_files_were_read_is_not_retired(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key file may be written under this key until somebody rotates."""
    artifact, root = service.publish(), str(service.root)
    wrapped_now = keys_module._wrapped_under

    def read_then_rotated(*of: Any) -> Any:
        found = wrapped_now(*of)
        keys_module.rotate(service.registry, root, TENANT)
        return {artifact: "k9"}, found[1]

    monkeypatch.setattr(keys_module, "_wrapped_under", read_then_rotated)
    with pytest.raises(InvalidRequestError, match="primary one"):
        keys_module.retire(service.registry, root, TENANT, "k1")
    assert service.registry.data_keys.key_ids() == ["k1"]


def test_an_artifact_that_cannot_be_rewrapped_is_named_and_holds_up_no_other(
    service: Service,
) -> None:
    known = [service.publish() for _ in range(3)]
    service.registry.data_keys.rotate(TENANT)
    (service.root / f"t/{TENANT}/keys/{known[1]}.json").write_bytes(b"{}")
    found = dict(rewrapped(service))
    assert [bool(found[artifact]) for artifact in known] == [False, True, False]
    assert wrapped_under(service, known[2]) == "k2"


def test_a_wrapped_key_that_calls_itself_rewrapped_is_told(service: Service) -> None:
    """The name in the file proves nothing, so the wrapped key is opened."""
    artifact = service.publish()
    path = service.root / f"t/{TENANT}/keys/{artifact}.json"
    old = path.read_text()
    service.registry.data_keys.rotate(TENANT)
    path.write_text(old.replace('"k1"', '"k2"'))
    ((found, problem),) = rewrapped(service)
    assert (found, "does not open" in problem) == (artifact, True)


def test_artifacts_whose_key_file_does_not_say_are_listed_and_keep_every_key(
    service: Service,
) -> None:
    whole, damaged, gone, renamed, deep = (service.publish() for _ in range(5))
    keys, root = service.root / f"t/{TENANT}/keys", str(service.root)
    service.registry.data_keys.rotate(TENANT)
    (keys / f"{damaged}.json").write_bytes(b"{")
    (keys / f"{gone}.json").unlink()
    path = keys / f"{renamed}.json"
    path.write_text(path.read_text().replace('"k1"', '"k2"'))
    (keys / f"{deep}.json").write_text("[" * 100_000)
    found = keys_module.uses(service.registry, root)
    assert (found.primary, found.artifacts) == ("k2", {"k1": 1, "k2": 0})
    assert {*found.unreadable} == {damaged, gone, renamed, deep}
    assert [problem for name, problem in rewrapped(service) if name == whole] == [""]
    with pytest.raises(IntegrityError, match=f"{damaged}.*4 in all"):
        keys_module.retire(service.registry, root, TENANT, "k1")
    assert service.registry.data_keys.key_ids() == ["k1", "k2"]


def test_another_keyring_whose_keys_have_the_same_names_is_refused(service: Service) -> None:
    """It would open nothing that exists, and the right keyring would not open what it saves."""
    artifact = service.publish()
    database, keyring = f"sqlite:///{service.home / DATABASE}", service.home / KEYRING
    right = keyring.read_text()
    keyring.write_text(new_text())
    with pytest.raises(IntegrityError, match="another key than the 'k1'"):
        Registry(database, keyring)
    keyring.write_text(right)
    service.registry.data_keys.rotate(TENANT)
    rotated = keyring.read_text()
    keyring.write_text(json.dumps(json.loads(rotated) | {"keys": dict.fromkeys(("k1", "k2"), KEY)}))
    with pytest.raises(IntegrityError, match=r"another key than the 'k[12]'"):
        Registry(database, keyring)
    keyring.write_text(rotated)
    Registry(database, keyring).close()
    assert_same(service.fetch(artifact), checkpoint())


def reopened(service: Service) -> Registry:
    """Returns a registry like that of a process that starts now."""
    return Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)


def test_an_older_copy_of_the_keyring_is_told_and_its_next_key_has_a_name_of_its_own(
    service: Service,
) -> None:
    """A second k2 would differ from the known k2, and nothing would open any more."""
    keyring, root = service.home / KEYRING, str(service.root)
    service.registry.ledgers.register(TENANT, "chats", 8.0, 1e-5, "example")
    kept = service.publish()
    old = keyring.read_text()
    service.registry.data_keys.rotate(TENANT)
    lost, newest = service.publish(), keyring.read_text()
    keyring.write_text(old)
    registry = reopened(service)
    assert keys_module.uses(registry, root).missing == ("k2",)
    assert keys_module.rotate(registry, root, TENANT) == "k3"
    registry = reopened(service)
    found = keys_module.uses(registry, root)
    assert (found.primary, found.missing, {*found.unreadable}) == ("k3", (), {lost})
    problems = dict(keys_module.rewrap(registry, root))
    assert problems[kept] == ""
    assert all("needs key 'k2'" in problems[name] for name in (lost, f"dataset {TENANT}/chats"))
    with pytest.raises(IntegrityError, match=rf"dataset {TENANT}/chats"):
        registry.data_keys.retire(TENANT, "k1", {})
    assert registry.data_keys.key_ids() == ["k1", "k3"]
    keyring.write_text(newest)
    assert reopened(service).data_keys.missing_keys() == ["k3"]


def test_a_key_that_an_older_database_and_keyring_forgot_keeps_its_name(
    service: Service, tmp_path: Path
) -> None:
    """The store outlived both. A second k2 would hide the first, if its keyring is found again."""
    root, old = str(service.root), (service.home / KEYRING).read_text()
    backup(f"sqlite:///{service.home / DATABASE}", tmp_path / "old.db")
    keys_module.rotate(service.registry, root, TENANT)
    artifact, newest = service.publish(), (service.home / KEYRING).read_text()
    service.registry.close()
    keys = service.root / f"t/{TENANT}/keys"
    (keys / "huge.json").write_bytes(b'{"key_id": "k77"' + b" " * 2**20)
    (keys / "none.json").write_bytes(b'{"key_id": "k78x", "key_id": ["k79"]}')
    os.mkfifo(keys / "pipe.json")
    for file in service.home.glob(f"{DATABASE}*"):
        file.unlink()
    shutil.copy(tmp_path / "old.db", service.home / DATABASE)
    (service.home / KEYRING).write_text(old)
    registry = reopened(service)
    restore.accept(registry, root, TENANT, service.home)
    assert keys_module.rotate(registry, root, TENANT) == "k3"
    registry.close()
    (service.home / KEYRING).write_text(newest)
    wrapped = service.store.read_key(TENANT, artifact)
    assert reopened(service).data_keys.rewrapped(TENANT, artifact, wrapped) is None  # it opens


def test_what_was_retired_is_not_missed_and_its_name_not_given_again(service: Service) -> None:
    service.registry.data_keys.rotate(TENANT)
    keys_module.retire(service.registry, str(service.root), TENANT, "k1")
    assert service.registry.data_keys.missing_keys() == []
    assert service.registry.data_keys.rotate(TENANT) == "k3"
    assert reopened(service).data_keys.missing_keys() == []


def test_a_key_for_a_secret_manager_clashes_with_none_that_its_keyring_may_have_lost(
    service: Service,
) -> None:
    keyring = service.home / KEYRING
    old = keyring.read_text()
    service.registry.data_keys.rotate(TENANT)
    keyring.write_text(old)
    keyring.write_text(new_text(after=str(keyring)))
    registry = reopened(service)
    assert registry.data_keys.key_info()[0] not in ("k1", "k2")
    assert registry.data_keys.key_ids()[0] == "k1"


@pytest.mark.parametrize(
    ("used", "name"),
    [
        ([], "k1"), (["k1", "k3"], "k4"), (["k1", "k999999999"], "k2"),
        (["k2", "k999999999"], "k1"), (["k1", "k" + "9" * 5000], "k2"), (["k1", "k"], "k2"),
        (["k1", "k\u0669", "k\u00b2", "versions/7"], "k2"), (["k1", "k07", "k-7", "K8"], "k2"),
    ],
)  # fmt: skip
def test_the_next_key_has_a_free_name_whatever_names_were_used(used: list[str], name: str) -> None:
    assert next_name(used) == name


def test_a_keyring_with_the_highest_number_still_rotates(service: Service) -> None:
    keyring = service.home / KEYRING
    text = json.loads(keyring.read_text())
    text["keys"]["k999999999"], text["primary"] = KEY, "k999999999"
    keyring.write_text(json.dumps(text))
    registry = reopened(service)
    assert [registry.data_keys.rotate(TENANT), registry.data_keys.rotate(TENANT)] == ["k2", "k3"]
    assert reopened(service).data_keys.key_ids() == ["k1", "k999999999", "k2", "k3"]


def test_the_primary_key_is_the_one_that_is_named_so(service: Service) -> None:
    """Somebody may make an older key the primary one again while a newer key is investigated."""
    keyring = service.home / KEYRING
    service.registry.data_keys.rotate(TENANT)
    keyring.write_text(json.dumps(json.loads(keyring.read_text()) | {"primary": "k1"}))
    assert keys_module.uses(reopened(service), str(service.root)).primary == "k1"


def test_a_key_that_only_a_data_set_needs_is_not_lost_with_it(service: Service) -> None:
    """The keyring was rotated elsewhere, and nothing has wrapped the key of the dataset since."""
    service.registry.ledgers.register(TENANT, "chats", 8.0, 1e-5, "example")
    units = service.registry.ledgers.unit_key(TENANT, "chats")
    FileKeyring(service.home / KEYRING).rotate()
    service.registry.data_keys.retire(TENANT, "k1", {})
    registry = reopened(service)
    assert registry.data_keys.key_ids() == ["k2"]
    assert registry.ledgers.unit_key(TENANT, "chats") == units


@pytest.mark.parametrize(
    "call", [lambda *of: keys_module.rotate(*of, TENANT), lambda *of: [*keys_module.rewrap(*of)]]
)
def test_an_older_database_rotates_and_rewraps_nothing(
    service: Service, call: Callable[[Registry, str], object]
) -> None:
    service.publish()
    database = service.home / DATABASE
    service.registry.close()
    older = database.read_bytes()
    registry = replace(service, registry=reopened(service))
    registry.publish()
    registry.registry.close()
    database.write_bytes(older)
    FileKeyring(service.home / KEYRING).rotate()  # so there is something to wrap
    before = {path: path.read_bytes() for path in (service.home / KEYRING, *service.files())}
    again = reopened(service)
    with pytest.raises(RollbackError):
        call(again, str(service.root))
    assert {path: path.read_bytes() for path in before} == before
    assert "key.rotate" not in "".join(again.audit_log.rows(TENANT, 0, 1000))


class Shell:
    """The part of a service that `keys` uses, on a real registry and store."""

    def __init__(self, service: Service) -> None:
        self._of = (service.registry, str(service.root))
        self.list_keys = lambda: keys_module.uses(*self._of)
        self.rotate_key = lambda: keys_module.rotate(*self._of, TENANT)
        self.rewrap_keys = lambda: keys_module.rewrap(*self._of)
        self.retire_key = lambda key_id: keys_module.retire(*self._of, TENANT, key_id)

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None: ...


def told(shell: Shell, *words: str, answer: str | None = None) -> Any:
    return CliRunner().invoke(main, ["keys", *words], obj=lambda: shell, input=answer)


def test_the_keys_are_listed_rotated_and_retired_by_commands(service: Service) -> None:
    shell = Shell(service)
    service.publish()
    service.publish()
    rows = [line.split() for line in told(shell, "list").stdout.splitlines()]
    assert rows == [["key", "artifacts"], ["k1", "primary", "2"]]
    assert "key k2 is the primary one now" in told(shell, "rotate").output
    rows = [line.split() for line in told(shell, "list").stdout.splitlines()]
    assert rows[1:] == [["k1", "older", "0"], ["k2", "primary", "2"]]
    found = told(shell, "retire", "k9", "--yes")
    assert (found.exit_code, "choose among ['k1']" in found.output) == (1, True)
    assert told(shell, "retire", "k1", answer="n\n").exit_code == 1
    shell.list_keys = lambda: pytest.fail("every key file was read to ask for one name")
    assert told(shell, "retire", "k1", answer="y\n").exit_code == 0
    assert service.registry.data_keys.key_ids() == ["k2"]


@pytest.mark.parametrize("yes", [[], ["--yes"]])
@pytest.mark.parametrize("key", [KEY, KEY.rstrip("="), (b"k" * 32).hex(), "k1 \x1b[31m"])
def test_a_key_in_the_place_of_its_name_is_not_repeated(
    service: Service, key: str, yes: list[str]
) -> None:
    found = told(Shell(service), "retire", *yes, "--", key)
    assert (found.exit_code, "not the name of a key" in found.output) == (1, True)
    assert key not in found.output
    with pytest.raises(InvalidRequestError) as refused:
        keys_module.retire(service.registry, str(service.root), TENANT, key)
    assert key not in str(refused.value)


def test_a_list_of_an_older_keyring_ends_with_1_and_says_what_to_do(service: Service) -> None:
    old = (service.home / KEYRING).read_text()
    service.registry.data_keys.rotate(TENANT)
    (service.home / KEYRING).write_text(old)
    found = told(Shell(service), "list")
    assert found.exit_code == 1
    assert "older copy, it lacks k2. Restore the newest copy" in found.stderr
    assert "k1" in found.stdout


def test_a_program_that_decrypts_an_artifact_writes_no_core_file(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, limits = service.publish(), []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    service.fetch(artifact)
    assert limits == [(resource.RLIMIT_CORE, (0, 0))]


def test_a_key_that_is_primary_or_unknown_is_not_retired(service: Service) -> None:
    service.registry.data_keys.rotate(TENANT)
    for key_id in ("k2", "k9", ""):
        with pytest.raises(InvalidRequestError, match="cannot be retired"):
            service.registry.data_keys.retire(TENANT, key_id, {})


def test_what_only_a_retired_key_opens_is_lost(service: Service) -> None:
    """Destroying the key is what shreds a copy of the store that somebody kept."""
    artifact = service.publish()
    copy = service.store.read_key(TENANT, artifact)
    service.registry.data_keys.rotate(TENANT)
    rewrapped(service)
    keys_module.retire(service.registry, str(service.root), TENANT, "k1")
    service.store.write_key(TENANT, artifact, copy)
    with pytest.raises(IntegrityError, match="needs key 'k1'"):
        service.fetch(artifact)


def test_a_key_is_not_retired_over_an_artifact_that_nobody_counted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is drafted under the older key and entered after the keys were counted."""
    registry, root = service.registry, str(service.root)
    draft = Draft(registry, service.store, service.capability, to_files(checkpoint()))
    registry.data_keys.rotate(TENANT)
    retire_key = registry.data_keys.retire

    def late(*arguments: Any) -> None:
        values = {"run_id": service.run, "epoch": service.epoch, "step": 3}
        publish(registry, service.store, draft, include_optimizer=True, **values)
        retire_key(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(registry.data_keys, "retire", late)
        with pytest.raises(InvalidRequestError, match=r"saved meanwhile.*repeat"):
            keys_module.retire(registry, root, TENANT, "k1")
    assert registry.data_keys.key_ids() == ["k1", "k2"]
    assert "key.retire" not in "".join(registry.audit_log.rows(TENANT, 0, 1000))
    assert_same(service.fetch(draft.artifact_id), checkpoint())
    with pytest.raises(InvalidRequestError, match="opens 1 artifacts"):
        keys_module.retire(registry, root, TENANT, "k1")
    rewrapped(service)
    keys_module.retire(registry, root, TENANT, "k1")
    assert_same(service.fetch(draft.artifact_id), checkpoint())


def test_a_save_by_another_registry_finds_the_key_that_is_being_retired_gone(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save comes after the last count and before the key is destroyed."""
    other = Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    draft, refused = (
        Draft(other, service.store, service.capability, to_files(checkpoint())),
        list[str](),
    )
    service.registry.data_keys.rotate(TENANT)
    retire = FileKeyring.retire

    def save() -> None:
        values = {"run_id": service.run, "epoch": service.epoch, "step": 3}
        try:
            publish(other, service.store, draft, include_optimizer=True, **values)
        except StorageError as error:
            refused.append(error.message)

    saver = threading.Thread(target=save, daemon=True)

    def slow(ring: FileKeyring, key_id: str) -> None:
        saver.start()
        saver.join(1)  # it waits for the database until the key is gone
        retire(ring, key_id)

    monkeypatch.setattr(FileKeyring, "retire", slow)
    keys_module.retire(service.registry, str(service.root), TENANT, "k1")
    saver.join(30)
    assert "'k1' was retired" in refused[0]
    assert other.catalogue.find(TENANT) == []


def test_two_registries_on_one_home_save_under_the_key_of_today(service: Service) -> None:
    """A program trains while a shell rotates."""
    shell = Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    before = service.publish()
    shell.data_keys.rotate(TENANT)
    after = service.publish()
    assert [wrapped_under(service, artifact) for artifact in (before, after)] == ["k1", "k2"]
    assert [*keys_module.rewrap(shell, str(service.root))] == [(before, ""), (after, "")]
    keys_module.retire(shell, str(service.root), TENANT, "k1")
    last = service.publish()
    assert service.registry.data_keys.rotate(TENANT) == "k3"
    assert service.registry.data_keys.key_ids() == shell.data_keys.key_ids() == ["k2", "k3"]
    for artifact in (before, after, last):
        assert_same(service.fetch(artifact), checkpoint())


def test_a_key_that_cannot_be_retired_leaves_no_row(service: Service) -> None:
    with pytest.raises(InvalidRequestError):
        service.registry.data_keys.retire(TENANT, "k1", {})
    assert "key.retire" not in "".join(service.registry.audit_log.rows(TENANT, 0, 1000))


def test_the_keyring_stays_private_and_whole(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = service.home / KEYRING
    ring = FileKeyring(path)
    ring.rotate()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    assert json.loads(before)["primary"] == "k2"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="nothing was changed"):
            ring.rotate()
    assert path.read_bytes() == before
    assert ring.key_ids == FileKeyring(path).key_ids == ["k1", "k2"]
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".key")] == []


# --- checks --------------------------------------------------------------------------------------


def test_every_artifact_is_checked_whatever_the_others_are(service: Service) -> None:
    known = [service.publish() for _ in range(4)]
    weights = service.root / f"t/{TENANT}/a/{known[1]}/adapter_model.safetensors.enc"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (service.root / f"t/{TENANT}/keys/{known[2]}.json").unlink()
    found = dict(verify.verify(service.registry, str(service.root), TENANT))
    assert [bool(found[artifact]) for artifact in known] == [False, True, True, False]
    assert "is not what was published" in found[known[1]]


def test_what_a_stranger_puts_in_the_place_of_files_holds_no_check_up(service: Service) -> None:
    """A stranger may put a pipe without a writer there, or a file without an end."""
    whole, pipe, endless = (service.publish() for _ in range(3))
    key = service.root / f"t/{TENANT}/keys/{pipe}.json"
    key.unlink()
    os.mkfifo(key)
    os.truncate(service.root / f"t/{TENANT}/a/{endless}/adapter_model.safetensors.enc", 2**40)
    os.mkfifo(service.root / f"t/{TENANT}/audit/9-{'f' * 64}.json")
    registry = reopened(service)  # which has not met the store
    found = dict(verify.verify(registry, str(service.root), TENANT))
    assert found[whole] == ""
    assert f"{pipe}.json is not in the store" in found[pipe]
    assert "longer than what was put there" in found[endless]
    assert {*keys_module.uses(registry, str(service.root)).unreadable} == {pipe}


# --- saves beside training, through a real service -----------------------------------------------


@pytest.fixture(scope="module")
def client(embedded: None) -> Iterator[ServiceClient]:
    with ServiceClient(address="local") as service:
        yield service


def config(model: Path) -> TrainingConfig:
    return TrainingConfig(
        model_ref=str(model), lora_config=LoRAConfig(rank=4),
        optimizer=OptimizerConfig(learning_rate=0.1),
    )  # fmt: skip


BATCH = {"input_ids": [[65, 66, 67, 68]]}


@pytest.mark.slow
def test_a_save_holds_the_state_of_its_place_in_the_queue(
    client: ServiceClient, tiny_model: Path
) -> None:
    with client.create_training_client(config(tiny_model)) as tc:
        saves = []
        for _ in range(5):  # more than there may be copies in memory
            tc.forward_backward(BATCH)
            tc.optim_step()
            saves.append(tc.save_state_async(metadata={"place": len(saves)}))
        last = tc.forward_backward(BATCH).result().loss
        found = [save.result() for save in saves]
        assert [result.metadata["place"] for result in found] == [*range(5)]
        assert len({result.artifact_id for result in found}) == 5
        known = [info.artifact_id for info in client.list_artifacts()]
        assert [a for a in known if a in {r.artifact_id for r in found}] == [
            result.artifact_id for result in found
        ]  # entered in the order of the calls
        for step, result in enumerate(found, start=1):
            assert tc.load_state(result.artifact_id).step == step
        assert tc.forward_backward(BATCH).result().loss == last


@pytest.mark.slow
def test_close_waits_for_a_save_and_the_handle_still_answers(
    client: ServiceClient, tiny_model: Path
) -> None:
    with client.create_training_client(config(tiny_model)) as tc:
        save = tc.save_state_async()
    assert client.get_artifact(save.result().artifact_id).training_client_id == tc.id
    assert save.status() == "done"


@pytest.mark.slow
def test_a_save_that_is_cancelled_or_fails_says_so_and_training_goes_on(
    client: ServiceClient, tiny_model: Path
) -> None:
    with client.create_training_client(config(tiny_model)) as tc:
        tc.forward_backward({"input_ids": [[7] * 128] * 200})
        cancelled = tc.save_state_async()
        assert cancelled.cancel()
        assert cancelled.status() == "cancelled" or cancelled.exception() is not None
        before = len(client.list_artifacts())
        assert tc.optim_step().result().step == 1
        assert len(client.list_artifacts()) == before


@pytest.mark.slow
def test_the_commands_rotate_check_and_retire(client: ServiceClient, tiny_model: Path) -> None:
    with client.create_training_client(config(tiny_model)) as tc:
        saved = tc.save_state().artifact_id
        run = CliRunner()

        def said(*words: str, code: int = 0) -> str:
            found = run.invoke(main, [*words])
            assert found.exit_code == code, found.output
            return found.output

        assert "k1" in said("keys", "list")
        assert "k2 is the primary one now" in said("keys", "rotate")
        assert "opens" not in said("keys", "retire", "k1", "--yes")
        assert "cannot be retired" in said("keys", "retire", "k2", "--yes", code=1)
        assert "artifacts are whole" in said("artifacts", "verify")
        assert tc.load_state(saved).step == 0


def test_training_is_held_up_by_the_copy_alone(
    service: Service, tiny_model: Path, tmp_path: Path
) -> None:
    """The store does not answer. Steps that are made meanwhile are not in the saved state."""
    answer = threading.Event()

    def stuck(store: ArtifactStore, draft: Draft) -> None:
        answer.wait(60)
        write(store, draft)

    place = Place(
        TENANT, service.run, service.epoch, str(service.root), tmp_path, service.capability
    )
    worker = Worker(place, config(tiny_model), service.registry, lambda _: None, stuck)
    expected = weights(worker.session)
    saving = worker.save_state(lambda: None, True, {})
    for _ in range(2):
        worker.session.forward_backward(examples())
        worker.session.optim_step()
    assert worker.saver.outcome(saving, wait=False) is None
    answer.set()
    assert worker.saver.outcome(saving) is not None
    assert_equal(service.fetch(saving.artifact_id).state.weights, expected)
    assert worker.saver.drafts == {}  # nor is the copy in memory any more
    assert any(
        not torch.equal(expected[name], now) for name, now in weights(worker.session).items()
    )


def test_copies_in_memory_are_bounded(service: Service, tiny_model: Path, tmp_path: Path) -> None:
    answer = threading.Event()

    def stuck(store: ArtifactStore, draft: Draft) -> None:
        answer.wait(60)
        raise StorageError("full")

    place = Place(
        TENANT, service.run, service.epoch, str(service.root), tmp_path, service.capability
    )
    worker = Worker(place, config(tiny_model), service.registry, lambda _: None, stuck)
    saves: list[Saving] = []

    def save_five() -> None:
        saves.extend(worker.save_state(lambda: None, False, {}) for _ in range(5))

    saver = threading.Thread(target=save_five, daemon=True)
    saver.start()
    saver.join(1)
    assert len(worker.saver.drafts) == MOST_COPIES  # the third waits, and training with it
    answer.set()
    saver.join(30)
    for saving in saves:
        with pytest.raises(StorageError):
            worker.saver.outcome(saving)
    assert len(saves) == 5
    assert worker.saver.drafts == {}
