"""Tests the rotation of the signing key and of the secrets under a registry: old heads, exports,
ledgers and capabilities stay good, and a stolen old key makes nothing that counts."""

from __future__ import annotations

import base64
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.operations import keys, restore
from actors.registry import actor, rollback
from actors.registry.registry import Registry
from actors.registry.upgrade import upgrade
from actors.storage.home import DATABASE, KEYRING, STORE, create
from actors.storage.secrets import CAPABILITIES, ENTRIES, FILE, PSEUDONYMS, TRANSPORT, Secrets
from actors.storage.signing import CHAIN, PUBLIC_KEY, SIGNING_KEY, SigningKey, load
from actors.storage.store import ArtifactStore
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from support.audit import CONFIG, THEM, US, LocalService, open_registry, restored
from support.old_homes import old_home
from support.privacy_helpers import new_budget, private_config
from tg_tinker.cli.main import main
from tg_tinker.errors import (
    AccessDeniedError,
    IntegrityError,
    InvalidRequestError,
    LedgerMismatchError,
    RollbackError,
    StorageError,
)
from tg_tinker.records.audit_log import ACCEPT, AuditRow, acceptance, succession_details
from tg_tinker.records.files import (
    KeptHead,
    paged,
    read_head,
    verify_export,
    write_export,
)
from tg_tinker.records.heads import LedgerHead
from tg_tinker.records.successions import SUCCEED, Succession
from tg_tinker.storage.envelope import context_of, derive_key, new_signing_key, raw_public_key, seal

