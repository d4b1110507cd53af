"""Tests an older database, or another one, under newer heads: it is detected before any charge."""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from actors.operations import restore
from actors.privacy.budget import Budget
from actors.registry.head_keeper import EVERY, HeadKeeper
from actors.registry.registry import Registry
from actors.registry.rollback import book_missing, meet_ledger
from actors.storage.store import ArtifactStore
from actors.training.place import Place
from actors.training.worker import Worker
from support.helpers import assert_equal, weights
from support.privacy_helpers import ROWS, new_budget, private_config, registry, rows
from tg_tinker.cluster.messages import Request
from tg_tinker.errors import (
    DPBudgetExceededError,
    IntegrityError,
    LedgerMismatchError,
    RollbackError,
    StorageError,
)
from tg_tinker.records.audit_log import AuditRow
from tg_tinker.records.entries import Entry, place_of
from tg_tinker.records.files import KeptHead, keep_line
from tg_tinker.records.heads import LedgerHead
from tg_tinker.records.ledger import Ledger
from tg_tinker.storage.envelope import new_signing_key

US, DATA = "default", "clinic-2026"


@dataclass(frozen=True)
class Home:
    """A home with a store beside it, so that either can be restored without the other."""

    path: Path
    root: str

    @property
    def registry(self) -> Registry:
        return registry(self.path)

    def copied(self) -> Home:
        """Returns a copy of this home as it is now, on the same store, as a backup would restore
        it."""
        old = self.path.with_name(f"copy-{secrets.token_hex(4)}")
        old.mkdir(mode=0o700)
        for name in ("keyring", "audit.key", "audit.pub", "secrets.json"):
            shutil.copy2(self.path / name, old / name)
        with (
            sqlite3.connect(self.path / "registry.db") as source,
            sqlite3.connect(old / "registry.db") as target,
        ):
            source.backup(target)
        return replace(self, path=old)

    def budget(self, **values: Any) -> Budget:
        dp = {"noise_multiplier": 4.0} | values.pop("dp", {})
        return new_budget(self.registry, private_config(Path("none"), dp=dp, dataset_id=DATA))

    def entries(self) -> list[Entry]:
        return self.registry.ledgers.entries(US, DATA)

    def head(self, after: int = -1) -> str:
        return self.registry.heads.ledger_head(US, DATA, after)

    def keep(self, after: int = -1) -> str:
        """Writes the current head to the store; returns its position."""
        head = LedgerHead.parse(self.head(after))
        ArtifactStore(self.root).write_ledger_head(US, head.ledger, head.place, head.line())
        return head.place

    def meet(self, *kept: str) -> int:
        return meet_ledger(self.registry, ArtifactStore(self.root), US, DATA, kept)

    def book(self, *kept: str) -> int:
        return book_missing(self.registry, ArtifactStore(self.root), US, DATA, kept)

    def refusals(self) -> list[tuple[str, str, str]]:
        noted = map(AuditRow.parse, self.registry.audit_log.rows(US, 0, 1000))
        return [(row.event, row.subject, row.outcome) for row in noted if row.outcome != "ok"]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", str(tmp_path / "store"))


def spend(budget: Budget, *units: int) -> str:
    """Charges one step on these units; returns the position at which the ledger then ends."""
    return budget.charge([unit.to_bytes(16, "big") for unit in units], noised=True).place


def refused(
    act: Callable[[], object], of: Home, behind: bool, says: str = f"book-missing {DATA}"
) -> None:
    """Checks that `act` is refused for this reason, and that the ledger stays as it was."""
    before = of.entries()
    with pytest.raises(LedgerMismatchError, match=says) as caught:
        act()
    assert caught.value.details["behind"] is behind
    assert ("forked" in caught.value.message) is not behind
    assert of.entries() == before


# --- heads and ledgers -----------------------------------------------------------------------


def test_a_ledger_that_goes_through_every_head_is_let_through(home: Home) -> None:
    budget = home.budget()
    assert home.meet() == -1
    kept = [home.head()]
    for step in range(3):
        spend(budget, step)
        home.keep()
        kept.append(home.head())
    spend(budget, 9)  # newer than every head
    assert home.meet(*kept) == len(home.entries()) - 2


