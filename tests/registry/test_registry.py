"""Tests the registry on SQLite: epochs, tenants, permanent deletion, and a file that is durable."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from actors.registry.database import DAMAGED
from actors.registry.registry import Registry
from actors.registry.schema import METADATA
from actors.storage.capabilities import Capability
from actors.storage.home import DATABASE, KEYRING, STORE, create
from actors.storage.key_providers import FileKeyring
from support.databases import url_of
from tg_tinker import TrainingConfig
from tg_tinker.client.recovery import lost_actor
from tg_tinker.errors import (
    ActorLostError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    TGTinkerError,
)

US, THEM = "clinic", "bank"
SECRET = "bed-7-secret"
MANIFEST = b'{"files": {}}'
CONFIG = TrainingConfig(model_ref="some/model", metadata={"note": SECRET}).model_dump_json()

pytestmark = pytest.mark.usefixtures("each_database")
on_sqlite = pytest.mark.sqlite_only
CASCADE = {"sqlite": "", "postgresql": " CASCADE"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    create(tmp_path / "home")
    return tmp_path / "home"


def open_registry(place: Path) -> Registry:
    """Returns a registry that has been compared with a store without heads."""
    registry = Registry(url_of(place), place / KEYRING)
    for tenant in (US, THEM):
        registry.heads.meet_store(tenant, STORE)
    return registry


@pytest.fixture
def registry(place: Path) -> Registry:
    return open_registry(place)


@pytest.fixture
def run(registry: Registry) -> str:
    return registry.runs.create(US, CONFIG)


def writer(registry: Registry, run: str) -> Capability:
    """Returns the capability of the run's next actor."""
    return registry.data_keys.capability(US, run, registry.runs.claim(run))


def publish(registry: Registry, run: str, artifact: str = "art-1", **changes: object) -> str:
    """Publishes for the run's next actor, unless `changes` differ; returns the artifact's id."""
    values = {
        "tenant": US, "run_id": run, "artifact_id": artifact, "step": 3, "size_bytes": 100,
        "include_optimizer": True, "manifest": MANIFEST, "key_id": "k1",
    } | changes  # fmt: skip
    if "epoch" not in values:
        values["epoch"] = registry.runs.claim(run)
    registry.artifacts.publish(**values)  # type: ignore[arg-type]
    return artifact


# --- runs and epochs -------------------------------------------------------------------------


def test_a_new_run_is_listed_as_it_was_configured(registry: Registry, run: str) -> None:
    info, config = registry.runs.get(US, run)
    assert config == CONFIG
    assert (info.training_client_id, info.model_ref) == (run, "some/model")
    assert (info.status, info.epoch, info.step, info.last_artifact_id) == ("active", 0, 0, None)
    assert abs(datetime.now(UTC) - info.created_at) < timedelta(minutes=1)
    assert registry.runs.of(US) == [info]


def test_runs_are_listed_oldest_first(registry: Registry) -> None:
    made = [registry.runs.create(US, CONFIG) for _ in range(5)]
    assert [info.training_client_id for info in registry.runs.of(US)] == made
    assert len(set(made)) == 5


def test_every_claim_raises_the_epoch_of_that_run_alone(registry: Registry, run: str) -> None:
    other = registry.runs.create(US, CONFIG)
    assert [registry.runs.claim(run) for _ in range(3)] == [1, 2, 3]
    assert registry.runs.get(US, run)[0].epoch == 3
    assert registry.runs.get(US, other)[0].epoch == 0


def test_two_claims_at_once_never_get_one_epoch(place: Path, run: str) -> None:
    registries = [open_registry(place), open_registry(place)]
    with ThreadPoolExecutor(4) as pool:
        epochs = list(pool.map(lambda i: registries[i % 2].runs.claim(run), range(24)))
    assert sorted(epochs) == [*range(1, 25)]


