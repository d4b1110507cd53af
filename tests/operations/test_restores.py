"""Tests an older database under newer heads of the audit log.

Nothing of the store is opened, saved or removed until the newest copy is restored or the operator
accepts the loss.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.artifacts import adapters, copies, delete
from actors.operations import doctor, expiry, keys, restore
from actors.operations import verify as upkeep
from actors.operations.doctor import PROBLEM, examine
from actors.operations.sweep import sweep
from actors.registry.registry import Registry
from actors.registry.rollback import keep, meet, meet_ledger
from actors.storage.home import DATABASE, KEYRING
from actors.storage.store import ArtifactStore
from serve_app.replica.sources import Sources
from support.artifacts import TENANT, Service, assert_same, checkpoint
from support.artifacts import service as service  # a fixture
from support.audit import US, LocalService, restored
from support.audit import place as place  # a fixture
from support.restored import Restored, loaded, old_copy, on, put_back, train
from support.restored import old as old  # a fixture
from tg_tinker import (
    AccessDeniedError,
    IntegrityError,
    LedgerMismatchError,
    NotFoundError,
    RegistryAcceptance,
    RegistryCheck,
    RollbackError,
    StorageError,
    TrainingConfig,
)
from tg_tinker.cli.main import main
from tg_tinker.records.audit_log import ACCEPT, AuditRow, acceptance, chained, verify
from tg_tinker.records.files import read_head
from tg_tinker.records.heads import AuditHead, LedgerHead
from tg_tinker.storage.envelope import new_key, new_signing_key, public_key_of

THEM = "bank"
KEY = new_signing_key()
PUBLIC = public_key_of(KEY)


USES: dict[str, Callable[[Service, str], object]] = {
    "verify": lambda of, _: [*upkeep.verify(of.registry, str(of.root), TENANT)],
    "load_state": loaded,
    "read": lambda of, one: of.fetch(one),
    "export": lambda of, one: adapters.export_adapter(
        of.registry, str(of.root), TENANT, one, of.home.parent / "out"
    ),
    "sample": lambda of, one: (
        Sources(of.registry, new_key(), "tg", str(of.root), "some/model")
        .find(TENANT, (), one, "api-key 7")
        .fetch()
    ),
    "copy": lambda of, one: copies.copy(of.registry, str(of.root), TENANT, one),
    "reseal": lambda of, one: copies.reseal(of.registry, str(of.root), TENANT, one),
    "save": lambda of, _: of.publish(),
    "sweep": lambda of, _: [*sweep(of.registry, of.store, TENANT, 0)],
    "expire": lambda of, _: [*expiry.delete_expired(of.registry, str(of.root), TENANT)],
    "retire": lambda of, _: keys.retire(of.registry, str(of.root), TENANT, "k1"),
    "delete": lambda of, one: delete.delete(of.registry, str(of.root), TENANT, one),
    "shred": lambda of, one: delete.shred(of.registry, str(of.root), TENANT, one),
    "train": lambda of, _: train(of),
}


def refused(old: Restored, use: Callable[[Service, str], object]) -> RollbackError:
    """Checks that a use is refused with a row of the cause, and leaves the store unchanged;
    returns the error."""
    before = {path: path.read_bytes() for path in old.service.files()}
    known = old.registry.catalogue.find(TENANT)
    with pytest.raises(RollbackError, match=r"newest copy .*tg-tinker registry accept") as caught:
        use(old.service, old.deleted)
    assert {path: path.read_bytes() for path in old.service.files()} == before
    assert old.registry.catalogue.find(TENANT) == known
    assert ("registry.check", "rollback") in {(row.event, row.outcome) for row in old.rows()}
    return caught.value


@pytest.mark.parametrize("use", USES)
def test_an_older_database_opens_saves_and_removes_nothing(old: Restored, use: str) -> None:
    error = refused(old, USES[use])
    newest = max(
        old.service.root.glob(f"t/{TENANT}/audit/*"), key=lambda p: int(p.name.split("-")[0])
    )
    assert (error.code, error.details["object"]) == ("rollback", f"t/{TENANT}/audit/{newest.name}")
    assert error.details["row"] == int(newest.name.split("-")[0])
    refused(old, USES[use])  # and again: a refusal is no meeting
    assert not old.service.home.parent.joinpath("out").exists()


def test_the_newest_database_under_its_own_heads_is_let_through(old: Restored) -> None:
    assert_same(old.newest.fetch(old.kept), checkpoint())
    with pytest.raises(NotFoundError):
        old.newest.fetch(old.deleted)
    old.newest.publish()
    assert old.newest.fetch(old.kept)


def test_from_the_acceptance_on_all_goes_on_and_every_new_process_knows(old: Restored) -> None:
    refused(old, USES["read"])
    accepted = old.accept()
    assert accepted == RegistryAcceptance(len(old.rows()), (old.kept, old.deleted), {})
    row = old.rows()[-1]
    assert (row.event, row.outcome, row.who) == (ACCEPT, "ok", "sdk")
    with pytest.raises(RollbackError):  # two went on from one: the newest copy learns it, too
        old.newest.fetch(old.kept)
    again = Registry(str(old.registry.database.engine.url), old.service.home / KEYRING)
    service = replace(old.service, registry=again)
    for name in ("verify", "load_state", "read", "sample", "copy", "save", "sweep", "expire"):
        USES[name](service, old.deleted)
    USES["delete"](service, old.deleted)
    assert (old.check().sound, old.check().accepted) == (True, (row.seq,))
    assert old.accept().row == 0


def test_an_acceptance_names_what_opens_again_and_what_has_lost_its_files(old: Restored) -> None:
    shutil.rmtree(old.service.root / f"t/{TENANT}/a/{old.deleted}")
    theirs = old.registry.runs.create(THEM, TrainingConfig(model_ref="m").model_dump_json())
    epoch = old.registry.runs.claim(theirs)
    old.registry.artifacts.publish(THEM, theirs, epoch, "art-theirs", 1, 1, False, b"{}", "k1")
    accepted = old.accept()
    assert (accepted.openable, [*accepted.lost]) == ((old.kept,), [old.deleted])


def test_a_database_that_goes_back_under_a_living_registry_is_noticed(
    service: Service, tmp_path: Path
) -> None:
    """It is detected right after the last row that the registry wrote, without a question in
    between."""
    artifact = service.publish()
    database = old_copy(service, tmp_path / "old.db")
    shutil.copytree(service.root, tmp_path / "store")
    delete.shred(service.registry, str(service.root), TENANT, artifact)
    shutil.copytree(tmp_path / "store", service.root, dirs_exist_ok=True)
    put_back(database, service)
    for use in (loaded, USES["save"], USES["export"]):
        with pytest.raises(RollbackError):
            use(service, artifact)


def test_it_is_noticed_in_every_store_that_was_met(service: Service, tmp_path: Path) -> None:
    artifact, other = service.publish(), ArtifactStore(str(tmp_path / "other"))
    database = old_copy(service, tmp_path / "old.db")
    meet(service.registry, other, TENANT)
    service.publish()
    keep(other.root, service.registry.audit_log.head(TENANT))
    shutil.rmtree(service.root / f"t/{TENANT}/audit")
    put_back(database, service)
    assert service.fetch(artifact)  # this store has no head any more
    with pytest.raises(RollbackError):
        replace(service, store=other).fetch(artifact)


# --- where a key is handed out -------------------------------------------------------------------


def test_no_data_key_is_given_for_a_store_that_was_not_met(service: Service) -> None:
    """The check is here so that no new call site can forget the comparison."""
    artifact = service.publish()
    wrapped, registry = (
        service.store.read_key(TENANT, artifact),
        on(service, service.home / DATABASE).registry,
    )
    asks: list[Callable[[str], object]] = [
        lambda root: registry.data_keys.open(
            registry.data_keys.reader(TENANT), artifact, wrapped, root
        ),
        lambda root: registry.data_keys.new(service.capability, "art-new", root),
    ]
    meet(registry, ArtifactStore(str(service.home / "other")), TENANT)
    meet(registry, service.store, THEM)
    for ask in asks:
        with pytest.raises(AccessDeniedError, match="compared with"):
            ask(service.store.root)
    meet(registry, service.store, TENANT)
    for ask in asks:
        assert ask(service.store.root)


class Listing(ArtifactStore):
    """A store that counts how often its heads are listed, and that fails while `ill` is set."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.listed: list[str] = []
        self.ill = False

    def audit_heads(self, tenant: str) -> list[str]:
        self.listed.append(tenant)
        if self.ill:
            raise StorageError("no answer")
        return super().audit_heads(tenant)

    def of(self, service: Service) -> Service:
        """Returns the service on this store, which its registry opens too."""
        service.registry.heads._open_store = lambda _: self
        return replace(service, store=self)