def test_an_older_database_is_refused_by_a_head_in_the_store(home: Home) -> None:
    budget = home.budget()
    spend(budget, 1)
    home.keep()
    old = home.copied()
    spend(budget, 2)
    home.keep()
    refused(old.meet, old, behind=True)
    assert old.refusals() == [("ledger.check", DATA, "ledger_mismatch")]
    home.meet()


def test_an_older_database_is_refused_by_the_head_of_this_home(home: Home) -> None:
    budget = home.budget()
    old = home.copied()
    spend(budget, 1)
    refused(lambda: old.meet(home.head()), old, behind=True)


def test_two_databases_that_went_on_from_one_refuse_each_others_heads(home: Home) -> None:
    budget = home.budget()
    other = home.copied()
    spend(budget, 1)
    apart = replace(budget, registry=other.registry, last="")
    spend(apart, 1)
    spend(apart, 2)
    refused(lambda: other.meet(home.head()), other, behind=False)
    refused(lambda: home.meet(other.head()), home, behind=True)  # the shorter one is both
    spend(budget, 2)
    refused(lambda: home.meet(other.head()), home, behind=False)


def test_a_data_set_that_the_database_has_lost_is_not_registered_anew(home: Home) -> None:
    home.registry.ledgers.datasets(US)
    empty = home.copied()
    home.budget()
    home.keep()
    refused(empty.meet, empty, behind=True)
    assert empty.registry.ledgers.datasets(US) == []


def test_a_data_set_without_heads_is_let_through(home: Home) -> None:
    home.budget()
    home.keep()
    store = ArtifactStore(home.root)
    assert meet_ledger(home.registry, store, US, "another") == -1
    assert meet_ledger(home.registry, store, "another", DATA) == -1


def test_a_charge_with_a_head_that_the_ledger_lacks_changes_nothing(home: Home) -> None:
    budget = home.budget(dp={"max_participations": 1})
    old = home.copied()
    seen = spend(budget, 1)
    back = replace(budget, registry=old.registry, known=seen, last="")
    refused(lambda: spend(back, 2), old, behind=True)
    assert old.refusals() == [("budget.charge", DATA, "ledger_mismatch")]
    back.known = ""
    assert back.admit([bytes(15) + b"\2"]) == set()  # no use was noted
    spend(back, 2)


def test_a_refused_charge_does_not_make_a_run_fall_back(home: Home) -> None:
    dp = {"sampling": "client_poisson", "dataset_size": 100, "accountant_type": "rdp"}
    budget = home.budget(dp=dp)
    while home.entries()[-2]["type"] != "fall_back":
        old = home.copied()
        seen = spend(budget, *range(8))  # always the same rows: no sample, in the end
    back = replace(budget, registry=old.registry, known=seen, last="")
    refused(lambda: spend(back, *range(8)), old, behind=True)


def test_an_actor_sends_what_it_saw_itself(home: Home) -> None:
    budget = home.budget()
    old = home.copied()
    spend(budget, 1)
    assert not budget.known
    budget.registry = old.registry
    refused(lambda: spend(budget, 2), old, behind=True)


@pytest.mark.parametrize("place", ["", "1", "x-" + "0" * 64, "1-" + "0" * 63, "01-" + "0" * 64])
def test_what_is_no_place_is_refused(home: Home, place: str) -> None:
    budget = home.budget()
    with pytest.raises(IntegrityError, match="SEQ-HASH"):
        home.registry.ledgers.charge(
            US, DATA, budget.run_id, budget.epoch, "c" * 32, [b"u"], True, [], [place]
        )
    assert len(home.entries()) == 2


# --- what a head is --------------------------------------------------------------------------


def test_a_head_in_the_store_names_neither_data_set_nor_run(home: Home) -> None:
    budget = home.budget()
    spend(budget, 1)
    home.keep()
    files = [path for path in Path(home.root).rglob("*") if path.is_file()]
    assert len(files) == 1
    text = str(files[0]) + files[0].read_text()
    for name in (DATA, budget.run_id, "sigma", "epsilon", "charge"):
        assert name not in text.replace(home.root, "")


