"""Tests the audit log in the registry: each event leaves its row, together with its change."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from actors.registry import request_rows
from actors.registry.registry import Registry
from actors.storage import signing
from actors.storage.home import DATABASE, KEYRING, STORE, create
from actors.storage.key_providers import FileKeyring
from support.audit import CONFIG, THEM, TIME, US, open_registry, rows_of, seen
from support.audit import place as place  # a fixture
from support.audit import registry as registry  # a fixture
from support.audit import run as run  # a fixture
from tg_tinker import (
    AccessDeniedError,
    ActorLostError,
    DPBudgetExceededError,
    DPConfig,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    TrainingConfig,
)
from tg_tinker.records.audit_log import (
    GENESIS,
    AuditRow,
)
from tg_tinker.storage.envelope import new_signing_key

# --- the registry --------------------------------------------------------------------------------


def test_the_life_of_a_run_leaves_its_rows(registry: Registry, run: str) -> None:
    epoch = registry.runs.claim(run)
    registry.runs.record(run, epoch, 1, "active", [("batch", "gradient")])
    registry.runs.record(run, epoch, 2, "completed", [("batch", "gradient")])
    registry.runs.record(run, epoch, 1, "active")  # load_state
    registry.runs.finish(run, epoch, "completed")
    registry.runs.finish(run, epoch, "failed")  # of an actor that was replaced: nothing happened
    again = registry.runs.claim(run)
    registry.runs.finish(run, again, "failed")
    mine = f"{run}@{epoch}"
    assert seen(registry) == [
        ("sdk", "run.create", run, "ok"),
        ("sdk", "run.claim", run, "ok"),
        (mine, "step", run, "ok"),
        (mine, "step", run, "ok"),
        (mine, "run.complete", run, "ok"),
        (mine, "run.resume", run, "ok"),
        ("sdk", "run.complete", run, "ok"),
        ("sdk", "run.claim", run, "ok"),
        ("sdk", "run.fail", run, "ok"),
    ]


def hkdf(key: bytes, info: bytes) -> bytes:
    """Returns the key by RFC 5869 with SHA-256, no salt and one block."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_a_step_shows_hmacs_under_the_key_of_its_run_and_no_hash(
    registry: Registry, place: Path, run: str
) -> None:
    calls = [("sha256:" + "a" * 64, "sha256:" + "b" * 64), ("my own name", "")]
    registry.runs.record(run, registry.runs.claim(run), 1, "active", calls)
    other = registry.runs.create(US, CONFIG)
    registry.runs.record(other, registry.runs.claim(other), 1, "active", calls)
    found = [row for row in rows_of(registry) if row.event == "step"]
    tenant_key = FileKeyring(place / KEYRING)._keys.by_id["k1"]
    key = hkdf(tenant_key, f"tg-tinker audit hashes v1\n{run}".encode())

    def expected(*messages: str) -> str:
        return " ".join(hmac.new(key, m.encode(), "sha256").hexdigest() for m in messages)

    assert found[0].details == {
        "step": 1, "calls": 2, "key": "k1",
        "batches": expected("batches\nsha256:" + "a" * 64, "batches\nmy own name"),
        "gradients": expected("gradients\nsha256:" + "b" * 64),
    }  # fmt: skip
    assert found[1].details["batches"] != found[0].details["batches"]
    stored = (place / DATABASE).read_bytes() + (place / f"{DATABASE}-wal").read_bytes()
    for secret in ("a" * 64, "b" * 64, "my own name"):
        assert secret.encode() not in stored


def test_an_actor_that_was_replaced_leaves_refusals_only(registry: Registry, run: str) -> None:
    old, _ = registry.runs.claim(run), registry.runs.claim(run)
    registry.runs.record(run, old, 1, "active", [("batch", "gradient")])
    registry.runs.record(run, old, 1, "active")
    with pytest.raises(ActorLostError):
        registry.artifacts.publish(US, run, old, "art-1", 1, 10, True, b"{}", "k1")
    assert seen(registry)[3:] == [
        (f"{run}@{old}", "step", run, "actor_lost"),
        (f"{run}@{old}", "artifact.save", "art-1", "actor_lost"),
    ]


