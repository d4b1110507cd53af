"""Tests the sweep: it removes what belongs to nothing, and never what is needed or being saved."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.artifacts import copies, delete, fetch, publish
from actors.artifacts.publish import Draft
from actors.operations.sweep import sweep
from actors.registry.registry import Registry
from actors.registry.rollback import meet
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.objects import LocalFolder, ObjectInfo
from actors.storage.store import ArtifactStore
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from support.stores import abfss as abfss  # servers, for `root`
from support.stores import gs as gs
from support.stores import root as root
from support.stores import s3 as s3
from tg_tinker import Orphan, ServiceClient, TrainingConfig
from tg_tinker.cli.main import main
from tg_tinker.errors import IntegrityError, InvalidRequestError, NotFoundError, StorageError
from tg_tinker.storage.envelope import new_signing_key

HOUR = 3600.0
FILES = {"weights": bytes(range(256)) * 40, "state": b"{}"}


class Clocked(LocalFolder):
    """A folder whose own clock the test sets, and which can refuse calls or act before them."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.now = datetime(2001, 1, 1, tzinfo=UTC)  # far from this machine's
        self.before: Callable[[str, str], None] = lambda call, name: None

    def list_below(self, folder: str = "") -> list[ObjectInfo]:
        found = super().list_below(folder)
        self.before("list", folder)
        return [i._replace(modified=self.now) if i.name.endswith("/clock") else i for i in found]

    def put(self, name: str, content: Any) -> int:
        self.before("put", name)
        return super().put(name, content)

    def delete(self, name: str) -> None:
        self.before("delete", name)
        super().delete(name)

    def delete_all(self, folder: str) -> None:
        self.before("delete", folder)
        super().delete_all(folder)


@dataclass
class Store:
    """A service with a store whose clock the test sets."""

    service: Service
    objects: Clocked = field(init=False)
    store: ArtifactStore = field(init=False)

    def __post_init__(self) -> None:
        self.objects = Clocked(self.service.root)
        self.store = ArtifactStore(str(self.service.root))
        self.store.objects = self.objects

    @property
    def registry(self) -> Registry:
        return self.service.registry

    def draft(self) -> Draft:
        return Draft(self.registry, self.store, self.service.capability, FILES)

    def publish(self, draft: Draft | None = None, write: Any = publish.write) -> str:
        draft = draft or self.draft()
        publish.publish(
            self.registry, self.store, draft, run_id=self.service.run, epoch=self.service.epoch,
            step=1, include_optimizer=False, write=write,
        )  # fmt: skip
        return draft.artifact_id

    def killed(self) -> str:
        """Begins a save that ends before its artifact is entered; returns the artifact's id."""
        draft = self.draft()
        publish.write(self.store, draft)
        return draft.artifact_id

    def fetch(self, artifact: str) -> dict[str, bytes]:
        return fetch.fetch(
            self.registry, self.store, self.registry.data_keys.reader(TENANT), artifact
        )

    def sweep(self, later_s: float = 0, registry: Registry | None = None, **options: Any) -> Any:
        """Sweeps after some time has passed; returns the states by name."""
        self.objects.now += timedelta(seconds=later_s)
        found = [*sweep(registry or self.registry, self.store, TENANT, HOUR, **options)]
        assert len({orphan.name for orphan in found}) == len(found)
        return {orphan.name: orphan.state for orphan in found}

    def names(self) -> set[str]:
        """Returns the names below the tenant, without heads and clock."""
        found = {info.name.removeprefix(f"t/{TENANT}/") for info in self.objects.list_below("t")}
        return {name for name in found if not name.startswith("audit/")} - {"clock"}

    def put(self, name: str, content: bytes = b"x") -> None:
        path = self.service.root / "t" / TENANT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def events(self, event: str) -> list[Any]:
        rows = map(json.loads, self.registry.audit_log.rows(TENANT, 0, 10_000))
        return [row for row in rows if row["event"] == event]


@pytest.fixture
def at(service: Service) -> Store:
    return Store(service)