def test_the_folder_of_a_ledger_outlives_key_rotation_and_database(home: Home) -> None:
    name = home.registry.heads.ledger_name(US, DATA)
    home.registry.data_keys.rotate(US)
    home.budget()
    assert home.registry.heads.ledger_name(US, DATA) == name
    others = {
        home.registry.heads.ledger_name(US, "b"),
        home.registry.heads.ledger_name("b", DATA),
        name,
    }
    assert len(others) == 3


def test_every_changed_character_of_a_head_is_noticed(home: Home) -> None:
    home.budget()
    line = home.head()
    for at in range(len(line)):
        changed = line[:at] + chr(ord(line[at]) ^ 1) + line[at + 1 :]
        with pytest.raises(IntegrityError):
            home.registry.heads.meet_ledger(US, DATA, {}, [changed])
    home.registry.heads.meet_ledger(US, DATA, {}, [line])


@pytest.mark.parametrize(("tenant", "dataset"), [(US, "another"), ("another", DATA)])
def test_a_head_of_another_ledger_is_refused(home: Home, tenant: str, dataset: str) -> None:
    home.registry.ledgers.register(tenant, dataset, 8.0, 1e-5, "example")
    home.budget()
    moved = home.registry.heads.ledger_head(tenant, dataset, -1)
    for act in (
        lambda: home.registry.heads.meet_ledger(US, DATA, {}, [moved]),
        lambda: home.registry.heads.book_missing(US, DATA, [moved]),
    ):
        with pytest.raises(IntegrityError, match="another ledger"):
            act()