def test_the_life_of_an_artifact_leaves_its_rows(registry: Registry, run: str) -> None:
    epoch = registry.runs.claim(run)
    actor = registry.data_keys.capability(US, run, epoch)
    _, wrapped = registry.data_keys.new(actor, "art-1", STORE)
    registry.artifacts.publish(US, run, epoch, "art-1", 3, 10, True, b"{}", "k1")
    registry.data_keys.open(actor, "art-1", wrapped, STORE)
    with pytest.raises(IntegrityError):
        registry.data_keys.open(registry.data_keys.reader(US), "art-1", b"damaged", STORE)
    registry.audit_log.record_export(US, "art-1")
    registry.artifacts.delete(US, "art-1")
    with pytest.raises(NotFoundError):
        registry.data_keys.open(registry.data_keys.reader(US), "art-1", wrapped, STORE)
    mine = f"{run}@{epoch}"
    assert seen(registry)[2:] == [
        (mine, "artifact.save", "art-1", "ok"),
        (mine, "artifact.load", "art-1", "ok"),
        ("sdk", "artifact.load", "art-1", "integrity"),
        ("sdk", "artifact.export", "art-1", "ok"),
        ("sdk", "artifact.delete", "art-1", "ok"),
    ]
    saved = rows_of(registry)[2].details
    assert saved == {"step": 3, "size_bytes": 10, "manifest": hashlib.sha256(b"{}").hexdigest()}


def test_keys_leave_their_rows_and_never_their_secret(registry: Registry, place: Path) -> None:
    token, info = registry.api_keys.create(US, "the label", ["art-1"], 1)
    registry.api_keys.check(token, THEM)
    registry.api_keys.revoke(US, info.key_id)
    with pytest.raises(NotFoundError):
        registry.api_keys.revoke(US, "what was passed by mistake")
    with pytest.raises(AccessDeniedError):
        registry.api_keys.check(token, THEM)
    with pytest.raises(AccessDeniedError):
        registry.api_keys.check("tgt-unheard-of", THEM)
    assert seen(registry) == [
        ("sdk", "api_key.create", info.key_id, "ok"),
        ("sdk", "api_key.revoke", info.key_id, "ok"),
        (f"api-key {info.key_id}", "api_key.check", info.key_id, "access_denied"),
    ]
    assert seen(registry, THEM) == [("anyone", "api_key.check", "", "access_denied")]
    text = "".join(registry.audit_log.rows(US, 0, 100) + registry.audit_log.rows(THEM, 0, 100))
    for secret in (token.split("-", 2)[2], "unheard", "the label", "mistake"):
        assert secret not in text


def test_a_wrong_secret_blames_nobody(registry: Registry) -> None:
    token, info = registry.api_keys.create(US, "", [], 1)
    for wrong in (f"tgt-{info.key_id}-guessed", f"tgt-{info.key_id}", f"{token}x"):
        with pytest.raises(AccessDeniedError):
            registry.api_keys.check(wrong, THEM)
    registry.api_keys.revoke(US, info.key_id)
    with pytest.raises(AccessDeniedError):
        registry.api_keys.check(f"tgt-{info.key_id}-guessed", THEM)
    rows = [row for row in seen(registry) if row[1] == "api_key.check"]
    assert rows == [("anyone", "api_key.check", info.key_id, "access_denied")]
    assert seen(registry, THEM) == []


