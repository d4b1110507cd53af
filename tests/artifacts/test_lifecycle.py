"""Tests copies, fresh keys, shredding, labels, expiry and pages, and what a crash at any point
leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from actors.artifacts import copies
from actors.artifacts import delete as delete_module
from actors.artifacts.adapters import export_adapter
from actors.artifacts.delete import delete
from actors.operations import expiry, verify
from actors.operations import keys as keys_module
from actors.registry import artifacts, catalogue
from actors.registry.artifacts import Artifacts
from actors.registry.catalogue import EXPIRED
from actors.registry.registry import Registry
from actors.storage.capabilities import KEEPER
from actors.storage.home import DATABASE, KEYRING
from actors.storage.store import ArtifactStore
from support.artifacts import TENANT, Service, assert_same, checkpoint
from support.artifacts import service as service  # a fixture
from tg_tinker import (
    AccessDeniedError,
    ActorLostError,
    ArtifactInfo,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    TGTinkerError,
)
from tg_tinker.labels import MOST_LABELS
from tg_tinker.types import ArtifactQuery

OTHER = "bank"


def copied(service: Service, artifact: str, tenant: str = TENANT) -> str:
    return copies.copy(
        service.registry, str(service.root), tenant, artifact
    ).artifact_id  # fmt: skip


def resealed(service: Service, artifact: str, tenant: str = TENANT) -> ArtifactInfo:
    return copies.reseal(service.registry, str(service.root), tenant, artifact)


def shredded(service: Service, artifact: str, tenant: str = TENANT) -> list[str]:
    return delete_module.shred(service.registry, str(service.root), tenant, artifact)


def deleted(service: Service, artifact: str) -> None:
    delete(service.registry, str(service.root), TENANT, artifact)


def events(service: Service) -> list[tuple[str, str, str]]:
    rows = map(json.loads, service.registry.audit_log.rows(TENANT, 0, 1000))
    return [(row["event"], row["subject"], row["outcome"]) for row in rows]


def contents(service: Service) -> dict[Path, bytes]:
    """Returns the contents of all files except heads of the audit log."""
    return {p: p.read_bytes() for p in service.files() if p.parent.name != "audit"}


def names_in_store(service: Service) -> set[str]:
    folders = {path.name for path in (service.root / f"t/{TENANT}/a").iterdir()}
    keys = {path.stem for path in (service.root / f"t/{TENANT}/keys").iterdir()}
    return folders | keys


# --- copies --------------------------------------------------------------------------------------


def test_a_copy_is_the_same_state_of_the_same_run_under_another_key(service: Service) -> None:
    source = service.publish()
    copy = copied(service, source)
    assert copy != source
    assert_same(service.fetch(copy), checkpoint())
    assert service.fetch(copy).state.lineage == checkpoint().state.lineage
    one, other = (service.registry.catalogue.get(TENANT, a) for a in (source, copy))
    assert (one.training_client_id, one.step, one.include_optimizer, one.size_bytes) == (
        other.training_client_id, other.step, other.include_optimizer, other.size_bytes,
    )  # fmt: skip
    for mine, theirs in zip(service.files_of(source), service.files_of(copy), strict=True):
        assert mine.read_bytes() != theirs.read_bytes()
    shredded(service, source)
    assert_same(service.fetch(copy), checkpoint())
    assert ("artifact.copy", copy, "ok") in events(service)


def test_files_of_a_copy_do_not_open_in_the_place_of_its_source(service: Service) -> None:
    source = service.publish()
    copy = copied(service, source)
    for mine, theirs in zip(service.files_of(source), service.files_of(copy), strict=True):
        mine.write_bytes(theirs.read_bytes())
    with pytest.raises(IntegrityError):
        service.fetch(source)


def test_a_run_comes_back_from_what_it_saved_last_not_from_what_was_copied_last(
    service: Service,
) -> None:
    early, late = service.publish(), service.publish(checkpoint(step=9))
    copied(service, early)
    assert service.registry.runs.get(TENANT, service.run)[0].last_artifact_id == late
    delete(service.registry, str(service.root), TENANT, late)
    last = service.registry.runs.get(TENANT, service.run)[0].last_artifact_id
    assert last is not None
    assert service.registry.catalogue.get(TENANT, last).step == 3


def test_what_is_damaged_is_neither_copied_nor_resealed(service: Service) -> None:
    artifact = service.publish()
    weights = service.root / f"t/{TENANT}/a/{artifact}/adapter_model.safetensors.enc"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    before = contents(service)
    for attempt in (copied, resealed):
        with pytest.raises(IntegrityError, match="not what was published"):
            attempt(service, artifact)
    assert contents(service) == before
    assert len(service.registry.catalogue.find(TENANT)) == 1


def test_another_tenant_copies_reseals_shreds_labels_and_lists_nothing(service: Service) -> None:
    artifact = service.publish()
    before, registry = contents(service), service.registry
    attempts: list[Callable[[], object]] = [
        lambda: copied(service, artifact, OTHER),
        lambda: resealed(service, artifact, OTHER),
        lambda: shredded(service, artifact, OTHER),
        lambda: registry.catalogue.set_labels(OTHER, artifact, {"stage": "prod"}),
        lambda: registry.catalogue.set_expiry(OTHER, artifact, None),
        lambda: registry.artifacts.begin_reseal(OTHER, artifact),
        lambda: registry.catalogue.openable(OTHER, artifact),
        lambda: registry.catalogue.find(OTHER, ArtifactQuery(after=artifact)),
    ]
    for attempt in attempts:
        with pytest.raises(NotFoundError):
            attempt()
    assert contents(service) == before
    assert registry.catalogue.reachable(OTHER) == set()
    assert registry.catalogue.get(TENANT, artifact).labels == {}
    assert_same(service.fetch(artifact), checkpoint())


# --- fresh keys ----------------------------------------------------------------------------------


def test_a_resealed_artifact_keeps_its_id_and_nothing_old_opens_it(service: Service) -> None:
    artifact = service.publish()
    old = contents(service)
    info = resealed(service, artifact)
    assert info.artifact_id == artifact
    assert_same(service.fetch(artifact), checkpoint())
    assert (
        names_in_store(service) == {f"{artifact}.2"} == service.registry.catalogue.reachable(TENANT)
    )
    new = {path.name: content for path, content in contents(service).items()}
    assert all(new.get(path.name) != content for path, content in old.items())
    for path, content in old.items():  # a backup is put back
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert_same(service.fetch(artifact), checkpoint())
    for path, content in old.items():  # and in the new place
        moved = Path(str(path).replace(artifact, f"{artifact}.2"))
        moved.write_bytes(content)
        with pytest.raises(IntegrityError):
            service.fetch(artifact)
        moved.write_bytes(new[moved.name])
    assert ("artifact.reseal", artifact, "ok") in events(service)


def test_resealing_again_and_after_a_rotation_works_and_everything_else_still_finds_it(
    service: Service, tmp_path: Path
) -> None:
    artifact, root = service.publish(), str(service.root)
    resealed(service, artifact)
    service.registry.data_keys.rotate(TENANT)
    assert [*keys_module.rewrap(service.registry, root)] == [(artifact, "")]
    assert keys_module.uses(service.registry, root).artifacts == {"k1": 0, "k2": 1}
    keys_module.retire(service.registry, root, TENANT, "k1")
    resealed(service, artifact)
    assert names_in_store(service) == {f"{artifact}.3"}
    assert [*verify.verify(service.registry, root, TENANT)] == [(artifact, "")]
    assert_same(service.fetch(copied(service, artifact)), checkpoint())
    export_adapter(service.registry, root, TENANT, artifact, tmp_path / "out")
    delete(service.registry, root, TENANT, artifact)
    assert service.files_of(artifact) == []


def test_only_a_keeper_of_its_tenant_is_given_a_fresh_key_of_what_is_there(
    service: Service,
) -> None:
    registry = service.registry
    artifact, gone = service.publish(), service.publish()
    deleted(service, gone)
    key, wrapped = registry.data_keys.new(
        registry.data_keys.keeper(TENANT), artifact, service.store.root
    )
    assert (
        registry.data_keys.open(
            registry.data_keys.keeper(TENANT), artifact, wrapped, service.store.root
        )
        == key
    )
    for capability in (registry.data_keys.reader(TENANT), service.capability):
        with pytest.raises(AccessDeniedError):
            registry.data_keys.new(capability, artifact, service.store.root)
    for keeper, name in (
        (registry.data_keys.keeper(OTHER), artifact),
        (registry.data_keys.keeper(TENANT), gone),
    ):
        with pytest.raises(NotFoundError):
            registry.data_keys.new(keeper, name, service.store.root)
    forged = replace(registry.data_keys.reader(TENANT), kind=KEEPER)
    with pytest.raises(AccessDeniedError):
        registry.data_keys.new(forged, artifact, service.store.root)


class Crash(BaseException):
    """The end of the process, after which nothing is cleaned up."""


@contextmanager
def dying_at(monkeypatch: pytest.MonkeyPatch, place: int, error: BaseException) -> Iterator[None]:
    """Makes the change of store or registry at this position fail, and every later change too."""
    count = iter(range(1000))

    def wrapped(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(count) >= place:
                raise error
            return inner(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        objects = "actors.storage.objects.LocalFolder."
        for name in ("put", "delete", "delete_all"):
            patch.setattr(objects + name, wrapped(getattr(artifact_objects(), name)))
        for name in ("begin_reseal", "finish_reseal", "publish_copy", "delete"):
            patch.setattr(Artifacts, name, wrapped(getattr(Artifacts, name)))
        yield


def artifact_objects() -> Any:
    from actors.storage.objects import LocalFolder

    return LocalFolder


CHANGES = range(14)
"""More than a reseal makes: begin, three files, key, manifest, finish, head, three removals."""


@pytest.mark.parametrize("place", CHANGES)
@pytest.mark.parametrize(
    "error", [Crash(), StorageError("the disk is gone")], ids=["crash", "disk"]
)
def test_a_reseal_that_dies_anywhere_leaves_a_whole_artifact(
    service: Service, monkeypatch: pytest.MonkeyPatch, place: int, error: BaseException
) -> None:
    artifact = service.publish()
    with dying_at(monkeypatch, place, error):
        try:
            resealed(service, artifact)
        except (Crash, StorageError):
            pass
        else:
            assert place >= 11
    again = Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    restarted = replace(service, registry=again)
    assert_same(restarted.fetch(artifact), checkpoint())
    reached = again.catalogue.reachable(TENANT)
    assert len(reached) == 1
    assert reached <= names_in_store(restarted)
    resealed(restarted, artifact)
    assert_same(restarted.fetch(artifact), checkpoint())
    assert again.catalogue.reachable(TENANT).isdisjoint(reached)  # a name is never used twice
    shredded(restarted, artifact)
    assert again.catalogue.reachable(TENANT) == set()


@pytest.mark.parametrize("place", CHANGES)
def test_a_copy_that_dies_anywhere_is_there_or_not_and_never_harms_its_source(
    service: Service, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    source = service.publish()
    with dying_at(monkeypatch, place, Crash()), suppress(Crash):
        copied(service, source)
    for info in service.registry.catalogue.find(TENANT):
        assert_same(service.fetch(info.artifact_id), checkpoint())
    assert service.registry.catalogue.reachable(TENANT) <= names_in_store(service)
    assert source in service.registry.catalogue.reachable(TENANT)


@pytest.mark.parametrize("place", CHANGES)
def test_a_shredding_that_dies_anywhere_leaves_nothing_that_opens(
    service: Service, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    artifact, kept = service.publish(), service.publish()
    with dying_at(monkeypatch, place, Crash()), suppress(Crash):
        shredded(service, artifact)
    if place:  # from the first change on nothing opens it, nor a copy of its files
        assert not (service.root / f"t/{TENANT}/keys/{artifact}.json").exists()
        with pytest.raises(NotFoundError):
            service.fetch(artifact)
    with suppress(NotFoundError):  # its entry was gone already
        shredded(service, artifact)
    assert service.registry.catalogue.reachable(TENANT) == {kept}
    left = [path for path in service.files() if artifact in str(path)]
    assert all(path.suffix == ".enc" or path.name == "manifest.json" for path in left)
    assert not (service.root / f"t/{TENANT}/keys/{artifact}.json").exists()
    assert_same(service.fetch(kept), checkpoint())


def losing_the_reply(registry: Registry) -> Registry:
    """Returns a registry that makes the switch but never answers."""
    finish = registry.artifacts.finish_reseal

    def finish_reseal(*arguments: Any) -> ArtifactInfo:
        finish(*arguments)
        raise ActorLostError("the registry is gone")

    registry.artifacts.finish_reseal = finish_reseal  # type: ignore[method-assign]
    return registry


def test_a_switch_whose_answer_is_lost_keeps_the_files_that_count(service: Service) -> None:
    artifact = service.publish()
    registry = losing_the_reply(
        Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    )
    with pytest.raises(ActorLostError):
        resealed(replace(service, registry=registry), artifact)
    assert_same(service.fetch(artifact), checkpoint())
    assert service.registry.catalogue.reachable(TENANT) == {f"{artifact}.2"}


class Forgetful(ArtifactStore):
    """A store that accepts writes and returns other bytes."""

    damaged = ""

    def read(
        self, tenant: str, artifact_id: str, name: str, size: int | None = None
    ) -> bytes:  # fmt: skip
        found = super().read(tenant, artifact_id, name, size)
        if artifact_id.endswith(".2") and name == self.damaged:
            return found[:-1] + bytes([found[-1] ^ 1])
        return found


@pytest.mark.parametrize(
    "name", ["state.json.enc", "optimizer.safetensors.enc", "adapter_model.safetensors.enc"]
)
def test_the_old_files_stay_where_the_new_ones_do_not_open(
    service: Service, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    artifact = service.publish()
    monkeypatch.setattr(Forgetful, "damaged", name)
    with monkeypatch.context() as patch:
        patch.setattr(copies, "ArtifactStore", Forgetful)
        with pytest.raises(IntegrityError):
            resealed(service, artifact)
    assert names_in_store(service) == {artifact} == service.registry.catalogue.reachable(TENANT)
    assert_same(service.fetch(artifact), checkpoint())


def during_reseal(
    monkeypatch: pytest.MonkeyPatch, service: Service, act: Callable[[], object]
) -> None:
    """Runs `act` after the new files are written and before they count."""

    def check(*arguments: Any) -> None:
        monkeypatch.undo()
        act()

    monkeypatch.setattr(copies, "check_written", check)


def test_of_two_that_reseal_at_once_one_wins_and_no_file_is_mixed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = service.publish()
    during_reseal(monkeypatch, service, lambda: resealed(service, artifact))
    with pytest.raises(InvalidRequestError, match="somebody else"):
        resealed(service, artifact)
    assert (
        names_in_store(service) == {f"{artifact}.3"} == service.registry.catalogue.reachable(TENANT)
    )
    assert_same(service.fetch(artifact), checkpoint())


@pytest.mark.parametrize("remove", [shredded, deleted])
def test_what_is_deleted_while_it_is_resealed_stays_deleted(
    service: Service, monkeypatch: pytest.MonkeyPatch, remove: Callable[[Service, str], object]
) -> None:
    artifact = service.publish()
    during_reseal(monkeypatch, service, lambda: remove(service, artifact))
    with pytest.raises(NotFoundError):
        resealed(service, artifact)
    assert service.files_of(artifact) == []


@pytest.mark.parametrize("remove", [shredded, deleted])
def test_what_was_resealed_while_it_is_deleted_leaves_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch, remove: Callable[[Service, str], object]
) -> None:
    """The files under the name that the deletion found are gone by then."""
    artifact, inner = service.publish(), Artifacts.delete

    def late(self: Artifacts, *arguments: Any) -> str:
        resealed(service, artifact)
        return inner(self, *arguments)

    if remove is shredded:  # then its key is gone, and nobody can reseal it
        monkeypatch.setattr(ArtifactStore, "delete_key", lambda *_: resealed(service, artifact))
    else:
        monkeypatch.setattr(Artifacts, "delete", late)
    remove(service, artifact)
    assert service.files_of(artifact) == []
    assert service.registry.catalogue.reachable(TENANT) == set()


def test_a_key_that_was_rotated_while_resealing_is_not_relied_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new data key would be wrapped under k1, which may be retired before the new files
    count."""
    artifact, root = service.publish(), str(service.root)

    def rotate_and_retire() -> None:
        service.registry.data_keys.rotate(TENANT)
        assert [*keys_module.rewrap(service.registry, root)] == [(artifact, "")]
        keys_module.retire(service.registry, root, TENANT, "k1")

    during_reseal(monkeypatch, service, rotate_and_retire)
    with pytest.raises(InvalidRequestError, match="rotated"):
        resealed(service, artifact)
    assert_same(service.fetch(artifact), checkpoint())
    assert names_in_store(service) == {artifact}