def files_of(artifact: str) -> set[str]:
    inside = {f"a/{artifact}/{name}" for name in ("manifest.json", "weights.enc", "state.enc")}
    return inside | {f"keys/{artifact}.json"}


# --- what goes -----------------------------------------------------------------------------------


def test_what_a_killed_save_left_goes_in_the_second_sweep_an_hour_later(at: Store) -> None:
    kept, killed = at.publish(), at.killed()
    assert at.sweep() == {killed: "waiting"}
    assert at.sweep(HOUR - 1) == {killed: "waiting"}
    assert at.names() == files_of(kept) | files_of(killed)
    assert at.sweep(1) == {killed: "removed"}
    assert at.names() == files_of(kept)
    assert not (at.service.root / "t" / TENANT / "a" / killed).exists()
    assert at.fetch(kept) == FILES
    assert at.sweep(HOUR) == {}


def test_the_first_sweep_removes_nothing_however_old_the_files_are(at: Store) -> None:
    killed = at.killed()
    for path in at.service.files_of(killed):
        os.utime(path, (0, 0))
    found = [*sweep(at.registry, at.store, TENANT, 0)]
    assert [orphan.state for orphan in found] == ["waiting"]
    assert [orphan.state for orphan in sweep(at.registry, at.store, TENANT, 0)] == ["removed"]


def test_a_sweep_tells_files_and_bytes_and_is_in_the_audit_log(at: Store) -> None:
    killed = at.killed()
    size = sum(path.stat().st_size for path in at.service.files_of(killed))
    at.sweep()
    at.objects.now += timedelta(hours=1)
    assert [*sweep(at.registry, at.store, TENANT, HOUR)] == [Orphan(killed, 4, size, "removed")]
    (row,) = at.events("artifact.sweep")
    assert (row["subject"], row["details"]) == (killed, {"files": 4, "size_bytes": size})
    heads = [
        int(p.stem.partition("-")[0]) for p in (at.service.root / "t" / TENANT / "audit").iterdir()
    ]
    assert max(heads) == row["seq"]


@pytest.mark.parametrize("part", ["manifest.json", "weights.enc", "key"])
def test_any_part_alone_is_an_orphan(at: Store, part: str) -> None:
    killed = at.killed()
    for path in at.service.files_of(killed):
        if part != ("key" if path.parent.name == "keys" else path.name):
            path.unlink()
    assert len(at.names()) == 1
    at.sweep()
    assert at.sweep(HOUR) == {killed: "removed"}
    assert at.names() == set()


def test_a_deletion_that_the_store_refused_half_way_is_finished(at: Store) -> None:
    artifact = at.publish()
    weights = at.service.root / "t" / TENANT / "a" / artifact / "weights.enc"
    weights.unlink()
    (weights / "full").mkdir(parents=True)  # a folder is not unlinked
    (weights / "full" / "x.enc").write_bytes(b"x")
    at.registry.artifacts.delete(TENANT, artifact)
    shutil.rmtree(weights)
    weights.write_bytes(b"x")
    at.sweep()
    assert at.sweep(HOUR) == {artifact: "removed"}
    assert at.names() == set()


def test_a_folder_of_a_broken_re_encryption_goes_and_the_artifact_stays(at: Store) -> None:
    kept = at.publish()
    at.put(f"a/{kept}.2/weights.enc")
    at.put(f"keys/{kept}.2.json")
    at.sweep()
    assert at.sweep(HOUR) == {f"{kept}.2": "removed"}
    assert at.names() == files_of(kept)
    assert at.fetch(kept) == FILES


def test_the_folder_from_before_a_re_encryption_goes_and_the_new_one_stays(at: Store) -> None:
    artifact = at.publish()
    old = at.service.root / "t" / TENANT / "a" / artifact
    shutil.copytree(old, at.service.home / "old")
    copies.reseal(at.registry, str(at.service.root), TENANT, artifact)
    shutil.copytree(at.service.home / "old", old)  # as if it had been killed before it removed it
    at.put(f"keys/{artifact}.json")
    at.sweep()
    assert at.sweep(HOUR) == {artifact: "removed"}
    assert at.names() == files_of(f"{artifact}.2")
    assert at.fetch(artifact) == FILES