def test_the_current_actor_records_its_step(registry: Registry, run: str) -> None:
    other = registry.runs.create(US, CONFIG)
    registry.runs.claim(other)
    registry.runs.record(run, registry.runs.claim(run), 7, "completed")
    info = registry.runs.get(US, run)[0]
    assert (info.step, info.status) == (7, "completed")
    assert registry.runs.get(US, other)[0].step == 0


def test_a_record_of_an_old_epoch_is_ignored(registry: Registry, run: str) -> None:
    old = registry.runs.claim(run)
    new = registry.runs.claim(run)
    registry.runs.record(run, new, 2, "active")
    registry.runs.record(run, old, 9, "completed")
    registry.runs.record(run, new + 1, 9, "completed")
    info = registry.runs.get(US, run)[0]
    assert (info.step, info.status) == (2, "active")


def test_a_claimed_run_is_at_the_step_that_it_comes_back_in_before_its_actor_says_so(
    registry: Registry, run: str
) -> None:
    """A client that asks while the new actor loads learns the step to repeat from."""
    first = registry.runs.claim(run)
    registry.runs.record(run, first, 7, "active")
    publish(registry, run, epoch=first, step=7)
    registry.runs.record(run, first, 10, "active")
    registry.runs.claim(run, first)
    info = registry.runs.get(US, run)[0]
    assert (info.epoch, info.step, info.reason) == (2, 7, "")
    error = lost_actor(info, first, 10, registry.runs.resume_point(US, run)[1], "it did not answer")
    assert (error.details["resume_step"], error.details["lost_steps"]) == (7, 3)
    with pytest.raises(ActorLostError, match="somebody else"):
        registry.runs.claim(run, first)
    assert registry.runs.get(US, run)[0] == info


def test_a_finished_run_hears_its_last_actor_no_more(registry: Registry, run: str) -> None:
    epoch = registry.runs.claim(run)
    registry.runs.finish(run, epoch, "completed")
    registry.runs.record(run, epoch, 9, "active")
    info = registry.runs.get(US, run)[0]
    assert (info.step, info.status) == (0, "completed")
    with pytest.raises(ActorLostError):
        publish(registry, run, epoch=epoch)


def test_a_stale_client_that_closes_does_not_touch_the_newer_actor(
    registry: Registry, run: str
) -> None:
    stale, newer = registry.runs.claim(run), registry.runs.claim(run)
    registry.runs.finish(run, stale, "completed")
    registry.runs.record(run, newer, 7, "active")
    assert (registry.runs.get(US, run)[0].status, registry.runs.get(US, run)[0].step) == (
        "active",
        7,
    )
    publish(registry, run, epoch=newer)


# --- artifacts -------------------------------------------------------------------------------


def test_a_published_artifact_is_listed_with_its_facts(registry: Registry, run: str) -> None:
    publish(registry, run, step=5, size_bytes=123, include_optimizer=False)
    (info,) = registry.catalogue.find(US)
    assert info == registry.catalogue.get(US, "art-1")
    assert (info.artifact_id, info.training_client_id) == ("art-1", run)
    assert (info.step, info.size_bytes, info.include_optimizer) == (5, 123, False)
    assert abs(datetime.now(UTC) - info.created_at) < timedelta(minutes=1)