DATA = "d"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    create(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def local(home: Path) -> LocalService:
    local = LocalService(home)
    local._registry.runs.create(US, "{}")
    return local


def rotated(local: LocalService) -> str:
    return keys.rotate_signing_key(local._registry, local._store)  # type: ignore[arg-type]


def exported(local: LocalService, path: Path) -> Path:
    head = local.verify_audit_log()
    write_export(path, paged(local.audit_log), head)
    return path


def events(registry: Any, tenant: str = US) -> list[str]:
    return [AuditRow.parse(line).event for line in registry.audit_log.rows(tenant, 0, 1000)]


# --- exports and heads ---------------------------------------------------------------------------


def test_an_export_verifies_with_each_public_key_there_ever_was(
    local: LocalService, tmp_path: Path
) -> None:
    pins, known = [(local._home / PUBLIC_KEY).read_bytes()], [local.verify_audit_log()]
    for n in range(2):
        early = exported(local, tmp_path / f"early{n}.jsonl")
        assert verify_export(early, pins[-1], known[-1])
        rotated(local)
        local._registry.runs.create(US, "{}")
        pins.append((local._home / PUBLIC_KEY).read_bytes())
        known.append(local.verify_audit_log())
    late = exported(local, tmp_path / "late.jsonl")
    for pin in pins:
        for head in known:
            assert verify_export(late, pin, head).since == head
    with pytest.raises(IntegrityError, match="another key signed"):
        verify_export(early, pins[-1])
    assert events(local._registry).count(SUCCEED) == 2


def test_a_log_that_began_after_a_rotation_verifies_with_the_old_key_too(
    local: LocalService, tmp_path: Path
) -> None:
    pin = (local._home / PUBLIC_KEY).read_bytes()
    rotated(local)
    them = LocalService(local._home, THEM)
    them._registry.runs.create(THEM, "{}")
    assert verify_export(exported(them, tmp_path / "them.jsonl"), pin)
    assert events(them._registry, THEM) == [SUCCEED, "run.create"]


def test_a_head_that_is_made_beside_a_rotation_verifies(
    local: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin, writer = (local._home / PUBLIC_KEY).read_bytes(), local._registry.audit_log._writer
    end, other = writer.end, LocalService(local._home, US)

    def rotates_first(tenant: str) -> tuple[int, str]:
        monkeypatch.setattr(writer, "end", end)
        rotated(other)
        return end(tenant)

    monkeypatch.setattr(writer, "end", rotates_first)
    head = local._registry.audit_log.head(US)
    rows = [AuditRow.parse(line) for line in local._registry.audit_log.rows(US, 0, 1000)]
    write_export(tmp_path / "log.jsonl", rows, head)
    assert verify_export(tmp_path / "log.jsonl", pin) == head


def forged(local: LocalService, path: Path, thief: bytes, *more: Succession) -> Path:
    """Writes what a thief of a signing key can make of a log: the rows up to now, then his own, and
    a head by his key."""
    database = copied(local._home / DATABASE, path.with_suffix(".db"))
    registry = Registry(f"sqlite:///{database}", local._home / KEYRING)
    registry.runs.create(US, '{"false": true}')
    with registry.database.change() as tx:
        for step in more:
            details = {k: v for k, v in vars(step).items() if k != "key"}
            registry.audit_log._writer._append(tx, US, "sdk", SUCCEED, step.key, details, "ok")
    rows = [AuditRow.parse(line) for line in registry.audit_log.rows(US, 0, 1000)]
    write_export(path, rows, registry.audit_log.head(US).signed(thief))
    registry.close()
    return path


def test_a_stolen_old_key_signs_no_head_after_the_rotation(
    local: LocalService, tmp_path: Path
) -> None:
    old, first = load(local._home), (local._home / PUBLIC_KEY).read_bytes()
    rotated(local)
    second, mine = (local._home / PUBLIC_KEY).read_bytes(), new_signing_key()
    own = Succession.of(old, mine)
    for n, (key, more) in enumerate([(old, ()), (mine, (own,)), (old, (own,)), (mine, ())]):
        path = forged(local, tmp_path / f"{n}.jsonl", key, *more)
        for pin in (first, second):
            with pytest.raises(IntegrityError, match="another key signed"):
                verify_export(path, pin)


def test_a_log_without_the_rotation_fails_for_whoever_knows_a_later_head_or_key(
    local: LocalService, tmp_path: Path
) -> None:
    old, first = load(local._home), (local._home / PUBLIC_KEY).read_bytes()
    early = exported(local, tmp_path / "early.jsonl")
    forgery = forged(local, tmp_path / "forged.jsonl", old)
    rotated(local)
    later = local.verify_audit_log()
    assert verify_export(forgery, first)  # Nobody can tell, without later knowledge.
    with pytest.raises(IntegrityError):
        verify_export(forgery, first, later)
    with pytest.raises(IntegrityError):
        verify_export(forgery, (local._home / PUBLIC_KEY).read_bytes())
    assert read_head(early).seq < later.seq


def test_rows_of_a_rotation_that_no_key_signed_change_nothing(
    local: LocalService, tmp_path: Path
) -> None:
    """Who writes the database writes rows, and has no key."""
    pin, mine = (local._home / PUBLIC_KEY).read_bytes(), new_signing_key()
    true = Succession.of(load(local._home), mine)
    false = [
        replace(true, signature=true.countersignature), replace(true, countersignature="0" * 128),
        Succession.of(new_signing_key(), mine), replace(true, key="0" * 64),
    ]  # fmt: skip
    for n, step in enumerate(false):
        path = forged(local, tmp_path / f"{n}.jsonl", mine, step)
        with pytest.raises(IntegrityError, match="another key signed"):
            verify_export(path, pin)


def test_a_crash_between_files_and_database_is_mended_by_the_next_head(
    local: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = (local._home / PUBLIC_KEY).read_bytes()
    SigningKey(local._home).rotate()
    again = LocalService(local._home)
    assert verify_export(exported(again, tmp_path / "after.jsonl"), pin)
    assert events(again._registry)[-1] == SUCCEED
    again.verify_audit_log()
    assert events(again._registry).count(SUCCEED) == 1


# --- the registry and its store ------------------------------------------------------------------


def put_audit_head(local: LocalService, key: bytes, seq: int) -> str:
    head = replace(local._registry.audit_log.head(US), seq=seq, hash="e" * 64).signed(key)
    ArtifactStore(local._store).write_audit_head(US, head.place, head.line())
    return head.place


def test_a_stolen_old_key_locks_nobody_out_and_is_told(local: LocalService) -> None:
    rollback.keep_newest(local._registry, ArtifactStore(local._store), US)  # type: ignore[arg-type]
    old = load(local._home)
    rotated(local)
    place = put_audit_head(local, old, 99)
    fresh = open_registry(local._home)
    rollback.compare(fresh, ArtifactStore(local._store), US)
    found = restore.check(fresh, local._store, US, local._home)
    assert not found.missing
    assert ["replaced since" in why for why in found.foreign.values()] == [True]
    with pytest.raises(IntegrityError, match=f"{place}.*not a valid head.*remove that object"):
        local.verify_audit_log()


def test_before_the_rotation_such_a_head_counts(local: LocalService) -> None:
    put_audit_head(local, load(local._home), 99)
    with pytest.raises(RollbackError):
        rotated(local)
    assert not (local._home / CHAIN).exists()


def test_where_a_store_has_no_head_by_the_new_key_old_heads_count(local: LocalService) -> None:
    old = load(local._home)
    local._registry.home_keys.rotate_signing_key()  # type: ignore[attr-defined]
    put_audit_head(local, old, 99)
    with pytest.raises(RollbackError):
        rollback.compare(open_registry(local._home), ArtifactStore(local._store), US)


def test_a_database_from_before_the_rotation_is_noticed(local: LocalService) -> None:
    restored(local, lambda: rotated(local))
    with pytest.raises(RollbackError):
        rollback.compare(local._registry, ArtifactStore(local._store), US)  # type: ignore[arg-type]


def test_the_loss_that_an_old_key_accepted_stays_accepted(local: LocalService) -> None:
    def lose() -> None:
        local._registry.runs.create(US, "{}")
        rollback.keep_newest(local._registry, ArtifactStore(local._store), US)  # type: ignore[arg-type]

    restored(local, lose)
    assert restore.accept(local._registry, local._store, US, local._home).row  # type: ignore[arg-type]
    rotated(local)
    rotated(local)
    again = LocalService(local._home)
    assert restore.check(again._registry, again._store, US, again._home).sound  # type: ignore[arg-type]
    assert again.verify_audit_log().accepted


def test_a_stolen_old_key_accepts_no_older_copy(local: LocalService) -> None:
    """The thief also writes the database, and copies the row of the rotation behind his own."""
    old = load(local._home)
    lost: list[str] = []

    def lose() -> None:
        rotated(local)
        local._registry.runs.create(US, "{}")
        store = ArtifactStore(local._store)
        rollback.keep_newest(local._registry, store, US)  # type: ignore[arg-type]
        lost.extend(rollback.place_in(name) for name in store.audit_heads(US))

    restored(local, lose)
    (step,) = SigningKey(local._home).succession()
    registry = local._registry
    with registry.database.change() as tx:  # type: ignore[attr-defined]
        writer = registry.audit_log._writer  # type: ignore[attr-defined]
        last = AuditRow.parse(registry.audit_log.rows(US, 0, 99)[-1])
        writer._append(tx, US, "sdk", ACCEPT, "", acceptance(lost, US, last.hash, old), "ok")
        writer._append(tx, US, "sdk", SUCCEED, step.key, succession_details(step), "ok")
    fresh = LocalService(local._home)
    with pytest.raises(RollbackError):
        rollback.compare(fresh._registry, ArtifactStore(local._store), US)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError):
        fresh.verify_audit_log()


# --- ledgers -------------------------------------------------------------------------------------


def copied(database: Path, to: Path) -> Path:
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
    return to


def spent(home: Path, steps: int, *, stored: bool = True) -> str:
    """Charges a dataset, and returns its head with the entries of these charges; puts the head into
    the store if `stored`."""
    registry = open_registry(home)
    config = private_config(Path("none"), dp={"noise_multiplier": 4.0}, dataset_id=DATA)
    after = len(registry.ledgers.entries("default", DATA)) - 1
    budget = new_budget(registry, config)
    for step in range(steps):
        budget.charge([step.to_bytes(16, "big")], noised=True)
    head = LedgerHead.parse(registry.heads.ledger_head("default", DATA, after))
    if stored:
        store = ArtifactStore(str(home / STORE))
        store.write_ledger_head("default", head.ledger, head.place, head.line())
    return head.line()


def ledger(home: Path) -> tuple[Registry, ArtifactStore]:
    return open_registry(home), ArtifactStore(str(home / STORE))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("rotation", ["signing", PSEUDONYMS, ENTRIES])
def test_charges_from_before_a_rotation_are_noticed_and_booked(
    home: Path, stored: bool, rotation: str
) -> None:
    spent(home, 1)
    backup = copied(home / DATABASE, home / "backup.db")
    kept = [spent(home, 10, stored=stored)]
    entries = open_registry(home).ledgers.entries("default", DATA)
    registry = open_registry(home)
    if rotation == "signing":
        keys.rotate_signing_key(registry, str(home / STORE))
    else:
        keys.rotate_secret(registry, str(home / STORE), "default", rotation)
    spent(home, 3)
    registry, store = ledger(home)
    assert rollback.meet_ledger(registry, store, "default", DATA, kept) > 0
    newest = registry.ledgers.entries("default", DATA)
    assert newest[: len(entries)] == entries
    registry = Registry(f"sqlite:///{backup}", home / KEYRING)
    with pytest.raises(LedgerMismatchError):
        rollback.meet_ledger(registry, store, "default", DATA)
    assert rollback.book_missing(registry, store, "default", DATA, kept)
    assert registry.ledgers.entries("default", DATA)[: len(newest)] == newest


def thief_head(home: Path, key: bytes, secret: bytes) -> LedgerHead:
    """Returns a head of a ledger with a charge that was never made, by a stolen signing key of an
    old home, from which the thief derives all secrets."""
    registry = open_registry(home)
    head = LedgerHead.parse(registry.heads.ledger_head("default", DATA, -1))
    false = {"type": "charge", "prev": head.hash}
    context = context_of("default", DATA, "ledger entries")
    entries = base64.b64encode(
        seal(derive_key(secret, context), json.dumps([false]).encode(), context)
    ).decode()
    return replace(head, seq=head.seq + 1, hash="e" * 64, entries=entries).signed(key)


def test_a_stolen_key_of_an_old_home_charges_and_blocks_no_ledger(home: Path) -> None:
    (home / FILE).unlink()
    spent(home, 2)
    stolen = load(home)
    keys.rotate_signing_key(open_registry(home), str(home / STORE))
    head = thief_head(home, stolen, stolen)
    registry, store = ledger(home)
    store.write_ledger_head("default", head.ledger, head.place, head.line())
    before = registry.ledgers.entries("default", DATA)
    rollback.meet_ledger(registry, store, "default", DATA)
    assert rollback.book_missing(registry, store, "default", DATA) == 0
    assert registry.ledgers.entries("default", DATA) == before


def test_a_stolen_key_of_an_old_home_blocks_no_ledger_that_begins_later(home: Path) -> None:
    (home / FILE).unlink()
    open_registry(home).runs.create("default", CONFIG)
    stolen = load(home)
    keys.rotate_signing_key(open_registry(home), str(home / STORE))
    spent(home, 1, stored=False)
    head = thief_head(home, stolen, stolen)
    registry, store = ledger(home)
    store.write_ledger_head("default", head.ledger, head.place, head.line())
    rollback.meet_ledger(registry, store, "default", DATA)


def test_the_head_that_a_home_keeps_counts_whichever_key_signed_it(home: Path) -> None:
    kept = KeptHead(home, "default", DATA)
    spent(home, 1)
    backup = copied(home / DATABASE, home / "backup.db")
    kept.saw(spent(home, 2))
    keys.rotate_signing_key(open_registry(home), str(home / STORE))
    rollback.meet_ledger(*ledger(home), "default", DATA, kept.lines)
    old, none = Registry(f"sqlite:///{backup}", home / KEYRING), ArtifactStore(str(home / "none"))
    with pytest.raises(LedgerMismatchError):
        rollback.meet_ledger(old, none, "default", DATA, kept.lines)


# --- homes of earlier releases -------------------------------------------------------------------


def test_an_old_home_keeps_its_pseudonyms_and_heads_through_every_rotation(
    tmp_path: Path,
) -> None:
    home = old_home(tmp_path / "home")
    upgrade(f"sqlite:///{home / DATABASE}", tmp_path / "before.db")
    old, store = load(home), ArtifactStore(str(home / STORE))
    registry = Registry(f"sqlite:///{home / DATABASE}", home / KEYRING)
    datasets = [(t, d) for t in registry.audit_log.tenants() for d in registry.ledgers.datasets(t)]
    names = {
        (tenant, data): derive_key(old, context_of(tenant, data, "ledger pseudonym")).hex()
        for tenant, data in datasets
    }
    assert names
    assert not (home / FILE).exists()
    shutil.copytree(home / STORE, tmp_path / "store")
    root = str(home / STORE)
    keys.rotate_signing_key(registry, root)
    for name in (PSEUDONYMS, ENTRIES, CAPABILITIES):
        keys.rotate_secret(registry, root, "default", name)
    again = Registry(f"sqlite:///{home / DATABASE}", home / KEYRING)
    for (tenant, data), name in names.items():
        assert again.heads.ledger_names(tenant, data)[1:] == [name]
        for line in (store.read_head(one) for one in store.ledger_heads(tenant, name)):
            head = again.heads._ledger_head(tenant, data, line)
            assert again.heads._entries(data, head)
    rollback.meet_all(again, store)
    assert old not in (home / FILE).read_bytes()


# --- copies of the files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ({FILE: None}, "secret"),
        ({CHAIN: None}, "audit key"),
        ({SIGNING_KEY: 0, PUBLIC_KEY: 0, CHAIN: None}, "audit key"),
        ({FILE: 0}, "secret"),
    ],
)
def test_an_older_copy_of_the_files_or_none_is_refused_and_never_a_new_beginning(
    local: LocalService, lost: dict[str, int | None], says: str
) -> None:
    before = {path.name: path.read_bytes() for path in local._home.iterdir() if path.is_file()}
    rotated(local)
    keys.rotate_secret(local._registry, local._store, US, PSEUDONYMS)  # type: ignore[arg-type]
    for name, copy in lost.items():
        (local._home / name).unlink()
        if copy is not None:
            (local._home / name).write_bytes(before[name])
            (local._home / name).chmod(0o600)
    for looks_only in (False, True):
        with pytest.raises(IntegrityError, match=rf"{says}.*restore the newest backup"):
            Registry(
                f"sqlite:///{local._home / DATABASE}", local._home / KEYRING, looks_only=looks_only
            )