@pytest.mark.parametrize("how", [copies.reseal, copies.copy])
def test_new_files_of_an_artifact_that_were_swept_are_not_entered(
    at: Store, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = at.publish()

    def slow(store: ArtifactStore, draft: Draft) -> tuple[bytes, int]:
        publish.written(store, draft)
        at.sweep()
        assert at.sweep(HOUR) == {draft.stored_as: "removed"}
        return publish.written(store, draft)

    with monkeypatch.context() as patch:
        patch.setattr(copies, "written", slow)
        with pytest.raises(StorageError, match="larger min_age"):
            how(at.registry, str(at.service.root), TENANT, artifact)
    assert at.fetch(artifact) == FILES
    assert [info.artifact_id for info in at.registry.catalogue.find(TENANT)] == [artifact]
    at.sweep()
    assert at.names() == files_of(artifact)
    how(at.registry, str(at.service.root), TENANT, artifact)  # a grave is of one name
    assert at.fetch(artifact) == FILES


def test_what_killed_writes_left_goes_where_nothing_else_does(at: Store) -> None:
    kept, killed = at.publish(), at.killed()
    of_kept = {f"keys/.{kept}.json.0badf00d", f"a/{kept}/.weights.enc.01234567", ".clock.0badf00d"}
    of_kept |= {f"keys/{kept}.json.89abcdef"}  # Azure's
    for name in (*of_kept, f"a/{killed}/.more.enc.0badf00d", f"keys/.{killed}.json.0badf00d"):
        at.put(name)
    at.sweep()
    assert at.sweep(HOUR) == dict.fromkeys({killed, *of_kept}, "removed")
    assert at.names() == files_of(kept)
    assert at.fetch(kept) == FILES


@pytest.mark.parametrize(
    "name",
    ["...0badf00d", "..x.0badf00d", "a/..0badf00d", ".x.0badf00", ".x.0badf00d/y", ".\n.0badf00d"],
)  # fmt: skip
def test_only_what_a_killed_write_is_named_may_be_hidden(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="not a valid name in a store"):
        LocalFolder(tmp_path).delete(name)


# --- what stays ----------------------------------------------------------------------------------


def test_names_that_we_do_not_give_are_told_and_left_alone(at: Store) -> None:
    kept, killed = at.publish(), at.killed()
    foreign = {
        "notes.txt", "a/README", "a/art-1/weights.enc", f"a/{killed}/notes.txt",
        f"a/{killed}/.manifest.json", f"a/{killed}/sub/weights.enc", f"a/{kept}/.DS_Store",
        f"a/{killed}.x/weights.enc", f"a/x{killed}/weights.enc", f"keys/{killed}", "keys/.json",
        f"a/{killed}/.notes.txt.0badf00d", f"b/{killed}/weights.enc", ".clock", "clock.json",
        f"keys/{killed}.json.0badf00", f"a/{killed[:-1]}/weights.enc",
    }  # fmt: skip
    for name in foreign:
        at.put(name)
    at.sweep()
    assert at.sweep(HOUR) == {killed: "removed"} | dict.fromkeys(foreign, "unknown")
    assert at.names() == files_of(kept) | foreign


def test_heads_and_other_tenants_are_not_looked_at(at: Store) -> None:
    kept = {f"audit/{n}.json" for n in ("x", "art-" + "0" * 27)} | {"audit/.3.json.0badf00d"}
    kept |= {"ledgers/ab/4-cd.json", "ledgers/ab/.4-cd.json.0badf00d"}
    killed = at.killed()
    other = at.service.root / "t" / "bank"
    shutil.copytree(at.service.root / "t" / TENANT, other)
    at.sweep()
    for name in kept - {"audit/x.json", f"audit/art-{'0' * 27}.json"}:
        at.put(name)
    before = sorted(path for path in other.rglob("*") if path.is_file())
    assert at.sweep(HOUR) == {killed: "removed"}
    assert sorted(path for path in other.rglob("*") if path.is_file()) == before
    assert (at.service.root / "t" / TENANT / "ledgers/ab/.4-cd.json.0badf00d").exists()
    assert (at.service.root / "t" / TENANT / "audit/.3.json.0badf00d").exists()


def test_a_dry_run_lists_and_changes_nothing(at: Store) -> None:
    killed = at.killed()
    for _ in range(2):  # it does not count as the first sweep either
        assert at.sweep(HOUR, dry_run=True) == {killed: "waiting"}
    assert at.sweep() == {killed: "waiting"}
    rows = len(at.registry.audit_log.rows(TENANT, 0, 1000))
    before = at.names()
    assert at.sweep(HOUR, dry_run=True) == {killed: "due"}
    assert at.names() == before
    assert len(at.registry.audit_log.rows(TENANT, 0, 1000)) == rows
    at.publish()
    assert at.sweep() == {killed: "removed"}


@pytest.mark.parametrize("change", ["added", "rewritten", "longer", "part"])
def test_what_changed_since_begins_anew(at: Store, change: str) -> None:
    killed = at.killed()
    at.sweep()
    weights = at.service.root / "t" / TENANT / "a" / killed / "weights.enc"
    if change == "added":
        at.put(f"a/{killed}/optimizer.enc")
    elif change == "part":
        at.put(f"a/{killed}/.optimizer.enc.0badf00d")
    elif change == "longer":
        before = weights.stat()
        weights.write_bytes(weights.read_bytes() + b"x")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(weights, (1, 1))
    assert at.sweep(HOUR) == {killed: "waiting"}
    assert at.sweep(HOUR - 1) == {killed: "waiting"}
    assert at.sweep(1) == {killed: "removed"}


def test_a_clock_that_is_put_back_starts_again_and_never_hastens(at: Store) -> None:
    killed = at.killed()
    at.sweep()
    assert at.sweep(-10 * HOUR) == {killed: "waiting"}
    assert at.sweep(HOUR - 1) == {killed: "waiting"}
    assert at.sweep(1) == {killed: "removed"}


# --- saves meanwhile -----------------------------------------------------------------------------


def test_a_save_that_is_published_between_two_sweeps_is_whole(at: Store) -> None:
    def slow(store: ArtifactStore, draft: Draft) -> None:
        publish.write(store, draft)
        assert at.sweep() == {draft.artifact_id: "waiting"}

    artifact = at.publish(write=slow)
    assert at.sweep(HOUR) == {}
    assert at.fetch(artifact) == FILES


def test_a_save_that_is_published_after_its_files_went_is_refused_and_leaves_nothing(
    at: Store,
) -> None:
    def slower(store: ArtifactStore, draft: Draft) -> None:
        store.objects.put(f"t/{TENANT}/a/{draft.artifact_id}/weights.enc", b"of an hour ago")
        at.sweep()
        assert at.sweep(HOUR) == {draft.artifact_id: "removed"}
        publish.write(store, draft)  # the rest, and by the bad luck of retries all

    draft = at.draft()
    with pytest.raises(StorageError, match="larger min_age") as caught:
        at.publish(draft, slower)
    assert caught.value.details == {"reason": "swept"}
    assert at.names() == set()
    assert at.registry.catalogue.find(TENANT) == []
    with pytest.raises(NotFoundError):
        at.fetch(draft.artifact_id)
    (row,) = at.events("artifact.save")
    assert (row["subject"], row["outcome"]) == (draft.artifact_id, "storage")


def test_a_save_that_goes_on_after_its_burial_and_is_killed_leaves_nothing_for_long(
    at: Store,
) -> None:
    killed = at.killed()
    at.sweep()
    at.sweep(HOUR)
    at.put(f"a/{killed}/weights.enc")
    assert at.sweep(-5 * HOUR) == {killed: "removed"}  # what is buried waits for no clock
    assert at.names() == set()


@pytest.mark.parametrize("moment", ["listed", "judged"])
def test_a_save_that_is_published_in_the_middle_of_the_second_sweep_is_whole(
    at: Store, moment: str
) -> None:
    """It is published after the sweep has listed its files, and after the sweep has asked what
    is reachable."""
    draft = at.draft()
    publish.write(at.store, draft)
    at.sweep()

    def enter() -> None:
        at.objects.before = lambda call, name: None
        at.publish(draft, write=lambda store, draft: None)

    if moment == "listed":
        at.objects.before = lambda call, name: enter() if call == "list" else None
        registry = at.registry
    else:
        registry = Registry(f"sqlite:///{at.service.home / DATABASE}", at.service.home / KEYRING)
        reachable = registry.catalogue.reachable

        def slow(tenant: str) -> set[str]:
            known = reachable(tenant)
            enter()
            return known

        registry.catalogue.reachable = slow  # type: ignore[method-assign]
    assert at.sweep(HOUR, registry=registry) == {}
    assert at.fetch(draft.artifact_id) == FILES
    assert at.events("artifact.sweep") == []


def test_a_grave_is_not_dug_up_by_another_sweep(at: Store) -> None:
    draft = at.draft()
    publish.write(at.store, draft)
    at.registry.orphans.note(TENANT, {draft.artifact_id: "one"}, 0.0)
    assert at.registry.orphans.bury(TENANT, draft.artifact_id, 1, 1)
    at.registry.orphans.note(TENANT, {draft.artifact_id: "other"}, 0.0)
    assert at.registry.orphans.bury(TENANT, draft.artifact_id, 1, 1)  # again, and one row of it
    assert len(at.events("artifact.sweep")) == 1
    with pytest.raises(StorageError):
        at.publish(draft)


def test_nothing_is_buried_that_was_not_seen_or_is_needed(at: Store) -> None:
    artifact = at.publish()
    assert not at.registry.orphans.bury(TENANT, "art-unseen", 1, 1)
    at.registry.orphans.note(TENANT, {artifact: "x"}, 0.0)
    assert not at.registry.orphans.bury(TENANT, artifact, 1, 1)
    assert not at.registry.orphans.bury("bank", artifact, 1, 1)
    assert at.events("artifact.sweep") == []


# --- broken off ----------------------------------------------------------------------------------


def test_a_sweep_that_is_killed_at_any_call_is_finished_by_the_next_one(at: Store) -> None:
    """The sweep runs in a child and is killed by SIGKILL at every call of the store, and before
    and after each burial."""
    for k in range(100):
        kept, killed = at.publish(), {at.killed(), at.killed()}
        at.sweep()
        at.objects.now += timedelta(hours=1)
        child = os.fork()
        if not child:
            _die_at(at, k)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        assert at.fetch(kept) == FILES
        assert set(at.sweep(registry=_reopened(at.service))) <= killed
        assert at.names() == files_of(kept), k
        delete.delete(at.registry, str(at.service.root), TENANT, kept)
        if status == 0:
            break
    assert k > 8


def _reopened(service: Service) -> Registry:
    return Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)