def test_the_last_artifact_is_that_of_the_last_save_also_after_the_clock_was_set_back(
    registry: Registry, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, now in (("a", 2e9), ("b", 1e9), ("c", 1e9), ("d", 3e9)):
        monkeypatch.setattr("actors.registry.artifacts.time.time", lambda now=now: now)
        publish(registry, run, name)
        assert registry.runs.get(US, run)[0].last_artifact_id == name


def test_the_last_artifact_of_a_run_is_the_newest_that_is_not_deleted(
    registry: Registry, run: str
) -> None:
    for name in ("a", "b", "c"):
        publish(registry, run, name)
    publish(registry, registry.runs.create(US, CONFIG), "d")
    assert [info.artifact_id for info in registry.catalogue.find(US)] == ["a", "b", "c", "d"]
    assert registry.runs.get(US, run)[0].last_artifact_id == "c"
    registry.artifacts.delete(US, "c")
    assert registry.runs.get(US, run)[0].last_artifact_id == "b"


@pytest.mark.parametrize("off", [-1, 1, 100])
def test_publishing_under_any_epoch_but_the_current_is_refused(
    registry: Registry, run: str, off: int
) -> None:
    registry.runs.claim(run)
    current = registry.runs.claim(run)
    with pytest.raises(ActorLostError, match=rf"epoch {current + off}.*epoch {current}"):
        publish(registry, run, epoch=current + off)
    assert registry.catalogue.find(US) == []


def test_publishing_for_a_run_that_does_not_exist_is_refused(registry: Registry) -> None:
    for epoch in (0, 1, None):
        with pytest.raises(NotFoundError, match="tc-none"):
            publish(registry, "tc-none", epoch=epoch)
    assert registry.catalogue.find(US) == []


def test_an_artifact_id_is_never_used_twice(registry: Registry, run: str) -> None:
    publish(registry, run)
    with pytest.raises(sa.exc.IntegrityError):
        publish(registry, run, manifest=b"another")
    registry.catalogue.check_manifest(US, "art-1", MANIFEST)


def test_the_id_of_a_deleted_artifact_is_never_used_again(registry: Registry, run: str) -> None:
    publish(registry, run, epoch=registry.runs.claim(run))
    registry.artifacts.delete(US, "art-1")
    with pytest.raises(sa.exc.IntegrityError):
        publish(registry, run, epoch=1)
    assert registry.catalogue.find(US) == []


@pytest.mark.parametrize("wrong", [b"", MANIFEST + b" ", MANIFEST[:-1], MANIFEST.upper()])
def test_a_changed_manifest_is_refused(registry: Registry, run: str, wrong: bytes) -> None:
    publish(registry, run)
    registry.catalogue.check_manifest(US, "art-1", MANIFEST)
    with pytest.raises(IntegrityError, match="art-1 is not the one that was published"):
        registry.catalogue.check_manifest(US, "art-1", wrong)


def test_the_manifest_of_another_artifact_is_refused(registry: Registry, run: str) -> None:
    publish(registry, run, "art-1", manifest=b"one")
    publish(registry, run, "art-2", manifest=b"two")
    with pytest.raises(IntegrityError):
        registry.catalogue.check_manifest(US, "art-1", b"two")


# --- deletion is for good --------------------------------------------------------------------


def uses(registry: Registry, wrapped: bytes) -> list[Callable[[str], object]]:
    """Returns all calls that a given tenant can make about `art-1`."""
    return [
        lambda tenant: registry.catalogue.get(tenant, "art-1"),
        lambda tenant: registry.catalogue.check_manifest(tenant, "art-1", MANIFEST),
        lambda tenant: registry.data_keys.open(
            registry.data_keys.reader(tenant), "art-1", wrapped, STORE
        ),
        lambda tenant: registry.artifacts.delete(tenant, "art-1"),
    ]


def test_a_deleted_artifact_stays_deleted_and_its_key_does_not_open(
    registry: Registry, place: Path, run: str
) -> None:
    key, wrapped = registry.data_keys.new(writer(registry, run), "art-1", STORE)
    publish(registry, run)
    assert registry.data_keys.open(registry.data_keys.reader(US), "art-1", wrapped, STORE) == key
    registry.artifacts.delete(US, "art-1")
    for again in (registry, open_registry(place)):
        assert again.catalogue.find(US) == []
        for use in uses(again, wrapped):
            with pytest.raises(NotFoundError):
                use(US)


# --- tenants ---------------------------------------------------------------------------------


def test_another_tenant_sees_no_run_no_artifact_and_no_key(registry: Registry, run: str) -> None:
    _, wrapped = registry.data_keys.new(writer(registry, run), "art-1", STORE)
    publish(registry, run)
    assert registry.runs.of(THEM) == registry.catalogue.find(THEM) == []
    for use in (lambda tenant: registry.runs.get(tenant, run), *uses(registry, wrapped)):
        with pytest.raises(NotFoundError) as caught:
            use(THEM)
        assert US not in str(caught.value)
        assert SECRET not in str(caught.value)
    assert len(registry.catalogue.find(US)) == 1, "another tenant deleted it"


def test_an_artifact_of_another_tenant_looks_like_one_that_does_not_exist(
    registry: Registry, run: str
) -> None:
    publish(registry, run)
    with pytest.raises(NotFoundError) as foreign:
        registry.catalogue.get(THEM, "art-1")
    with pytest.raises(NotFoundError) as missing:
        registry.catalogue.get(THEM, "art-2")
    assert str(foreign.value).replace("art-1", "art-2") == str(missing.value)


def test_another_tenant_cannot_publish_into_a_run(registry: Registry, run: str) -> None:
    with pytest.raises(NotFoundError):
        publish(registry, run, epoch=registry.runs.claim(run), tenant=THEM)
    assert registry.runs.get(US, run)[0].last_artifact_id is None
    assert registry.catalogue.find(THEM) == []


def test_a_data_key_belongs_to_one_tenant_and_one_artifact(registry: Registry, run: str) -> None:
    _, wrapped = registry.data_keys.new(writer(registry, run), "art-1", STORE)
    theirs = registry.runs.create(THEM, CONFIG)
    publish(registry, run, "art-2")
    publish(registry, theirs, "art-3", tenant=THEM)
    for tenant, artifact in ((US, "art-2"), (THEM, "art-3")):
        with pytest.raises(IntegrityError):
            registry.data_keys.open(registry.data_keys.reader(tenant), artifact, wrapped, STORE)


def test_a_data_key_opens_only_once_its_artifact_is_published(registry: Registry, run: str) -> None:
    key, wrapped = registry.data_keys.new(writer(registry, run), "art-1", STORE)
    with pytest.raises(NotFoundError):
        registry.data_keys.open(registry.data_keys.reader(US), "art-1", wrapped, STORE)
    publish(registry, run)
    assert registry.data_keys.open(registry.data_keys.reader(US), "art-1", wrapped, STORE) == key


def test_every_data_key_is_fresh_and_wrapped(registry: Registry, run: str) -> None:
    made = [registry.data_keys.new(writer(registry, run), "art-1", STORE) for _ in range(5)]
    assert len({key for key, _ in made}) == 5
    for key, wrapped in made:
        assert key not in wrapped
        assert key.hex() not in wrapped.decode()
        assert json.loads(wrapped)["key_id"] == registry.data_keys.key_info()[0]
    assert registry.data_keys.key_info()[1] == "file"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"key_id": "k1"}'])