def test_a_flood_of_denied_keys_is_counted_not_written(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(request_rows.time, "monotonic", lambda: now[0])

    def deny(times: int) -> None:
        for number in range(times):
            with pytest.raises(AccessDeniedError):
                registry.api_keys.check(f"tgt-{number}-x", US)

    deny(100)
    registry.audit_log.settle()  # as the process does a moment after the answer
    now[0] += 59
    deny(100)
    assert [row.details for row in rows_of(registry)] == [{}]
    now[0] += 2
    deny(5)
    assert [row.details for row in rows_of(registry)] == [{}, {"more": 199}, {}]


def test_budget_rows_are_the_entries_of_the_ledger(registry: Registry, run: str) -> None:
    from actors.privacy.plan import plan_run
    from tg_tinker.records.ledger import Ledger

    epoch, dp = registry.runs.claim(run), DPConfig(noise_multiplier=1.0, max_participations=2)
    registry.ledgers.register(US, "patients", 8.0, 1e-5, "example")
    registry.ledgers.register(US, "patients", 8.0, 1e-5, "example")  # changes nothing
    with pytest.raises(InvalidRequestError):
        registry.ledgers.register(US, "patients", 9.0, 1e-5, "example")
    config = TrainingConfig(model_ref="some/model", dp_config=dp, dataset_id="patients")
    plan = plan_run(dp, config, Ledger.replay(registry.ledgers.entries(US, "patients")))
    registry.ledgers.open_account(US, "patients", plan.entry(run))
    unit = [b"u" * 32]
    charge = lambda name: registry.ledgers.charge(US, "patients", run, epoch, name, unit, True, [])  # noqa: E731
    charge("c1")
    charge("c1")  # a repeat is not another charge
    charge("c2")
    with pytest.raises(DPBudgetExceededError):
        charge("c3")
    with pytest.raises(DPBudgetExceededError):
        registry.ledgers.admit(US, "patients", run, unit)  # the same refusal, within a minute
    with pytest.raises(ActorLostError):
        registry.ledgers.charge(US, "patients", run, epoch - 1, "c4", unit, True, [])
    registry.ledgers.link(US, "patients", run, ["visits"])
    mine = f"{run}@{epoch}"
    assert seen(registry)[2:] == [
        ("sdk", "dataset.register", "patients", "ok"),
        ("sdk", "dataset.register", "patients", "invalid_request"),
        (mine, "budget.reserve", "patients", "ok"),
        (mine, "budget.charge", "patients", "ok"),
        (mine, "budget.charge", "patients", "ok"),
        (mine, "budget.charge", "patients", "dp_budget_exceeded"),
        (f"{run}@{epoch - 1}", "budget.charge", "patients", "actor_lost"),
        (mine, "budget.link", "patients", "ok"),
    ]
    noted = [(row.details["entry"], row.details["head"]) for row in rows_of(registry)[2:]
             if row.outcome == "ok"]  # fmt: skip
    entries = registry.ledgers.entries(US, "patients")
    assert noted == [(entry["seq"], entry["hash"]) for entry in entries]


def test_a_reservation_that_is_given_back_leaves_its_row(registry: Registry, run: str) -> None:
    from actors.privacy.plan import plan_run
    from tg_tinker.records.ledger import Ledger

    dp = DPConfig(noise_multiplier=2.0, sampling="worst_case")
    registry.runs.claim(run)
    registry.ledgers.register(US, "patients", 8.0, 1e-5, "example")
    config = TrainingConfig(model_ref="m", dp_config=dp, dataset_id="patients", max_steps=3)
    plan = plan_run(dp, config, Ledger.replay(registry.ledgers.entries(US, "patients")))
    registry.ledgers.open_account(US, "patients", plan.entry(run))
    registry.ledgers.release(US, "patients", run)
    registry.ledgers.release(US, "patients", run)  # nothing is left to give back
    assert [row.event for row in rows_of(registry)][-2:] == ["budget.reserve", "budget.release"]


def test_a_sample_counts_and_names_no_text(registry: Registry, run: str) -> None:
    registry.audit_log.record_sample(None, "sdk", f"{run}@7", 2, 30, "ok")
    registry.audit_log.record_sample(US, "api-key 12", "base", 1, 4, "cancelled")
    first, second = rows_of(registry)[1:]
    assert (first.subject, first.details) == (run, {"prompts": 2, "tokens": 30, "step": 7})
    assert (second.who, second.subject, second.outcome) == ("api-key 12", "base", "cancelled")


def test_each_tenant_has_a_chain_of_its_own(registry: Registry) -> None:
    for tenant in (US, THEM, US):
        registry.runs.create(tenant, CONFIG)
    assert [row.seq for row in rows_of(registry, US)] == [1, 2]
    assert [row.seq for row in rows_of(registry, THEM)] == [1]
    assert rows_of(registry, THEM)[0].previous == GENESIS
    nobody = registry.audit_log.head("nobody")
    assert (nobody.seq, nobody.hash) == (0, GENESIS)


def test_pages_follow_each_other(registry: Registry) -> None:
    for _ in range(7):
        registry.runs.create(US, CONFIG)
    pages = [registry.audit_log.rows(US, since, 3) for since in (0, 3, 6, 7)]
    assert [[AuditRow.parse(line).seq for line in page] for page in pages] == [
        [1, 2, 3], [4, 5, 6], [7], [],
    ]  # fmt: skip


# --- together or not at all ----------------------------------------------------------------------


def test_a_change_that_fails_leaves_no_row(registry: Registry, run: str) -> None:
    epoch = registry.runs.claim(run)
    registry.artifacts.publish(US, run, epoch, "art-1", 1, 10, True, b"{}", "k1")
    before = seen(registry)
    registry.artifacts.publish(US, run, epoch, "art-1", 1, 10, True, b"{}", "k1")  # a repeat
    with pytest.raises(sa.exc.IntegrityError):  # the id is taken
        registry.artifacts.publish(US, run, epoch, "art-1", 1, 10, True, b"{ }", "k1")
    assert seen(registry) == before


class FullDisk(Registry):
    """A registry that can do everything except record an event."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

        def full(*arguments: Any, **values: Any) -> None:
            raise StorageError("the disk is full")

        self.audit_log._writer.note = full  # type: ignore[method-assign]


def changes(registry: Registry, run: str, wrapped: bytes) -> dict[str, Callable[[], object]]:
    return {
        "create_run": lambda: registry.runs.create(US, CONFIG),
        "claim": lambda: registry.runs.claim(run),
        "record": lambda: registry.runs.record(run, 1, 9, "active", []),
        "finish": lambda: registry.runs.finish(run, 1, "failed"),
        "publish": lambda: registry.artifacts.publish(
            US, run, 1, "art-2", 1, 10, True, b"{}", "k1"
        ),
        "delete_artifact": lambda: registry.artifacts.delete(US, "art-1"),
        "open_data_key": lambda: registry.data_keys.open(
            registry.data_keys.reader(US), "art-1", wrapped, STORE
        ),
        "create_api_key": lambda: registry.api_keys.create(US, "", [], 1),
        "register_dataset": lambda: registry.ledgers.register(US, "d", 8.0, 1e-5, "example"),
    }


def everything(place: Path) -> list[str]:
    with closing(sqlite3.connect(place / DATABASE)) as database:
        return list(database.iterdump())


@pytest.mark.parametrize("name", changes(None, "", b""))  # type: ignore[arg-type]
def test_a_change_that_cannot_be_noted_does_not_happen(place: Path, name: str) -> None:
    registry = open_registry(place)
    run = registry.runs.create(US, CONFIG)
    epoch = registry.runs.claim(run)
    _, wrapped = registry.data_keys.new(
        registry.data_keys.capability(US, run, epoch), "art-1", STORE
    )
    registry.artifacts.publish(US, run, epoch, "art-1", 1, 10, True, b"{}", "k1")
    before = everything(place)
    with pytest.raises(StorageError, match="disk is full"):
        changes(open_registry(place, FullDisk), run, wrapped)[name]()
    assert everything(place) == before
    changes(registry, run, wrapped)[name]()
    assert everything(place) != before


def test_two_writers_cannot_fork_the_chain(place: Path) -> None:
    writers = [open_registry(place) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(writers[number % 4].runs.create, US, CONFIG) for number in range(80)]
        created = {one.result() for one in done}
    assert {row.subject for row in rows_of(writers[0])} == created
    assert len(rows_of(writers[0])) == 80


def test_a_row_number_is_given_once_whatever_the_program_does(place: Path, run: str) -> None:
    with (
        closing(sqlite3.connect(place / DATABASE)) as database,
        pytest.raises(sqlite3.IntegrityError),
    ):
        database.execute("INSERT INTO audit_rows SELECT * FROM audit_rows")


# --- the signing key -----------------------------------------------------------------------------


def test_heads_are_signed_by_the_pinned_key(registry: Registry, place: Path, run: str) -> None:
    head = registry.audit_log.head(US)
    assert (head.tenant, head.seq, head.hash) == (US, 1, rows_of(registry)[0].hash)
    head.check((place / "audit.pub").read_bytes())
    for wrong in (
        replace(head, seq=2), replace(head, hash="0" * 64), replace(head, tenant=THEM),
        replace(head, time=TIME), replace(head, signature="0" * 128),
    ):  # fmt: skip
        with pytest.raises(IntegrityError, match=f"head {wrong.seq} .*signature"):
            wrong.check((place / "audit.pub").read_bytes())


def test_a_registry_with_another_key_than_the_pinned_one_does_not_start(place: Path) -> None:
    (place / "audit.key").write_bytes(new_signing_key())
    with pytest.raises(IntegrityError, match="not the key that was pinned"):
        open_registry(place)


@pytest.mark.parametrize("name", ["audit.key", "audit.pub"])
def test_a_lost_key_is_named_and_never_made_anew(place: Path, name: str) -> None:
    (place / name).unlink()
    (place / DATABASE).write_bytes(b"runs")
    assert not create(place)
    with pytest.raises(StorageError, match=rf"{name}.*backup"):
        open_registry(place)


def test_a_signing_key_that_others_may_read_or_that_is_damaged_is_refused(place: Path) -> None:
    key = (place / "audit.key").read_text()
    (place / "audit.key").chmod(0o640)
    with pytest.raises(StorageError, match="mode 0640"):
        signing.load(place)
    (place / "audit.key").chmod(0o600)
    for damage in ("", key[:60], key.replace("PRIVATE", "PUBLIC")):
        (place / "audit.key").write_text(damage)
        with pytest.raises(IntegrityError, match="signing key is damaged"):
            signing.load(place)