def _die_at(at: Store, k: int) -> None:
    countdown = iter(range(k, -1, -1))

    def step(*_: object) -> None:
        if next(countdown) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    registry = Registry(f"sqlite:///{at.service.home / DATABASE}", at.service.home / KEYRING)
    bury = registry.orphans.bury

    def mortal(*arguments: Any) -> bool:
        step()
        buried = bury(*arguments)
        step()
        return buried

    registry.orphans.bury = mortal  # type: ignore[method-assign]
    at.objects.before = step
    try:
        at.sweep(registry=registry)
    except BaseException:
        os._exit(1)


def test_a_store_that_refuses_holds_up_no_other_orphan(at: Store) -> None:
    killed = sorted([at.killed(), at.killed()])
    at.sweep()

    def refuse(call: str, name: str) -> None:
        if call == "delete" and killed[0] in name:
            raise StorageError("the store refused")

    at.objects.before = refuse
    assert at.sweep(HOUR) == {killed[0]: "refused", killed[1]: "removed"}
    assert at.names() == files_of(killed[0])
    at.objects.before = lambda call, name: None
    assert at.sweep() == {killed[0]: "removed"}
    assert at.names() == set()


# --- registries that do not know -----------------------------------------------------------------


def backed_up(at: Store, tmp_path: Path) -> Registry:
    """Returns a registry on a backup of the current database, under the same keys."""
    with closing(sqlite3.connect(at.service.home / DATABASE)) as live:
        live.execute("VACUUM INTO ?", [str(tmp_path / "backup")])
    return Registry(f"sqlite:///{tmp_path / 'backup'}", at.service.home / KEYRING)