def test_a_damaged_key_file_is_an_integrity_error(
    registry: Registry, run: str, damage: bytes
) -> None:
    publish(registry, run)
    with pytest.raises(IntegrityError):
        registry.data_keys.open(registry.data_keys.reader(US), "art-1", damage, STORE)


# --- the database ----------------------------------------------------------------------------


def test_the_state_survives_a_second_registry(registry: Registry, place: Path, run: str) -> None:
    key, wrapped = registry.data_keys.new(writer(registry, run), "art-1", STORE)
    publish(registry, run)
    registry.runs.record(run, 2, 3, "active")
    again = open_registry(place)
    assert again.runs.of(US) == registry.runs.of(US)
    assert again.catalogue.find(US) == registry.catalogue.find(US)
    assert again.data_keys.open(again.data_keys.reader(US), "art-1", wrapped, STORE) == key
    again.catalogue.check_manifest(US, "art-1", MANIFEST)
    assert again.runs.claim(run) == 3
    assert registry.runs.get(US, run)[0].epoch == 3, "the first registry kept something in memory"


@on_sqlite
def test_a_change_is_on_disk_when_the_call_returns(place: Path, run: str) -> None:
    with sqlite3.connect(place / DATABASE) as other:
        assert other.execute("SELECT id, epoch FROM runs").fetchall() == [(run, 0)]