# --- capabilities --------------------------------------------------------------------------------


def test_a_capability_lives_through_a_rotation_and_ends_with_its_version(service: Service) -> None:
    artifact, old = service.publish(), service.capability
    wrapped = service.store.read_key(TENANT, artifact)

    def opened(shown: Any) -> bytes:
        return service.registry.data_keys.open(shown, artifact, wrapped, service.store.root)

    assert keys.rotate_secret(service.registry, str(service.root), TENANT, CAPABILITIES) == 2
    new = service.registry.data_keys.capability(TENANT, service.run, service.epoch)
    assert new.tag != old.tag
    assert opened(old) == opened(new)
    keys.retire_secret(service.registry, str(service.root), TENANT, CAPABILITIES)
    assert len(opened(new)) == 32
    with pytest.raises(AccessDeniedError):
        opened(old)
    assert {"secret.rotate", "secret.retire"} < {*events(service.registry, TENANT)}


def test_a_refused_rotation_leaves_no_row(service: Service) -> None:
    before = events(service.registry, TENANT)
    calls: list[Callable[..., Any]] = [keys.rotate_secret, keys.retire_secret]
    for call in calls:
        with pytest.raises(InvalidRequestError):
            call(service.registry, str(service.root), TENANT, "keyring")
    with pytest.raises(InvalidRequestError):
        keys.retire_secret(service.registry, str(service.root), TENANT, ENTRIES)
    assert events(service.registry, TENANT) == before
    assert Secrets(service.home).newest(ENTRIES, b"") == Secrets(service.home).keys(ENTRIES, b"")[1]