def test_a_registry_that_was_restored_from_a_backup_sweeps_nothing(
    at: Store, tmp_path: Path
) -> None:
    at.publish()
    old = backed_up(at, tmp_path)
    at.publish()
    before = at.names()
    for later_s in (0, HOUR):
        with pytest.raises(IntegrityError, match="older copy"):
            at.sweep(later_s, registry=old)
    assert at.names() == before
    assert at.sweep() == {}


def test_a_restored_registry_that_saved_as_often_again_sweeps_nothing(
    at: Store, tmp_path: Path
) -> None:
    restored = Store(replace(at.service, registry=backed_up(at, tmp_path)))
    meet(restored.registry, restored.store, TENANT)  # both are in use at once
    at.publish()
    restored.publish()
    heads = sorted((at.service.root / "t" / TENANT / "audit").iterdir())
    assert len({path.name.partition("-")[0] for path in heads}) < len(heads)  # one number, twice
    before = at.names()
    for later_s in (0, HOUR):
        with pytest.raises(IntegrityError, match="older copy"):
            restored.sweep(later_s)
    assert at.names() == before


def test_what_is_no_head_holds_up_no_sweep_and_is_told(
    at: Store, caplog: pytest.LogCaptureFixture
) -> None:
    killed, zeros = at.killed(), "0" * 64
    at.publish()
    junk = ["audit/x.json", f"audit/999-{zeros}.json", f"audit/a/{zeros}", "audit/f o.json"]
    for name in junk:
        at.put(name, b"\xff{}")
    at.put(f"audit/3-{zeros}.json.0badf00d")  # what a killed write left on Azure
    at.sweep()
    assert all(f"{name} in the artifact store is ignored" in caplog.text for name in junk)
    assert "0badf00d" not in caplog.text
    assert at.sweep(HOUR) == {killed: "removed"}