@pytest.mark.parametrize("reads", range(6))
def test_a_load_beside_a_reseal_gets_the_whole_state(
    service: Service, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """The artifact moves before the k-th read of the load."""
    artifact = service.publish()
    inner, count = ArtifactStore._read, iter(range(100))

    def moving(self: ArtifactStore, *arguments: Any) -> bytes:
        if next(count) == reads:
            with monkeypatch.context() as patch:
                patch.setattr(ArtifactStore, "_read", inner)
                resealed(service, artifact)
        return inner(self, *arguments)

    monkeypatch.setattr(ArtifactStore, "_read", moving)
    assert_same(service.fetch(artifact), checkpoint())


# --- shredding -----------------------------------------------------------------------------------


def test_shredding_removes_everything_and_says_what_it_does_not_reach(service: Service) -> None:
    artifact, kept = service.publish(), service.publish()
    said = " ".join(shredded(service, artifact))
    for word in ("Backups", "bucket", "exports", "Training clients", "Samplers"):
        assert word in said
    assert service.files_of(artifact) == []
    with pytest.raises(NotFoundError):
        service.fetch(artifact)
    assert_same(service.fetch(kept), checkpoint())
    assert ("artifact.delete", artifact, "ok") not in events(service)
    assert ("artifact.shred", artifact, "ok") in events(service)


def test_an_artifact_that_only_has_its_key_left_is_shredded(service: Service) -> None:
    artifact = service.publish()
    shutil.rmtree(service.root / f"t/{TENANT}/a/{artifact}")
    shredded(service, artifact)
    assert service.files_of(artifact) == []
    assert service.registry.catalogue.reachable(TENANT) == set()


def test_an_artifact_of_another_store_is_not_shredded(service: Service, tmp_path: Path) -> None:
    artifact = service.publish()
    with pytest.raises(NotFoundError, match="no file in this store"):
        delete_module.shred(service.registry, str(tmp_path / "other"), TENANT, artifact)
    assert_same(service.fetch(artifact), checkpoint())


def test_a_rotation_does_not_bring_a_shredded_key_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = service.publish()
    service.registry.data_keys.rotate(TENANT)
    inner = ArtifactStore.write_key

    def late(self: ArtifactStore, *arguments: Any) -> None:
        shredded(service, artifact)
        inner(self, *arguments)

    monkeypatch.setattr(ArtifactStore, "write_key", late)
    assert [*keys_module.rewrap(service.registry, str(service.root))] == [(artifact, "")]
    assert service.files_of(artifact) == []


# --- labels --------------------------------------------------------------------------------------


def test_labels_are_replaced_listed_and_found_and_leave_no_trace_of_their_text(
    service: Service,
) -> None:
    one, two, three = (service.publish() for _ in range(3))
    registry = service.registry
    registry.catalogue.set_labels(TENANT, one, {"stage": "prod", "owner": "anna"})
    registry.catalogue.set_labels(TENANT, two, {"stage": "test"})
    info = registry.catalogue.set_labels(TENANT, three, {"stage": "prod"})
    assert info.labels == {"stage": "prod"}

    def found(name: str, value: str) -> list[str]:
        query = ArtifactQuery(label=(name, value))
        return [info.artifact_id for info in registry.catalogue.find(TENANT, query)]

    assert found("stage", "prod") == [one, three]
    assert found("owner", "anna") == [one]
    assert found("stage", "pro%") == found("anna", "owner") == []
    registry.catalogue.set_labels(TENANT, one, {"stage": "old"})
    assert registry.catalogue.get(TENANT, one).labels == {"stage": "old"}
    assert found("owner", "anna") == []
    assert "anna" not in "".join(registry.audit_log.rows(TENANT, 0, 1000))
    assert events(service).count(("artifact.label", one, "ok")) == 2
    assert registry.catalogue.get(TENANT, copied(service, two)).labels == {}
    assert resealed(service, two).labels == {"stage": "test"}


@pytest.mark.parametrize(
    "labels",
    [
        {"": "a"}, {"Stage": "a"}, {"a b": "c"}, {"-a": "b"}, {"a" * 64: "b"}, {"a\n": "b"},
        {"a": "b c"}, {"a": "b" * 64}, {"a": "b\n"}, {"a": "ü"}, {"a": 1}, {1: "a"},
        {f"l{i}": "" for i in range(MOST_LABELS + 1)},
    ],
)  # fmt: skip
def test_labels_of_another_form_are_refused_and_change_nothing(
    service: Service, labels: dict[Any, Any]
) -> None:
    artifact = service.publish()
    service.registry.catalogue.set_labels(TENANT, artifact, {"stage": "prod"})
    with pytest.raises(InvalidRequestError, match="label"):
        service.registry.catalogue.set_labels(TENANT, artifact, labels)
    assert service.registry.catalogue.get(TENANT, artifact).labels == {"stage": "prod"}


# --- expiry --------------------------------------------------------------------------------------


class Clock:
    """The clock of the registry."""

    now = 0.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.now = datetime.now(UTC).timestamp()
    for module in (catalogue, artifacts):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_from_its_expiry_on_an_artifact_opens_nowhere_and_before_it_everywhere(
    service: Service, clock: Clock, tmp_path: Path
) -> None:
    registry, root = service.registry, str(service.root)
    artifact, kept = service.publish(), service.publish(checkpoint(step=2))
    clock.now += 1
    later = service.publish(checkpoint(step=7))
    when = datetime.fromtimestamp(clock.now + 60, UTC)
    for one in (artifact, later):
        assert registry.catalogue.set_expiry(TENANT, one, when).expires_at == when
    clock.now += 59.99
    assert_same(service.fetch(artifact), checkpoint())
    assert registry.catalogue.gone([artifact, kept, "art-none"]) == ["art-none"]
    assert registry.runs.get(TENANT, service.run)[0].last_artifact_id == later
    clock.now += 0.01
    wrapped = service.store.read_key(TENANT, artifact)
    manifest = service.store.read(TENANT, artifact, "manifest.json")
    attempts: list[Callable[[], object]] = [
        lambda: service.fetch(artifact),
        lambda: copied(service, artifact),
        lambda: resealed(service, artifact),
        lambda: export_adapter(registry, root, TENANT, artifact, tmp_path / "out"),
        lambda: registry.data_keys.open(
            registry.data_keys.reader(TENANT), artifact, wrapped, service.store.root
        ),
        lambda: registry.catalogue.check_manifest(TENANT, artifact, manifest),
        lambda: registry.catalogue.openable(TENANT, artifact),
    ]
    told = rf"expired at .*set_expiry.*artifacts expire --never {artifact}`.*delete --expired`"
    for attempt in attempts:
        with pytest.raises(NotFoundError, match=told) as refused:
            attempt()
        assert refused.value.code == EXPIRED
    assert registry.catalogue.gone([artifact, kept]) == [artifact]
    assert registry.runs.get(TENANT, service.run)[0].last_artifact_id == kept
    assert [*verify.verify(registry, root, TENANT)] == [(kept, "")]
    assert artifact in registry.catalogue.reachable(TENANT)
    assert len(registry.catalogue.find(TENANT)) == 3  # it is listed until it is removed
    registry.catalogue.set_expiry(TENANT, artifact, None)
    assert_same(service.fetch(artifact), checkpoint())
    assert [*expiry.delete_expired(registry, root, TENANT)] == [(later, "")]
    assert [info.artifact_id for info in registry.catalogue.find(TENANT)] == [artifact, kept]
    assert service.files_of(later) == []
    assert ("artifact.expire", later, "ok") in events(service)
    assert events(service).count(("artifact.expiry", artifact, "ok")) == 2


def test_an_expired_artifact_that_cannot_be_removed_holds_up_no_other(
    service: Service, clock: Clock
) -> None:
    known = [service.publish() for _ in range(3)]
    for artifact in known:
        service.registry.catalogue.set_expiry(
            TENANT, artifact, datetime.fromtimestamp(clock.now + 1, UTC)
        )
    for path in service.files_of(known[0]):
        path.unlink()
    clock.now += 2
    found = dict(expiry.delete_expired(service.registry, str(service.root), TENANT))
    assert [bool(found[artifact]) for artifact in known] == [True, False, False]


def test_an_expiry_in_the_past_is_refused(service: Service) -> None:
    artifact = service.publish()
    with pytest.raises(InvalidRequestError, match="is past"):
        service.registry.catalogue.set_expiry(
            TENANT, artifact, datetime.now(UTC) - timedelta(seconds=1)
        )
    assert service.registry.catalogue.get(TENANT, artifact).expires_at is None


# --- pages ---------------------------------------------------------------------------------------


def pages(service: Service, size: int, between: Callable[[list[str]], object]) -> list[str]:
    found: list[str] = []
    while True:
        after = found[-1] if found else None
        query = ArtifactQuery(limit=size, after=after)
        page = [info.artifact_id for info in service.registry.catalogue.find(TENANT, query)]
        found += page
        if len(page) < size:
            return found
        between(page)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_pages_together_are_the_whole_list_also_at_one_moment_and_beside_deletions(
    service: Service, clock: Clock, size: int
) -> None:
    known = []
    for moment in (0, 0, 0, 1, 1):  # several within one tick of the clock
        clock.now += moment
        known.append(service.publish())
    whole = [info.artifact_id for info in service.registry.catalogue.find(TENANT)]
    assert sorted(whole) == sorted(known)
    assert pages(service, size, lambda page: None) == whole

    def remove(page: list[str]) -> None:
        delete(service.registry, str(service.root), TENANT, page[-1])

    assert pages(service, size, remove) == whole


def test_filters_narrow_and_join(service: Service, clock: Clock) -> None:
    registry = service.registry
    first = service.publish()
    clock.now += 10
    middle = service.publish()
    run = registry.runs.create(TENANT, '{"model_ref": "m"}')
    clock.now += 10
    last = service.publish(run_id=run, epoch=registry.runs.claim(run))

    def found(**conditions: Any) -> list[str]:
        return [i.artifact_id for i in registry.catalogue.find(TENANT, ArtifactQuery(**conditions))]

    when = registry.catalogue.get(TENANT, middle).created_at
    assert found() == [first, middle, last]
    assert found(run=run) == [last]
    assert found(newer_than=when) == [last]
    assert found(older_than=when) == [first]
    assert found(run=service.run, newer_than=when) == []
    assert found(run=service.run, limit=1) == [first]
    with pytest.raises(NotFoundError, match="after"):
        found(after="art-none")


def test_what_is_refused_is_one_of_ours(service: Service) -> None:
    for attempt in (copied, resealed, shredded):
        for artifact in ("art-none", "", "../x", "art/../../keyring"):
            with pytest.raises(TGTinkerError):
                attempt(service, artifact)
    assert (service.home / KEYRING).exists()