def test_a_store_is_met_once_for_each_tenant_store_and_process(service: Service) -> None:
    artifact = service.publish()
    store = Listing(str(service.root))
    service = store.of(on(service, service.home / DATABASE))
    for _ in range(3):
        service.fetch(artifact)
    assert store.listed == [TENANT]
    with pytest.raises(NotFoundError):
        service.fetch(artifact, THEM)
    assert store.listed == [TENANT, THEM]
    store.of(on(service, service.home / DATABASE)).fetch(artifact)
    assert store.listed == [TENANT, THEM, TENANT]
    new = Listing(str(service.home / "new"))
    assert new.of(service).publish()
    assert new.listed == [TENANT]


def test_a_store_that_does_not_answer_is_not_passed_over(service: Service) -> None:
    artifact, store = service.publish(), Listing(str(service.root))
    service = store.of(on(service, service.home / DATABASE))
    store.ill = True
    for _ in range(2):
        with pytest.raises(StorageError, match="no answer"):
            service.fetch(artifact)
        with pytest.raises(StorageError, match="no answer"):
            service.publish()
    store.ill = False
    assert service.fetch(artifact)


def test_no_caller_can_leave_a_head_out(old: Restored) -> None:
    """The registry lists the store itself, whatever a caller shows or says."""
    registry, root = old.registry, old.root
    wrapped = old.service.store.read_key(TENANT, old.deleted)
    for _ in range(2):
        with pytest.raises(RollbackError):
            registry.heads.meet_store(TENANT, root)
        registry.heads.meet_ledger(TENANT, "default", {}, [])
        registry.heads.judge(TENANT, None, {})
        with pytest.raises(AccessDeniedError, match="compared with"):
            registry.data_keys.open(registry.data_keys.reader(TENANT), old.deleted, wrapped, root)
    named = {name for name in dir(registry.heads) if name[0] != "_"}
    assert {name for name in named if name.startswith("meet")} == {"meet_ledger", "meet_store"}