def test_a_head_by_another_key_is_refused_in_a_home_and_passed_over_in_the_store(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.budget()
    forged = replace(LedgerHead.parse(home.head()), seq=99).signed(new_signing_key())
    with pytest.raises(IntegrityError, match="signature"):
        home.meet(forged.line())
    ArtifactStore(home.root).write_ledger_head(US, forged.ledger, forged.place, forged.line())
    assert home.meet() == -1  # or no head before the 99th would be written any more
    assert f"{forged.place}.json in the artifact store is ignored" in caplog.text


def test_what_is_no_head_in_the_store_is_told_and_holds_up_nothing(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    budget = home.budget()
    old = home.copied()
    spend(budget, 1)
    home.registry.ledgers.register(US, "another", 8.0, 1e-5, "example")
    moved = LedgerHead.parse(home.registry.heads.ledger_head(US, "another", -1))
    folder = Path(home.root) / f"t/{US}/ledgers/{home.registry.heads.ledger_name(US, DATA)}"
    far, zeros = f"99-{'0' * 64}.json", "0" * 64
    junk = {"x.json": "{}", far: "\xff", f"{moved.place}.json": moved.line(),
            "f o.json": "", f"a/5-{zeros}.json": home.head()[:-9]}  # fmt: skip
    for name, line in junk.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(line)
    left = folder / f"7-{zeros}.json.0badf00d"  # by a killed write, on Azure
    left.touch()
    for act in (old.meet, old.book, home.meet):
        caplog.clear()
        assert act() in (-1, 0)
        assert all(f"{name} in the artifact store is ignored" in caplog.text for name in junk)
        assert left.name not in caplog.text
    home.keep()
    refused(old.meet, old, behind=True)  # a head among them binds still
    assert (home.meet(), old.book()) == (2, 1)


# --- beside training -------------------------------------------------------------------------


def keeper(home: Home) -> HeadKeeper:
    return HeadKeeper(home.registry, home.root, US, DATA, "tc-1@1")


def heads_in(home: Home) -> list[Path]:
    return sorted(Path(home.root).rglob("ledgers/*/*.json"))


def settled(of: HeadKeeper) -> None:
    of._writer.submit(lambda: None).result()


def charged(budget: Budget, unit: int) -> None:
    """Makes a charge, and waits for the work in the background that follows it."""
    assert budget.heads is not None
    spend(budget, unit)
    budget.heads.charged()
    settled(budget.heads)


def test_the_first_and_every_few_charges_leave_a_head(home: Home) -> None:
    assert home.registry.ledgers.datasets(US) == []
    empty = home.copied()
    budget, heads = home.budget(), keeper(home)
    counts = []
    for step in range(EVERY + 1):
        spend(budget, step)
        heads.charged()
        settled(heads)
        counts.append(len(heads_in(home)))
        assert LedgerHead.parse(heads.newest).place == budget.last
    assert counts == [1] * EVERY + [2]
    spend(budget, 99)
    heads.keep()
    heads.keep()  # nothing is new
    assert len(heads_in(home)) == 3
    again = keeper(home)
    again.keep()
    assert len(heads_in(home)) == 3
    assert empty.book() == EVERY + 2  # no head was replaced by one with fewer entries


def without_room_for_heads(home: Home) -> Path:
    """Puts a file where the folder of heads would be.

    The store accepts heads once the file is removed.
    """
    blocked = Path(home.root) / f"t/{US}/ledgers"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.touch()
    return blocked


def test_a_store_that_fails_holds_up_no_charge_and_gets_all_later(home: Home) -> None:
    assert home.registry.ledgers.datasets(US) == []
    empty = home.copied()
    budget, heads = home.budget(), keeper(home)
    blocked = without_room_for_heads(home)
    for step in range(EVERY + 1):
        spend(budget, step)
        heads.charged()
        settled(heads)
    assert "would not reveal an older database" in heads.problem
    assert LedgerHead.parse(heads.newest).place == budget.last  # for this home, all the same
    with pytest.raises(StorageError, match="training is not affected"):
        heads.keep()
    blocked.unlink()
    heads.keep()
    assert heads.problem == ""
    assert empty.book() == EVERY + 1  # the one head has all that the store missed


def test_results_do_not_grow_without_bound_while_the_store_fails(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.registry.head_keeper.MOST", 3)
    assert home.registry.ledgers.datasets(US) == []
    empty = home.copied()
    budget, heads = home.budget(), keeper(home)
    blocked = without_room_for_heads(home)
    budget.heads, carried = heads, []
    for step in range(EVERY):
        charged(budget, step)
        carried.append(len(home.registry.heads._entries(DATA, LedgerHead.parse(heads.newest))))
    assert carried == [3, 4, 4, 4, 4, 4, 4, 4]  # the charge, and those before it
    blocked.unlink()
    heads.keep()
    assert empty.book() == EVERY  # the store gets all


def test_a_store_that_does_not_answer_is_not_passed_over_at_the_start(home: Home) -> None:
    home.budget()
    Path(home.root).touch()
    with pytest.raises(StorageError):
        keeper(home)


def test_two_databases_in_use_at_once_are_noticed_while_both_train(home: Home) -> None:
    first, heads = home.budget(), keeper(home)
    other = home.copied()
    second = replace(first, registry=other.registry, heads=keeper(other))
    first.heads = heads
    for step in range(EVERY):  # alone at first: it cannot know
        charged(first, step)
    charged(second, 1)
    refused(lambda: spend(second, 2), other, behind=False)
    charged(first, EVERY)  # is due to write, and looks
    refused(lambda: spend(first, 9), home, behind=False)
    for of in (home, other):
        assert ("ledger.check", DATA, "ledger_mismatch") in of.refusals()
    heads.keep()  # what is paid for may be saved
    assert heads.problem == ""


def test_runs_of_one_database_do_not_refuse_each_other(home: Home) -> None:
    budgets = [home.budget(), home.budget()]
    for budget in budgets:
        budget.heads = keeper(home)
    for step in range(EVERY + 1):
        for budget in budgets:
            charged(budget, step)


# --- through the worker ----------------------------------------------------------------------


def worker(home: Home, model: Path, known: Registry | None = None, **values: Any) -> Worker:
    known = known or home.registry
    config = private_config(model, dp={"noise_multiplier": 4.0}, dataset_id=DATA, **values)
    run = known.runs.create(US, config.model_dump_json())
    epoch = known.runs.claim(run)
    place = Place(US, run, epoch, home.root, home.path, known.data_keys.capability(US, run, epoch))
    return Worker(place, config, known, lambda _: None)


def train(of: Worker) -> Any:
    of.forward_backward(lambda: None, rows(ROWS), None, True)
    return of.optim_step(lambda: None, True)


def save(of: Worker) -> str:
    saving = of.save_state(lambda: None, True, {})
    assert of.saver.outcome(saving) is not None
    return saving.artifact_id


def load(of: Worker, artifact: str) -> int:
    return of.load_state(lambda: None, artifact).step


def test_an_artifact_loads_while_the_ledger_goes_on(home: Home, tiny_model: Path) -> None:
    one = worker(home, tiny_model)
    train(one)
    saved = save(one)
    train(one)
    assert load(one, saved) == 1
    assert load(worker(home, tiny_model), saved) == 1


def test_an_artifact_newer_than_the_ledger_or_of_another_is_refused(
    home: Home, tiny_model: Path
) -> None:
    one = worker(home, tiny_model)
    train(one)
    other = home.copied()
    for _ in range(3):
        train(one)
    newer = save(one)
    for heads in ("ledgers", "audit"):  # only the artifact's are left
        shutil.rmtree(Path(home.root) / f"t/{US}/{heads}")
    manifest = ArtifactStore(home.root).read(US, newer, "manifest.json")
    run = one._place.run_id
    known = other.registry
    # As if it were known:
    known.artifacts.publish(US, run, one._place.epoch, newer, 2, 1, True, manifest, "k1")
    for behind in (True, False):
        two = worker(other, tiny_model, known)
        before, step = weights(two.session), two.session.step
        refused(lambda two=two: load(two, newer), other, behind)
        assert_equal(weights(two.session), before)
        assert (two.session.step, two.session.lineage.ledgers) == (step, {})
        for _ in range(3):
            train(two)  # then it is no longer behind
    assert ("artifact.load", newer, "ledger_mismatch") in other.refusals()


def test_a_ledger_of_the_same_name_of_another_tenant_is_another(home: Home) -> None:
    home.budget()
    known, place = home.registry, place_of(0, home.entries()[0]["hash"])
    known.heads.check_lineage(US, {DATA: place}, "art-1")
    known.ledgers.register("bank", DATA, 8.0, 1e-5, "example")
    with pytest.raises(LedgerMismatchError):
        known.heads.check_lineage("bank", {DATA: place}, "art-1")


def test_nothing_is_saved_whose_ledger_head_is_not_in_the_store(
    home: Home, tiny_model: Path
) -> None:
    one = worker(home, tiny_model)
    blocked = without_room_for_heads(home)
    train(one)
    settled(one.heads)  # type: ignore[arg-type]
    assert any("would not reveal an older database" in said for said in train(one).warnings)
    with pytest.raises(StorageError, match="head of the ledger"):
        save(one)
    assert home.registry.catalogue.find(US) == []
    blocked.unlink()
    save(one)
    assert train(one).warnings == ()


def test_an_older_database_is_refused_before_the_model_is_loaded(
    home: Home, tiny_model: Path
) -> None:
    one = worker(home, tiny_model)
    old = home.copied()
    train(one)
    save(one)
    with pytest.raises(RollbackError):
        worker(old, Path("no/such/model"))
    shutil.rmtree(Path(home.root) / f"t/{US}/audit")
    with pytest.raises(LedgerMismatchError):
        worker(old, Path("no/such/model"))


def test_a_database_that_trained_meanwhile_stops_the_next_step(
    home: Home, tiny_model: Path
) -> None:
    one = worker(home, tiny_model)
    other = home.copied()
    train(one)
    settled(one.heads)  # type: ignore[arg-type]
    budget = other.budget()
    spend(budget, 1)
    other.keep()
    saved = save(one)  # finds the other's head
    before, entries = weights(one.session), home.entries()
    with pytest.raises(LedgerMismatchError):
        train(one)
    assert_equal(weights(one.session), before)
    assert (home.entries(), one.session.step, one.broken) == (entries, 1, False)
    assert load(one, saved) == 1


def test_a_step_with_a_head_that_the_ledger_lacks_moves_no_weight(
    home: Path, tiny_model: Path
) -> None:
    one = worker(home, tiny_model)
    train(one)
    before, entries = weights(one.session), home.entries()
    one.forward_backward(lambda: None, rows(ROWS), None, True)
    request = Request("r", "optim_step", 1, "h", 0, {"apply_dp_noise": True}, place_of(9, "0" * 64))
    with pytest.raises(LedgerMismatchError):
        one.run(request, lambda: None)
    assert_equal(weights(one.session), before)
    assert (home.entries(), one.session.step) == (entries, 1)
    one.forward_backward(lambda: None, rows(ROWS), None, True)
    result = one.run(replace(request, ledger=place_of(2, entries[2]["hash"])), lambda: None)
    assert result.step == 2


# --- booking ---------------------------------------------------------------------------------


def test_missing_charges_are_booked_as_they_were_and_their_runs_end(home: Home) -> None:
    first, second = home.budget(), home.budget()
    spend(first, 1)
    spend(second, 1)
    copies = []
    for _ in range(4):
        copies.append(home.copied())
        spend(first, 1)
        home.keep()
    spend(first, 2, 3)
    tail = home.head(after=len(home.entries()) - 2)  # newer than what the store has
    true = home.entries()
    for lost, old in zip((5, 4, 3, 2), copies, strict=True):
        assert old.book(tail) == lost
        *restored, booking = old.entries()
        assert restored == true
        assert booking["runs"] == [first.run_id]
        ledger = Ledger.replay(old.entries())
        assert ledger.epsilon == Ledger.replay(true).epsilon
        old.meet(tail)
        assert old.book(tail) == 0
        assert len(old.entries()) == len(true) + 1
        ended = replace(first, registry=old.registry)
        for act in (lambda b=ended: spend(b, 7), lambda b=ended: b.admit([b"7"])):
            with pytest.raises(DPBudgetExceededError, match="new client"):
                act()
        spend(replace(second, registry=old.registry, last=""), 5)  # none of its charges was lost
        spend(old.budget(), 7)


def test_what_is_booked_counts_against_the_budget(home: Home) -> None:
    budget = home.budget(dp={"noise_multiplier": 1.0})
    old = home.copied()
    spend(budget, 1)
    spend(budget, 1)
    home.keep()
    old.book()
    with pytest.raises(DPBudgetExceededError, match="cannot pay"):
        spend(old.budget(dp={"noise_multiplier": 1.0}), 2)


def test_a_lost_data_set_is_booked_from_its_registration_on(home: Home) -> None:
    home.registry.ledgers.datasets(US)
    empty = home.copied()
    spend(home.budget(), 1)
    home.keep()
    assert empty.book() == 1
    assert empty.entries()[:-1] == home.entries()
    spend(empty.budget(), 1)


def test_a_reservation_that_was_lost_is_booked_as_free(home: Home) -> None:
    home.registry.ledgers.register(US, DATA, 8.0, 1e-5, "example")
    old = home.copied()
    plan = {"noise_multiplier": 2.0, "max_participations": 6}
    spend(home.budget(dp=plan), 1)
    home.keep()
    old.book()
    old.budget(dp=plan)  # beside six that stayed reserved it would not fit


def test_nothing_is_booked_where_an_entry_is_in_no_head(home: Home) -> None:
    budget = home.budget()
    old = home.copied()
    spend(budget, 1)
    spend(budget, 2)
    gap = home.head(after=len(home.entries()) - 2)
    refused(
        lambda: old.book(gap), old, behind=True, says="remaining heads do not contain all entries"
    )
    assert ("budget.book", DATA, "ledger_mismatch") in old.refusals()


def test_nothing_is_booked_where_two_databases_went_on(home: Home) -> None:
    budget = home.budget()
    old = home.copied()
    spend(budget, 1)
    home.keep()
    apart = replace(budget, registry=old.registry, last="")
    spend(apart, 1)
    refused(old.book, old, behind=False, says="nothing can join them")
    lines = [home.head(), old.head()]
    for of in (home, old):
        refused(lambda of=of: of.book(*lines), of, behind=False, says="nothing can join")


# --- what a home keeps -----------------------------------------------------------------------


def test_a_home_keeps_the_newest_head_for_the_next_process(home: Home) -> None:
    budget = home.budget()
    older = home.head()
    spend(budget, 1)
    newer = home.head()
    kept = KeptHead(home.path, US, DATA)
    assert (kept.place, kept.lines) == ("", [])
    kept.saw(newer)
    kept.saw(older)  # an answer that was taken late
    assert kept.place == budget.last
    again = KeptHead(home.path, US, DATA)
    assert again.lines == [newer]
    assert KeptHead(home.path, US, "another").lines == []
    assert KeptHead(home.path, "another", DATA).lines == []


def test_two_clients_of_a_data_set_never_put_an_older_head_back(home: Home) -> None:
    budget = home.budget()
    one, two = KeptHead(home.path, US, DATA), KeptHead(home.path, US, DATA)
    spend(budget, 1)
    older = home.head()
    spend(budget, 2)
    one.saw(newer := home.head())
    two.saw(older)
    assert two.lines == KeptHead(home.path, US, DATA).lines == [newer]
    spend(budget, 3)
    two.saw(newest := home.head())
    assert KeptHead(home.path, US, DATA).lines == [newest]


def test_clients_that_keep_heads_at_once_end_with_the_newest(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = home.budget()
    lines = []
    for step in range(2):
        spend(budget, step)
        lines.append(home.head())
    read = KeptHead._read
    clients = [KeptHead(home.path, US, DATA) for _ in lines]
    both = threading.Barrier(2)

    def slow(of: KeptHead) -> LedgerHead | None:
        found = read(of)
        with suppress(threading.BrokenBarrierError):  # they only meet here without a lock
            both.wait(0.5)
        return found

    def late(path: Path, line: str) -> None:
        if line == lines[0]:
            time.sleep(0.3)
        keep_line(path, line)

    monkeypatch.setattr(KeptHead, "_read", slow)
    monkeypatch.setattr("tg_tinker.records.files.keep_line", late)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda client, line: client.saw(line), clients, lines))
    monkeypatch.undo()
    assert KeptHead(home.path, US, DATA).lines == [lines[1]]
    folder = home.path / f"ledger-heads/{US}"
    assert sorted(file.name for file in folder.iterdir()) == [f".{DATA}.json.lock", f"{DATA}.json"]


def test_threads_that_keep_lines_in_one_file_share_no_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partials, replaced = [], Path.replace

    def noted(partial: Path, target: Path) -> Path:
        partials.append(partial)
        return replaced(partial, target)

    monkeypatch.setattr(Path, "replace", noted)
    for line in ("a", "b"):
        keep_line(tmp_path / "head", line)
    assert len(set(partials)) == 2
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        keep_line(tmp_path / "folder", "c")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "head"]


def test_a_kept_head_that_was_damaged_is_not_passed_over(home: Home) -> None:
    budget = home.budget()
    kept = KeptHead(home.path, US, DATA)
    kept.saw(home.head())
    file = next((home.path / "ledger-heads").rglob("*.json"))
    for damaged in (b"", b"{}", file.read_bytes()[:-9], b"\xff"):
        file.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            KeptHead(home.path, US, DATA)
    spend(budget, 1)
    kept.saw(home.head())  # loses no result, and does not write over what it cannot read
    assert file.read_bytes() == b"\xff"
    assert kept.place == budget.last


def test_a_home_that_cannot_be_written_loses_no_result(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.budget()
    kept = KeptHead(home.path, US, DATA)
    (home.path / "ledger-heads").touch()
    kept.saw(line := home.head())
    assert kept.lines == [line]  # this process goes on with it
    assert "cannot keep" in caplog.text
    with pytest.raises(StorageError):
        KeptHead(home.path, US, DATA)


def test_check_names_the_data_set_whose_ledger_is_behind(home: Home) -> None:
    budget = home.budget()
    old = home.copied()
    spend(budget, 1)
    home.keep()
    found = restore.check(old.registry, home.root, US, home.path)
    assert ([*found.ledgers], found.sound) == ([DATA], False)
    assert restore.check(home.registry, home.root, US, home.path).ledgers == {}


def test_a_head_of_another_tenant_s_ledger_is_no_loss(home: Home) -> None:
    home.registry.ledgers.register("bank", DATA, 8.0, 1e-5, "example")
    line = home.registry.heads.ledger_head("bank", DATA, -1)
    name = home.registry.heads.ledger_name("bank", DATA)
    assert home.registry.heads.lost_ledgers(US, [line]) == []
    assert home.registry.heads.lost_ledgers("bank", [line]) == [name]