@on_sqlite
def test_the_database_is_durable_and_keeps_its_references(registry: Registry) -> None:
    with registry.database.engine.connect() as connection:
        names = ("journal_mode", "synchronous", "foreign_keys")
        found = {n: connection.exec_driver_sql(f"PRAGMA {n}").scalar() for n in names}
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


@on_sqlite
def test_a_transaction_holds_the_write_lock_from_its_first_statement(
    registry: Registry, place: Path
) -> None:
    """Check and change are one: no other process writes between them."""
    other = sqlite3.connect(place / DATABASE, timeout=0)
    with registry.database.engine.begin(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("UPDATE runs SET step = 1")
    other.close()


@on_sqlite
def test_all_files_of_the_database_are_readable_by_their_owner_alone(place: Path, run: str) -> None:
    files = [*place.glob(f"{DATABASE}*")]
    assert len(files) == 3, "expected the database, its log and its index"
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


@on_sqlite
def test_a_missing_database_is_refused_and_not_made_anew(place: Path) -> None:
    (place / DATABASE).unlink()
    with pytest.raises(StorageError, match="does not exist: restore its backup"):
        open_registry(place)
    assert not (place / DATABASE).exists()
    with pytest.raises(InvalidRequestError, match="sqlite:///FILE"):
        Registry("sqlite://", place / KEYRING)


@on_sqlite
def test_a_database_of_an_older_version_is_told_and_left_alone(place: Path) -> None:
    with sqlite3.connect(place / DATABASE) as database:
        database.execute("CREATE TABLE artifacts (id TEXT PRIMARY KEY)")
    with pytest.raises(StorageError, match=r"older version.*table artifacts has no .*stored_as"):
        open_registry(place)
    with sqlite3.connect(place / DATABASE) as database:
        assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (2,)


def test_a_registry_without_its_keyring_is_refused(place: Path) -> None:
    (place / KEYRING).unlink()
    with pytest.raises(StorageError, match="keyring"):
        open_registry(place)


# --- errors hide what was being written ------------------------------------------------------


def everything_said(error: BaseException | None) -> str:
    said = ""
    while error is not None:
        said += f"{error} {error!r} {error.args} {getattr(error, 'details', '')}"
        error = error.__cause__ or error.__context__
    return said


def test_a_refused_statement_shows_none_of_its_values(place: Path, run: str) -> None:
    registry = open_registry(place)
    with registry.database.engine.begin() as other:
        for table in ("artifacts", "runs"):
            other.exec_driver_sql(f"DROP TABLE {table}" + CASCADE[other.dialect.name])
    attempts: list[Callable[[], object]] = [
        lambda: registry.runs.create(SECRET, CONFIG),
        lambda: registry.runs.record(SECRET, 1, 1, SECRET),
        lambda: registry.runs.get(SECRET, SECRET),
        lambda: registry.runs.of(SECRET),
        lambda: registry.catalogue.find(SECRET),
        lambda: registry.catalogue.get(SECRET, SECRET),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match="database refused") as caught:
            attempt()
        assert SECRET not in everything_said(caught.value)


def mixed(database: Path, place: Path) -> None:
    """Replaces a database whose -wal is still there by an older copy."""
    older, wal = b"", b""
    for runs in (20, 200, 2):
        registry = open_registry(place)
        for _ in range(runs):
            registry.runs.create(US, CONFIG)
        wal = database.with_name(f"{database.name}-wal").read_bytes()
        registry.close()  # which takes the -wal into the database
        older = older or database.read_bytes()
    database.write_bytes(older)
    database.with_name(f"{database.name}-wal").write_bytes(wal)


def cut(database: Path, place: Path) -> None:
    open_registry(place).close()
    database.write_bytes(database.read_bytes()[:-4096])


def text(database: Path, place: Path) -> None:
    database.write_text("not a database at all " * 50)


@on_sqlite
@pytest.mark.parametrize("damage", [mixed, cut, text])
def test_a_file_that_is_damaged_or_mixed_is_refused_when_it_is_opened(
    place: Path, damage: Callable[[Path, Path], None]
) -> None:
    damage(place / DATABASE, place)
    for looks_only in (False, True):
        with pytest.raises(StorageError, match=r"damaged, or .* -wal .* registry restore") as told:
            Registry(url_of(place), place / KEYRING, looks_only=looks_only)
        assert told.value.details == {"reason": DAMAGED}


def dump(registry: Registry) -> dict[str, list[str]]:
    with registry.database.reading() as connection:
        tables = sa.inspect(connection).get_table_names()
        return {
            name: sorted(map(repr, connection.execute(METADATA.tables[name].select())))
            for name in tables
            if name in METADATA.tables
        }


def test_an_onlooker_changes_neither_rows_nor_tables_nor_known_keys(
    registry: Registry, run: str, place: Path
) -> None:
    with registry.database.change() as tx:
        tx.exec_driver_sql(f"DROP TABLE orphans{CASCADE[tx.dialect.name]}")
    FileKeyring(place / KEYRING).rotate()
    before = dump(registry)
    looks = Registry(url_of(place), place / KEYRING, looks_only=True)
    assert [info.training_client_id for info in looks.runs.of(US)] == [run]
    assert (looks.data_keys.missing_keys(), looks.data_keys.key_ids()) == ([], ["k1", "k2"])
    with pytest.raises(StorageError):
        looks.runs.create(US, CONFIG)
    looks.close()
    assert dump(registry) == before


@on_sqlite
def test_an_onlooker_leaves_a_copy_of_a_database_as_a_copy(
    registry: Registry, run: str, place: Path
) -> None:
    """A registry that may write would turn it into a database with a -wal."""
    registry.close()
    with sqlite3.connect(place / DATABASE) as connection:
        connection.execute(f"VACUUM INTO '{place / 'copy.db'}'")
    before = (place / "copy.db").read_bytes()
    looks = Registry(f"sqlite:///{place / 'copy.db'}", place / KEYRING, looks_only=True)
    assert [info.training_client_id for info in looks.runs.of(US)] == [run]
    looks.close()
    assert (place / "copy.db").read_bytes() == before


@pytest.mark.parametrize("number", [2**31, 2**63, 10**11, 10**30])
def test_a_place_of_a_number_that_no_chain_reaches_is_unknown(
    registry: Registry, run: str, number: int
) -> None:
    """Anyone who can write to the store can name an object so.

    PostgreSQL accepts no such number.
    """
    places = [f"{number}-{'f' * 64}", registry.audit_log.head(US).place]
    assert registry.audit_log.unknown(US, places) == places[:1]


def test_a_broken_rule_of_the_database_shows_no_values_either(registry: Registry, run: str) -> None:
    publish(registry, run)
    with pytest.raises(sa.exc.IntegrityError) as caught:
        publish(registry, run, manifest=b"other")
    said = everything_said(caught.value)
    for value in (US, run, hashlib.sha256(b"other").hexdigest()):
        assert value not in said


def test_errors_of_the_registry_are_typed_and_name_no_other_run(
    registry: Registry, run: str
) -> None:
    with pytest.raises(TGTinkerError) as caught:
        registry.runs.get(US, "tc-unknown")
    assert "tc-unknown" in str(caught.value)
    assert run not in str(caught.value)