# --- objects of others ---------------------------------------------------------------------------


def test_nobody_who_writes_to_the_store_can_lock_a_tenant_out(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    artifact, ours = service.publish(), service.registry.audit_log.head(TENANT)
    service.registry.runs.create(THEM, TrainingConfig(model_ref="m").model_dump_json())
    forged = replace(ours, seq=99).signed(new_signing_key())
    junk = {
        f"{forged.place}.json": forged.line(),
        f"98-{'0' * 64}.json": replace(ours, seq=98).line(),  # not what was signed
        f"97-{'0' * 64}.json": service.registry.audit_log.head(THEM).line(),
        f"96-{'0' * 64}.json": "no head",
        f"95-{'0' * 64}.json": ours.line(),  # known, under another name
    }
    for name, line in junk.items():
        (service.root / f"t/{TENANT}/audit/{name}").write_text(f"{line}\n")
    service = on(service, service.home / DATABASE)
    assert_same(service.fetch(artifact), checkpoint())
    service.publish()
    for name in [*junk][:4]:
        assert f"{name} in the artifact store is ignored" in caplog.text
    found = restore.check(service.registry, str(service.root), TENANT, service.home)
    assert (found.sound, len(found.foreign)) == (True, 4)
    with pytest.raises(IntegrityError, match=r"not signed here.*remove it") as swept:
        USES["sweep"](service, artifact)
    assert not isinstance(swept.value, RollbackError)
    assert restore.accept(service.registry, str(service.root), TENANT, service.home).row == 0
    with pytest.raises(IntegrityError):
        service.registry.heads.accept(TENANT, [forged.line()])


# --- what an acceptance is worth -----------------------------------------------------------------


def branch(ours: list[AuditRow], *events: str) -> list[AuditRow]:
    """Returns rows that continue others.

    An event with a space is an acceptance of the heads that follow it.
    """
    rows = [*ours]
    for event in events:
        name, _, heads = event.partition(" ")
        rows.append(
            chained(
                rows[-1] if rows else None, time="2026-01-01T00:00:00.000000+00:00", tenant=TENANT,
                who="sdk", event=name, subject="", outcome="ok",
                details=acceptance(
                    heads.split(), TENANT, rows[-1].hash, KEY
                ) if heads else {},
            )
        )  # fmt: skip
    return rows


def head_of(row: AuditRow) -> AuditHead:
    return AuditHead(row.tenant, row.seq, row.hash, row.time)


def test_an_acceptance_is_verified_from_the_log_alone_and_told() -> None:
    shared = branch([], "a", "b")
    lost = [head_of(row) for row in branch(shared, "c", "d", "e", "f")[2:]]
    rows = branch(shared, "x", f"{ACCEPT} {lost[0].place} {lost[3].place}", "y")
    found = verify(rows, own=[head_of(shared[0]), lost[0], lost[3]], public_key=PUBLIC)
    assert (found.seq, found.accepted, found.since) == (5, (4,), head_of(shared[0]))
    assert "an older copy was accepted at row 4" in str(found)
    for missing in (lost[1], lost[2]):
        with pytest.raises(IntegrityError, match=f"forked: row {missing.seq}"):
            verify(rows, own=[missing], public_key=PUBLIC)
    with pytest.raises(IntegrityError, match=r"ends at row 5.*accepted that at row 4"):
        # In other hands it is not let be.
        verify(rows, known=[lost[3]], own=[lost[3]], public_key=PUBLIC)
    with pytest.raises(IntegrityError, match=r"forked: row 3.*accepted that at row 4"):
        verify(rows, known=[lost[0]], public_key=PUBLIC)
    refused = [replace(row, outcome="storage") for row in rows]
    with pytest.raises(IntegrityError, match="row 1 of the audit log was changed"):
        verify(refused, own=[lost[0]])
    with pytest.raises(IntegrityError, match="forked: row 3"):
        verify(branch(shared, "x", f"other {lost[0].place}", "y"), own=[lost[0]], public_key=PUBLIC)
    assert verify(rows[4:], since=head_of(rows[3]), public_key=PUBLIC).accepted == ()


def test_the_audit_log_verifies_after_an_acceptance_and_says_so(place: Path) -> None:
    sdk = LocalService(place)
    for _ in range(5):
        sdk._registry.runs.create(US, "{}")

    def go_on() -> None:
        for _ in range(3):
            sdk._registry.runs.create(US, "{}")
            keep(sdk._store, sdk._registry.audit_log.head(US))
        sdk.verify_audit_log()

    restored(sdk, go_on)
    lost = read_head(sdk._home / f"audit-head-{US}")
    with pytest.raises(IntegrityError, match="ends at row 5"):
        sdk.verify_audit_log()
    found = sdk.check_registry()
    assert {*found.missing.values()} == {6, 7, 8}
    assert str(sdk._home / f"audit-head-{US}") in found.missing
    shutil.rmtree(sdk._store)  # the head of the home alone is evidence to `check` and `verify`
    assert (sdk.check_registry().missing, sdk.check_registry().heads) == (
        {str(sdk._home / f"audit-head-{US}"): 8}, 0,
    )  # fmt: skip
    assert sdk.accept_registry().row == 6
    verified = sdk.verify_audit_log()
    assert (verified.seq, verified.accepted) == (6, (6,))
    with pytest.raises(IntegrityError, match="accepted that at row 6"):
        sdk.verify_audit_log(lost)
    assert sdk.check_registry().sound


def test_a_ledger_is_not_accepted(old: Restored) -> None:
    newest, data = old.newest.registry, "clinic-2026"
    newest.ledgers.register(TENANT, data, 8.0, 1e-5, "example")
    name, line = newest.heads.ledger_name(TENANT, data), newest.heads.ledger_head(TENANT, data, -1)
    place = f"0-{newest.ledgers.entries(TENANT, data)[0]['hash']}"
    old.service.store.write_ledger_head(TENANT, name, place, line)
    forged = replace(LedgerHead.parse(line), ledger="e" * 64).signed(new_signing_key())
    old.service.store.write_ledger_head(TENANT, "e" * 64, place, forged.line())
    old.service.store.write_ledger_head(TENANT, "f" * 64, place, "junk")
    assert [*old.check().ledgers] == [name]
    old.accept()
    assert (old.check().missing, old.check().sound) == ({}, False)
    with pytest.raises(LedgerMismatchError):
        meet_ledger(old.registry, ArtifactStore(str(old.root)), TENANT, data)


# --- command and doctor --------------------------------------------------------------------------


class Fake:
    """The part of a service that the commands need."""

    def __init__(self, found: RegistryCheck) -> None:
        self.found, self.accepted = found, 0

    def __call__(self, tenant: str) -> Fake:
        self.tenant = tenant
        return self

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check_registry(self) -> RegistryCheck:
        return self.found

    def accept_registry(self) -> RegistryAcceptance:
        self.accepted += 1
        return RegistryAcceptance(60, ("art-1",), {"art-2": "its files are gone"})


SOUND = RegistryCheck(52, 50, 3, {}, {"t/x/audit/y": "it is none"}, {}, {}, (12,))
LOST = replace(SOUND, missing={f"t/x/audit/{n}": n for n in range(60, 80)}, ledgers={"d": "behind"})


def call(service: Fake, *words: str, typed: str = "") -> Any:
    return CliRunner().invoke(main, ["registry", *words], obj=service, input=typed)


def test_the_command_tells_what_is_missing_and_ends_with_its_status() -> None:
    found = call(Fake(SOUND), "check")
    assert found.exit_code == 0
    for said in (
        "52 rows",
        "3 heads",
        "row 50",
        "accepted at row 12",
        "ignored: t/x/audit/y",
        "ok: ",
    ):
        assert said in found.output
    found = call(Fake(LOST), "check")
    assert found.exit_code == 1
    for said in ("row 79", "10 more heads", "newest copy", "registry accept", "ledger d: behind"):
        assert said in found.output
    assert "ok: " not in found.output
    for problem in ({"ledgers": {"d": "behind"}}, {"damaged": {"head": "torn"}}, {"stored": 11}):
        service = Fake(replace(SOUND, **problem))  # type: ignore[arg-type]
        found = call(service, "check", "--tenant", THEM)
        assert (found.exit_code, "PROBLEM" in found.output, service.tenant) == (1, True, THEM)


@pytest.mark.parametrize(("words", "typed", "done"), [
    ((), "accept\n", 1), (("--yes",), "", 1), ((), "y\n", 0), ((), "", 0),
])  # fmt: skip
def test_nothing_is_accepted_unasked(words: tuple[str, ...], typed: str, done: int) -> None:
    service = Fake(LOST)
    found = call(service, "accept", *words, typed=typed)
    assert (service.accepted, found.exit_code) == (done, 1 - done)
    for said in ("at row 60", "opens again: art-1", "art-2: its files are gone", "book-missing"):
        assert (said in found.output) is bool(done)


def test_an_acceptance_that_the_store_did_not_take_is_finished_unasked() -> None:
    for found in (replace(SOUND, stored=11), SOUND):  # it may have been broken off later, too
        service = Fake(found)
        assert (call(service, "accept", "--tenant", THEM).exit_code, service.accepted) == (0, 1)
        assert service.tenant == THEM


def test_where_nothing_is_lost_nothing_is_accepted() -> None:
    service = Fake(replace(SOUND, accepted=()))
    assert "nothing to accept" in call(service, "accept", "--yes").output
    assert service.accepted == 0


def theirs(service: Service) -> str:
    """Returns an artifact of another tenant in the same store."""
    registry, config = service.registry, TrainingConfig(model_ref="m").model_dump_json()
    run = registry.runs.create(THEM, config)
    shown = registry.data_keys.capability(THEM, run, epoch := registry.runs.claim(run))
    return replace(service, run=run, epoch=epoch, capability=shown).publish()


def test_a_tenant_that_only_the_store_knows_keeps_its_key(service: Service, tmp_path: Path) -> None:
    """For the copy the key opens nothing, because the copy does not know the tenant."""
    artifact = service.publish()
    database = old_copy(service, tmp_path / "old.db")
    found = theirs(service)
    service.registry.data_keys.rotate(TENANT)
    assert [*keys.rewrap(service.registry, str(service.root))] == [(artifact, ""), (found, "")]
    copied = tmp_path / "store" / f"t/{TENANT}"  # TENANT has the heads of that day
    shutil.copytree(service.root / f"t/{TENANT}", copied)
    older = on(service, database)
    with pytest.raises(RollbackError, match=f"tenant {THEM}"):
        keys.retire(older.registry, str(service.root), TENANT, "k1")
    assert older.registry.data_keys.key_ids() == ["k1", "k2"]
    assert doctored(service, database).status == PROBLEM
    assert THEM in doctored(service, database).message


def doctored(service: Service, database: Path) -> Any:
    """Returns the finding of doctor about a home with this database."""
    with closing(sqlite3.connect(service.home / DATABASE)) as live:
        live.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    home = service.home.parent / "doctored"
    shutil.copytree(service.home, home, dirs_exist_ok=True)
    shutil.copy(database, home / DATABASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "running_cluster", lambda: None)  # that of another program
        found = [*examine(home, str(home / KEYRING), str(service.root))]
    return next(one for one in found if one.check == "registry")


def test_doctor_tells_an_older_database(service: Service, tmp_path: Path) -> None:
    def finding() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(doctor, "running_cluster", lambda: None)
            found = [*examine(service.home, str(service.home / KEYRING), str(service.root))]
        return next(one for one in found if one.check == "registry")

    service.publish()
    database = old_copy(service, tmp_path / "old.db")
    service.publish()
    assert (finding().status, "knows all" in finding().message) == ("ok", True)
    service.registry.close()
    shutil.copy(database, service.home / DATABASE)
    assert finding().status == PROBLEM
    assert f"tenant {TENANT}" in finding().message