def test_a_head_that_no_known_key_signed_stops_a_sweep_and_is_named(at: Store) -> None:
    """Another registry on this store has another key, and its artifacts would look left over."""
    at.publish()
    head = replace(at.registry.audit_log.head(TENANT), seq=2).signed(new_signing_key())
    name = f"audit/{head.place}.json"
    at.put(name, head.line().encode())
    with pytest.raises(IntegrityError, match=rf"{name}.*remove it"):
        at.sweep()
    (at.service.root / "t" / TENANT / name).unlink()
    at.sweep()


def test_a_sweep_reads_no_head_that_its_registry_knows(
    at: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        at.publish()
    read, asked, known = [], [], at.registry.audit_log.unknown
    monkeypatch.setattr(at.objects, "read", read.append)
    monkeypatch.setattr(
        at.registry.audit_log, "unknown", lambda *values: asked.append(values) or known(*values)
    )
    monkeypatch.setattr(at.registry.audit_log, "rows", asked.append)
    at.sweep()
    assert (read, len(asked)) == ([], 1)
    assert len(asked[0][1]) == 4


def test_another_registry_on_the_same_store_sweeps_nothing(at: Store, tmp_path: Path) -> None:
    at.publish()
    before = at.names()
    create(tmp_path / "other")
    other = Registry(f"sqlite:///{tmp_path / 'other' / DATABASE}", tmp_path / "other" / KEYRING)
    for _ in range(5):  # with as many rows
        other.runs.claim(other.runs.create(TENANT, TrainingConfig(model_ref="m").model_dump_json()))
    for later_s in (0, HOUR):
        with pytest.raises(IntegrityError, match="another registry uses this store"):
            at.sweep(later_s, registry=other)
    assert at.names() == before


# --- every store ---------------------------------------------------------------------------------


def test_every_store_tells_its_time_and_loses_its_orphans_alone(
    root: str, service: Service
) -> None:
    store = ArtifactStore(root)
    orphan, kept = (
        Draft(service.registry, service.store, service.capability, FILES) for _ in range(2)
    )
    publish.write(store, orphan)
    publish.publish(
        service.registry, store, kept, run_id=service.run, epoch=service.epoch, step=1,
        include_optimizer=False,
    )  # fmt: skip
    for state in ("waiting", "removed"):
        found = [*sweep(service.registry, store, TENANT, 0)]
        assert [(one.name, one.state, one.files) for one in found] == [
            (orphan.artifact_id, state, 4)
        ]
    left = {info.name.removeprefix(f"t/{TENANT}/") for info in store.objects.list_below()}
    assert {name for name in left if name[:6] != "audit/"} == files_of(kept.artifact_id) | {"clock"}
    reader = service.registry.data_keys.reader(TENANT)
    assert fetch.fetch(service.registry, store, reader, kept.artifact_id) == FILES


# --- SDK and command -----------------------------------------------------------------------------


class FakeSweeps:
    """The part of a service that the command needs."""

    def __init__(self, found: list[Orphan]) -> None:
        self.found, self.asked = found, []

    def __call__(self) -> FakeSweeps:
        return self

    def __enter__(self) -> FakeSweeps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def sweep_store(self, min_age_s: float, dry_run: bool) -> Iterator[Orphan]:
        self.asked.append((min_age_s, dry_run))
        yield from self.found


@pytest.mark.parametrize("refused", [False, True])
def test_the_command_says_what_went_and_what_did_not(refused: bool) -> None:
    service = FakeSweeps([
        Orphan("art-1", 4, 1_000_000, "removed"), Orphan("art-2", 1, 2_000, "removed"),
        Orphan("art-3", 2, 3_000, "waiting"), Orphan("notes.txt", 1, 1, "unknown"),
        *[Orphan("art-4", 1, 1, "refused", "the disk is ill")] * refused,
    ])  # fmt: skip
    found = CliRunner().invoke(main, ["artifacts", "sweep", "--min-age", "2"], obj=service)
    assert service.asked == [(7200.0, False)]
    assert found.exit_code == refused
    assert "removed 2 orphans (5 files, 1.0 MB)" in found.stdout
    assert "1 waiting (2 files, 3.0 kB)" in found.stdout
    assert "2 hours" in found.stdout
    assert "notes.txt" in found.stdout
    assert ("art-4: the disk is ill" in found.stderr) is refused


def test_a_dry_run_of_the_command_names_what_would_go() -> None:
    service = FakeSweeps([Orphan("art-1", 4, 1_000_000, "due"), Orphan("art-2", 1, 1, "waiting")])
    found = CliRunner().invoke(main, ["artifacts", "sweep", "--dry-run"], obj=service)
    assert service.asked == [(3600.0, True)]
    assert "would remove art-1: 4 files, 1.0 MB" in found.stdout
    assert "removed 0" not in found.stdout


@pytest.mark.slow
def test_the_service_sweeps_through_its_registry_actor(embedded: None, home: Path) -> None:
    with ServiceClient(address="local") as client:
        folder = home / "store" / "t" / "default" / "a" / f"art-{'0' * 27}"
        folder.mkdir(parents=True)
        (folder / "weights.enc").write_bytes(b"12345")
        (waiting,) = client.sweep_store(0)
        assert (waiting.name, waiting.state) == (folder.name, "waiting")
        assert [one.state for one in client.sweep_store(0, dry_run=True)] == ["due"]
        assert list(client.sweep_store(0)) == [Orphan(folder.name, 1, 5, "removed")]
        assert not folder.exists()
        for wrong in (-1, float("nan"), float("inf")):
            with pytest.raises(InvalidRequestError, match="min_age_s"):
                client.sweep_store(wrong)
        assert [row.event for row in client.audit_log()].count("artifact.sweep") == 1