# --- the transport key ---------------------------------------------------------------------------


class Control:
    """The keys and values of one cluster."""

    def __init__(self) -> None:
        self.known: dict[bytes, bytes] = {}

    def _internal_kv_put(self, key: bytes, value: bytes, *, overwrite: bool) -> None:
        assert not overwrite
        self.known.setdefault(key, value)

    def _internal_kv_get(self, key: bytes) -> bytes:
        return self.known[key]


def test_a_cluster_keeps_its_transport_key_and_the_next_one_has_another(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets, lives = Secrets(home), (b"life 1", b"life 2")

    def started(cluster: Control, life: bytes) -> bytes:
        monkeypatch.setattr(actor, "internal_kv", cluster)
        return actor._of_cluster(secrets.keys(TRANSPORT, life), life)

    first, second = Control(), Control()
    key = started(first, lives[0])
    secrets.rotate(TRANSPORT)
    assert started(first, lives[0]) == key
    assert started(second, lives[1]) == secrets.keys(TRANSPORT, lives[1])[2]
    assert started(first, lives[1]) == started(second, lives[1])  # a second namespace of the first
    secrets.retire(TRANSPORT)
    assert started(second, lives[1])
    with pytest.raises(StorageError, match=r"version 1.*was retired.*start it again"):
        started(first, lives[0])


# --- the command line ----------------------------------------------------------------------------


def test_the_commands_rotate_and_retire_and_say_so(local: LocalService) -> None:
    def said(*words: str) -> str:
        found = CliRunner().invoke(main, ["keys", *words], obj=lambda: local)
        return " ".join(found.output.split())

    before = load(local._home)
    key = raw_public_key(SigningKey(local._home).public())
    assert said("rotate-audit").split()[6] != key
    assert load(local._home) != before
    assert "version 2 of transport" in said("rotate-secret", "transport")
    assert "are gone" in said("retire-secret", "transport")
    assert "choose among" in said("retire-secret", "pseudonyms")
    assert "choose among" in said("rotate-secret", "no-secret")
