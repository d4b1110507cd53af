"""The audit log: what its chain and heads prove, and that each event really leaves its row."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import free_port
from typer.testing import CliRunner

from actors import audit_heads, audit_log, signing
from actors.home import DATABASE, KEYRING, STORE, create
from actors.keys import FileKeyring
from actors.registry import Registry
from tg_tinker import (
    AccessDeniedError,
    ActorLostError,
    DPBudgetExceededError,
    DPConfig,
    IntegrityError,
    InvalidRequestError,
    LoRAConfig,
    NotFoundError,
    ServiceClient,
    StorageError,
    TrainingConfig,
)
from tg_tinker.audit_files import read_head, read_public_key, read_rows, verify_export, write_export
from tg_tinker.audit_log import (
    GENESIS,
    AuditHead,
    AuditRow,
    chained,
    empty,
    verify,
)
from tg_tinker.cli import main
from tg_tinker.envelope import new_signing_key
from tg_tinker.wire import Request

VECTORS = Path(__file__).parent / "vectors" / "audit"
EXPECTED: dict[str, str] = json.loads((VECTORS / "expected.json").read_text())
PUBLIC_KEY = (VECTORS / "audit.pub").read_bytes()
US, THEM = "clinic", "bank"
CONFIG = TrainingConfig(model_ref="some/model").model_dump_json()
TIME = "2026-05-01T10:00:00.000000+00:00"


def vector(name: str) -> Path:
    return VECTORS / f"{name}.jsonl"


def good() -> list[AuditRow]:
    return list(read_rows(vector("good")))


# --- the format, recomputed without our code -----------------------------------------------------


def test_every_hash_is_that_of_the_line_without_it() -> None:
    *rows, _ = vector("good").read_text().splitlines()
    previous = "0" * 64
    for number, line in enumerate(rows, 1):
        (stated,) = re.findall(r'"hash":"([0-9a-f]{64})",', line)
        body = line.replace(f'"hash":"{stated}",', "")
        assert hashlib.sha256(body.encode("ascii")).hexdigest() == stated
        assert f'"previous":"{previous}","seq":{number},' in line
        previous = stated


def test_the_signature_is_of_the_domain_and_the_head_without_it() -> None:
    line = vector("good").read_text().splitlines()[-1]
    (signature,) = re.findall(r'"signature":"([0-9a-f]{128})",', line)
    message = "tg-tinker audit head v1\n" + line.replace(f'"signature":"{signature}",', "")
    public_key: Any = load_pem_public_key(PUBLIC_KEY)
    public_key.verify(bytes.fromhex(signature), message.encode("ascii"))


def test_rows_are_written_as_they_were_read() -> None:
    *lines, head = vector("good").read_text().splitlines()
    assert [row.line() for row in good()] == lines
    assert read_head(vector("good")).line() == head


def test_our_own_rows_continue_the_frozen_ones() -> None:
    rows = good()
    for before, row in zip([None, *rows], rows, strict=False):
        again = chained(
            before, time=row.time, tenant=row.tenant, who=row.who, event=row.event,
            subject=row.subject, outcome=row.outcome, details=row.details,
        )  # fmt: skip
        assert again == row


# --- frozen tampering ----------------------------------------------------------------------------


def test_no_vector_is_left_out() -> None:
    assert {path.stem for path in VECTORS.glob("*.jsonl")} == {*EXPECTED, "early_head"}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_vector_is_judged_as_expected(name: str) -> None:
    if not EXPECTED[name]:
        assert verify_export(vector(name), PUBLIC_KEY).seq == {"good": 7, "empty": 0}[name]
        return
    with pytest.raises(IntegrityError, match=EXPECTED[name]):
        verify_export(vector(name), PUBLIC_KEY)


def test_a_log_is_consistent_since_the_head_that_was_kept() -> None:
    early = read_head(vector("early_head"))
    found = verify_export(vector("good"), PUBLIC_KEY, early)
    assert found.since == early
    assert str(found) == f"7 rows, head {found.hash}: consistent since head 3 of {early.time}"
    assert "no earlier head" in str(verify_export(vector("good"), PUBLIC_KEY))


def test_a_log_that_was_rewritten_and_signed_anew_fits_no_head_kept_before() -> None:
    """The operator has the key: only an earlier head, in other hands, tells."""
    rows = good()
    changed = [rows[0], rechained(rows[0], replace(rows[1], who="somebody"))]
    for row in rows[2:]:
        changed.append(rechained(changed[-1], row))
    assert verify(changed).signed(new_signing_key()).seq == 7
    with pytest.raises(IntegrityError, match="forked: row 3"):
        verify(changed, known=[read_head(vector("early_head"))])


def rechained(before: AuditRow | None, row: AuditRow) -> AuditRow:
    return chained(
        before, time=row.time, tenant=row.tenant, who=row.who, event=row.event,
        subject=row.subject, outcome=row.outcome, details=row.details,
    )  # fmt: skip


# --- the rules -----------------------------------------------------------------------------------


def head_of(row: AuditRow) -> AuditHead:
    return AuditHead(row.tenant, row.seq, row.hash, row.time)


@pytest.mark.parametrize("at", range(8))
def test_the_rest_of_a_log_is_verified_from_any_head(at: int) -> None:
    rows = good()
    start = head_of(rows[at - 1]) if at else empty("clinic")
    found = verify(rows[at:], since=start)
    assert (found.seq, found.hash) == (7, rows[-1].hash)
    assert found.since == (start if at else None)
    for wrong in (at - 1, at + 1):
        if 0 <= wrong < 7:
            with pytest.raises(IntegrityError, match=rf"row {at + 1} .* is row {wrong + 1}"):
                verify(rows[wrong:], since=start)


def test_the_oldest_known_head_is_named() -> None:
    rows = good()
    known = [head_of(rows[4]), head_of(rows[1]), head_of(rows[6])]
    assert verify(rows, known=known).since == known[1]


def test_known_heads_that_contradict_each_other_are_a_fork() -> None:
    head = head_of(good()[3])
    with pytest.raises(IntegrityError, match="forked: row 4"):
        verify(good(), known=[head, replace(head, hash="f" * 64)])
    with pytest.raises(IntegrityError, match="different tenants"):
        verify(good(), known=[head, replace(head_of(good()[1]), tenant=THEM)])


def test_a_head_of_the_empty_log_is_the_genesis_alone() -> None:
    with pytest.raises(IntegrityError, match="forked: row 0"):
        verify(good(), known=[AuditHead("clinic", 0, "f" * 64, TIME)])
    assert verify([], since=empty("clinic")) == empty("clinic")


def test_a_known_head_beyond_the_end_is_a_truncation() -> None:
    head = head_of(good()[5])
    for end in range(6):
        with pytest.raises(IntegrityError, match=rf"ends at row {end}, a head of row 6"):
            verify(good()[:end], known=[head])


@pytest.mark.parametrize("wrong", [1.5, True, None, [1], {"a": 1}, b"x"])
def test_nothing_but_texts_and_whole_numbers_enters_a_row(wrong: Any) -> None:
    with pytest.raises(ValueError, match="texts and whole numbers"):
        chained(None, time=TIME, tenant=US, who="sdk", event="e", subject="s", outcome="ok",
                details={"a": wrong})  # fmt: skip


# --- random edits --------------------------------------------------------------------------------


@st.composite
def edited_rows(draw: st.DrawFn) -> list[AuditRow]:
    """The good rows after one edit; hashes of what follows made anew in half of the cases."""
    rows, at = good(), draw(st.integers(0, 6))
    kind = draw(st.sampled_from(["change", "drop", "repeat", "swap", "cut"]))
    if kind == "change":
        name = draw(st.sampled_from(["who", "event", "subject", "outcome", "details", "time"]))
        value: Any = draw(st.text(max_size=5))
        value = {"x": value} if name == "details" else TIME if name == "time" else value
        rows[at] = replace(rows[at], **{name: value})
    elif kind == "swap":
        other = draw(st.integers(0, 6))
        rows[at], rows[other] = rows[other], rows[at]
    elif kind == "cut":
        rows = rows[:at]
    else:
        rows[at : at + 1] = [] if kind == "drop" else [rows[at]] * 2
    if draw(st.booleans()):
        made: list[AuditRow] = []
        for row in rows:
            made.append(rechained(made[-1] if made else None, row))
        rows = made
    return rows


@given(edited_rows())
def test_any_edit_is_noticed_by_whoever_has_the_head(rows: list[AuditRow]) -> None:
    if rows[:7] == good():  # nothing changed, or a row was rightly appended
        return
    with pytest.raises(IntegrityError):
        verify(rows, known=[head_of(good()[-1])])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.integers(0, 3000), st.sampled_from(["delete", "insert", "replace"]), st.binary(max_size=3)
)
def test_any_edit_of_the_bytes_of_an_export_is_refused(
    tmp_path: Path, at: int, how: str, new: bytes
) -> None:
    whole = vector("good").read_bytes()
    at %= len(whole)
    old = {"delete": len(new), "insert": 0, "replace": len(new)}[how]
    edited = whole[:at] + (b"" if how == "delete" else new) + whole[at + old :]
    (tmp_path / "edited").write_bytes(edited)
    if edited != whole:
        with pytest.raises(IntegrityError):
            verify_export(tmp_path / "edited", PUBLIC_KEY)


# --- the registry --------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    create(tmp_path / "home")
    return tmp_path / "home"


def open_registry(place: Path, kind: type[Registry] = Registry) -> Registry:
    """One that has met a store without heads."""
    registry = kind(f"sqlite:///{place / DATABASE}", place / KEYRING)
    registry.meet_store(US, STORE, {})
    return registry


@pytest.fixture
def registry(place: Path) -> Registry:
    return open_registry(place)


@pytest.fixture
def run(registry: Registry) -> str:
    return registry.create_run(US, CONFIG)


def rows_of(registry: Registry, tenant: str = US) -> list[AuditRow]:
    """All rows, verified."""
    rows = [AuditRow.parse(line) for line in registry.audit_rows(tenant, 0, 10_000)]
    verify(rows, since=empty(tenant))
    return rows


def seen(registry: Registry, tenant: str = US) -> list[tuple[str, str, str, str]]:
    return [(row.who, row.event, row.subject, row.outcome) for row in rows_of(registry, tenant)]


def test_the_life_of_a_run_leaves_its_rows(registry: Registry, run: str) -> None:
    epoch = registry.claim(run)
    registry.record(run, epoch, 1, "active", [("batch", "gradient")])
    registry.record(run, epoch, 2, "completed", [("batch", "gradient")])
    registry.record(run, epoch, 1, "active")  # load_state
    registry.finish(run, epoch, "completed")
    registry.finish(run, epoch, "failed")  # of an actor that was replaced: nothing happened
    again = registry.claim(run)
    registry.finish(run, again, "failed")
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
    """RFC 5869, SHA-256, no salt, one block."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_a_step_shows_hmacs_under_the_key_of_its_run_and_no_hash(
    registry: Registry, place: Path, run: str
) -> None:
    calls = [("sha256:" + "a" * 64, "sha256:" + "b" * 64), ("my own name", "")]
    registry.record(run, registry.claim(run), 1, "active", calls)
    other = registry.create_run(US, CONFIG)
    registry.record(other, registry.claim(other), 1, "active", calls)
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
    old, _ = registry.claim(run), registry.claim(run)
    registry.record(run, old, 1, "active", [("batch", "gradient")])
    registry.record(run, old, 1, "active")
    with pytest.raises(ActorLostError):
        registry.publish(US, run, old, "art-1", 1, 10, True, b"{}", "k1")
    assert seen(registry)[3:] == [
        (f"{run}@{old}", "step", run, "actor_lost"),
        (f"{run}@{old}", "artifact.save", "art-1", "actor_lost"),
    ]


def test_the_life_of_an_artifact_leaves_its_rows(registry: Registry, run: str) -> None:
    epoch = registry.claim(run)
    actor = registry.capability(US, run, epoch)
    _, wrapped = registry.new_data_key(actor, "art-1", STORE)
    registry.publish(US, run, epoch, "art-1", 3, 10, True, b"{}", "k1")
    registry.open_data_key(actor, "art-1", wrapped, STORE)
    with pytest.raises(IntegrityError):
        registry.open_data_key(registry.reader(US), "art-1", b"damaged", STORE)
    registry.record_export(US, "art-1")
    registry.delete_artifact(US, "art-1")
    with pytest.raises(NotFoundError):
        registry.open_data_key(registry.reader(US), "art-1", wrapped, STORE)
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
    token, info = registry.create_api_key(US, "the label", ["art-1"], 1)
    registry.check_api_key(token, THEM)
    registry.revoke_api_key(US, info.key_id)
    with pytest.raises(NotFoundError):
        registry.revoke_api_key(US, "what was passed by mistake")
    with pytest.raises(AccessDeniedError):
        registry.check_api_key(token, THEM)
    with pytest.raises(AccessDeniedError):
        registry.check_api_key("tgt-unheard-of", THEM)
    assert seen(registry) == [
        ("sdk", "api_key.create", info.key_id, "ok"),
        ("sdk", "api_key.revoke", info.key_id, "ok"),
        (f"api-key {info.key_id}", "api_key.check", info.key_id, "access_denied"),
    ]
    assert seen(registry, THEM) == [("anyone", "api_key.check", "", "access_denied")]
    text = "".join(registry.audit_rows(US, 0, 100) + registry.audit_rows(THEM, 0, 100))
    for secret in (token.split("-", 2)[2], "unheard", "the label", "mistake"):
        assert secret not in text


def test_a_flood_of_denied_keys_is_counted_not_written(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(audit_log.time, "monotonic", lambda: now[0])

    def deny(times: int) -> None:
        for number in range(times):
            with pytest.raises(AccessDeniedError):
                registry.check_api_key(f"tgt-{number}-x", US)

    deny(100)
    now[0] += 59
    deny(100)
    assert [row.details for row in rows_of(registry)] == [{}]
    now[0] += 2
    deny(5)
    assert [row.details for row in rows_of(registry)] == [{}, {"left_out": 199}]


def test_budget_rows_are_the_entries_of_the_ledger(registry: Registry, run: str) -> None:
    from actors.plan import plan_run
    from tg_tinker.ledger import Ledger

    epoch, dp = registry.claim(run), DPConfig(noise_multiplier=1.0, max_participations=2)
    registry.register_dataset(US, "patients", 8.0, 1e-5, "example")
    registry.register_dataset(US, "patients", 8.0, 1e-5, "example")  # changes nothing
    with pytest.raises(InvalidRequestError):
        registry.register_dataset(US, "patients", 9.0, 1e-5, "example")
    config = TrainingConfig(model_ref="some/model", dp_config=dp, dataset_id="patients")
    plan = plan_run(dp, config, Ledger.replay(registry.ledger_entries(US, "patients")))
    registry.open_account(US, "patients", plan.entry(run))
    unit = [b"u" * 32]
    charge = lambda name: registry.charge(US, "patients", run, epoch, name, unit, True, [])  # noqa: E731
    charge("c1")
    charge("c1")  # a repeat is not another charge
    charge("c2")
    with pytest.raises(DPBudgetExceededError):
        charge("c3")
    with pytest.raises(DPBudgetExceededError):
        registry.admit(US, "patients", run, unit)  # the same refusal, within a minute
    with pytest.raises(ActorLostError):
        registry.charge(US, "patients", run, epoch - 1, "c4", unit, True, [])
    registry.link(US, "patients", run, ["visits"])
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
    entries = registry.ledger_entries(US, "patients")
    assert noted == [(entry["seq"], entry["hash"]) for entry in entries]


def test_a_reservation_that_is_given_back_leaves_its_row(registry: Registry, run: str) -> None:
    from actors.plan import plan_run
    from tg_tinker.ledger import Ledger

    dp = DPConfig(noise_multiplier=2.0, sampling="worst_case")
    registry.claim(run)
    registry.register_dataset(US, "patients", 8.0, 1e-5, "example")
    config = TrainingConfig(model_ref="m", dp_config=dp, dataset_id="patients", max_steps=3)
    plan = plan_run(dp, config, Ledger.replay(registry.ledger_entries(US, "patients")))
    registry.open_account(US, "patients", plan.entry(run))
    registry.release_reservation(US, "patients", run)
    registry.release_reservation(US, "patients", run)  # nothing is left to give back
    assert [row.event for row in rows_of(registry)][-2:] == ["budget.reserve", "budget.release"]


def test_a_sample_counts_and_names_no_text(registry: Registry, run: str) -> None:
    registry.record_sample(None, "sdk", f"{run}@7", 2, 30, "ok")
    registry.record_sample(US, "api-key 12", "base", 1, 4, "cancelled")
    first, second = rows_of(registry)[1:]
    assert (first.subject, first.details) == (run, {"prompts": 2, "tokens": 30, "step": 7})
    assert (second.who, second.subject, second.outcome) == ("api-key 12", "base", "cancelled")


def test_each_tenant_has_a_chain_of_its_own(registry: Registry) -> None:
    for tenant in (US, THEM, US):
        registry.create_run(tenant, CONFIG)
    assert [row.seq for row in rows_of(registry, US)] == [1, 2]
    assert [row.seq for row in rows_of(registry, THEM)] == [1]
    assert rows_of(registry, THEM)[0].previous == GENESIS
    nobody = registry.audit_head("nobody")
    assert (nobody.seq, nobody.hash) == (0, GENESIS)


def test_pages_follow_each_other(registry: Registry) -> None:
    for _ in range(7):
        registry.create_run(US, CONFIG)
    pages = [registry.audit_rows(US, since, 3) for since in (0, 3, 6, 7)]
    assert [[AuditRow.parse(line).seq for line in page] for page in pages] == [
        [1, 2, 3], [4, 5, 6], [7], [],
    ]  # fmt: skip


# --- together or not at all ----------------------------------------------------------------------


def test_a_change_that_fails_leaves_no_row(registry: Registry, run: str) -> None:
    epoch = registry.claim(run)
    registry.publish(US, run, epoch, "art-1", 1, 10, True, b"{}", "k1")
    before = seen(registry)
    registry.publish(US, run, epoch, "art-1", 1, 10, True, b"{}", "k1")  # a repeat
    with pytest.raises(sa.exc.IntegrityError):  # the id is taken
        registry.publish(US, run, epoch, "art-1", 1, 10, True, b"{ }", "k1")
    assert seen(registry) == before


class FullDisk(Registry):
    """Can do everything but note it."""

    def _note(self, *arguments: Any, **values: Any) -> None:
        raise StorageError("the disk is full")


def changes(registry: Registry, run: str, wrapped: bytes) -> dict[str, Callable[[], object]]:
    return {
        "create_run": lambda: registry.create_run(US, CONFIG),
        "claim": lambda: registry.claim(run),
        "record": lambda: registry.record(run, 1, 9, "active", []),
        "finish": lambda: registry.finish(run, 1, "failed"),
        "publish": lambda: registry.publish(US, run, 1, "art-2", 1, 10, True, b"{}", "k1"),
        "delete_artifact": lambda: registry.delete_artifact(US, "art-1"),
        "open_data_key": lambda: registry.open_data_key(
            registry.reader(US), "art-1", wrapped, STORE
        ),
        "create_api_key": lambda: registry.create_api_key(US, "", [], 1),
        "register_dataset": lambda: registry.register_dataset(US, "d", 8.0, 1e-5, "example"),
    }


def everything(place: Path) -> list[str]:
    with closing(sqlite3.connect(place / DATABASE)) as database:
        return list(database.iterdump())


@pytest.mark.parametrize("name", changes(None, "", b""))  # type: ignore[arg-type]
def test_a_change_that_cannot_be_noted_does_not_happen(place: Path, name: str) -> None:
    registry = open_registry(place)
    run = registry.create_run(US, CONFIG)
    epoch = registry.claim(run)
    _, wrapped = registry.new_data_key(registry.capability(US, run, epoch), "art-1", STORE)
    registry.publish(US, run, epoch, "art-1", 1, 10, True, b"{}", "k1")
    before = everything(place)
    with pytest.raises(StorageError, match="disk is full"):
        changes(open_registry(place, FullDisk), run, wrapped)[name]()
    assert everything(place) == before
    changes(registry, run, wrapped)[name]()
    assert everything(place) != before


def test_two_writers_cannot_fork_the_chain(place: Path) -> None:
    writers = [open_registry(place) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(writers[number % 4].create_run, US, CONFIG) for number in range(80)]
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
    head = registry.audit_head(US)
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


# --- the SDK on a real registry, without a cluster ----------------------------------------------


class LocalService(ServiceClient):
    """The real client, with the registry in this process."""

    def __init__(self, home: Path, tenant: str = US) -> None:
        self._home, self._tenant = home, tenant
        self._store, self._audit_keys = str(home / STORE), home
        self._registry: Any = open_registry(home)

    def close(self) -> None:
        pass


@pytest.fixture
def service(place: Path) -> LocalService:
    made = LocalService(place)
    for _ in range(5):
        made._registry.create_run(US, CONFIG)
    return made


def test_verification_says_since_which_head(service: LocalService, place: Path) -> None:
    first = service.verify_audit_log()
    assert (first.seq, first.since) == (5, None)
    first.check((place / "audit.pub").read_bytes())
    service._registry.create_run(US, CONFIG)
    second = service.verify_audit_log()
    assert (second.seq, second.since) == (6, first)
    assert read_head(place / f"audit-head-{US}") == second
    assert kept_by(service) in ([first, second], [second, first])


def test_a_head_is_known_also_where_no_row_followed_it(service: LocalService) -> None:
    first = service.verify_audit_log()
    assert service.verify_audit_log().since == first


def kept_by(service: LocalService) -> list[AuditHead]:
    public_key = (service._home / "audit.pub").read_bytes()
    return audit_heads.kept(service._store, US, public_key)


def restored(service: LocalService, change: Callable[[], object]) -> None:
    """Makes a change, then puts the database from before it back."""
    database = service._home / DATABASE
    service._registry._engine.dispose()
    shutil.copy(database, old := service._home / "old.db")
    change()
    service._registry._engine.dispose()
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    shutil.copy(old, database)
    service._registry = open_registry(service._home)


def test_an_old_database_behind_the_head_of_this_home_is_refused(service: LocalService) -> None:
    def go_on() -> None:
        service._registry.create_run(US, CONFIG)
        service.verify_audit_log()

    restored(service, go_on)
    shutil.rmtree(service._store)
    with pytest.raises(IntegrityError, match="ends at row 5, a head of row 6"):
        service.verify_audit_log()
    service._registry.create_run(US, CONFIG)  # it goes on, on another branch
    with pytest.raises(IntegrityError, match="forked: row 6"):
        service.verify_audit_log()


def test_an_old_home_behind_a_head_in_the_store_is_refused(service: LocalService) -> None:
    def go_on() -> None:
        service._registry.create_run(US, CONFIG)
        audit_heads.keep(service._store, service._registry.audit_head(US))

    restored(service, go_on)
    with pytest.raises(IntegrityError, match="ends at row 5, a head of row 6"):
        service.verify_audit_log()


def test_a_head_of_a_lost_branch_is_not_replaced_by_that_of_the_next(
    service: LocalService,
) -> None:
    def go_on() -> None:
        service._registry.create_run(US, CONFIG)
        audit_heads.keep(service._store, service._registry.audit_head(US))

    restored(service, go_on)
    go_on()  # the store is given a head of the same number
    with pytest.raises(IntegrityError, match="forked: row 6"):
        service.verify_audit_log()


def test_a_head_in_other_hands_is_enough(service: LocalService) -> None:
    kept: list[AuditHead] = []

    def go_on() -> None:
        service._registry.create_run(US, CONFIG)
        kept.append(service._registry.audit_head(US))

    restored(service, go_on)
    assert service.verify_audit_log().seq == 5
    with pytest.raises(IntegrityError, match="ends at row 5"):
        service.verify_audit_log(kept[0])


def test_rows_changed_in_the_database_are_named(service: LocalService) -> None:
    service.verify_audit_log()
    with closing(sqlite3.connect(service._home / DATABASE)) as database:
        database.execute(
            "UPDATE audit_rows SET row = replace(row, 'sdk', 'xyz') WHERE seq = 3"
        )  # fmt: skip
        database.commit()
    with pytest.raises(IntegrityError, match="row 3 of the audit log was changed"):
        service.verify_audit_log()


def test_a_refused_log_does_not_replace_the_head_that_is_kept(service: LocalService) -> None:
    head = service.verify_audit_log()
    with closing(sqlite3.connect(service._home / DATABASE)) as database:
        database.execute("DELETE FROM audit_rows WHERE seq = 5")
        database.commit()
    with pytest.raises(IntegrityError):
        service.verify_audit_log()
    assert read_head(service._home / f"audit-head-{US}") == head
    assert kept_by(service) == [head]


def test_what_is_no_head_in_the_store_is_named_until_it_is_removed(service: LocalService) -> None:
    head = service._registry.audit_head(US)
    folder = Path(service._store) / f"t/{US}/audit"
    theirs = service._registry.audit_head(THEM)
    for name, line, why in (
        (f"{head.place}.json", head.signed(new_signing_key()).line(), "another key signed"),
        ("x.json", "{}", "not a signed head"),
        ("x.json", head.line()[:-9], "not a signed head"),
        ("f o.json", head.line(), "not a signed head"),
        (f"{theirs.place}.json", theirs.line(), "another tenant"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{line}\n")
        with pytest.raises(IntegrityError, match=rf"audit/{name} .*{why}.* remove that object"):
            service.verify_audit_log()
        (folder / name).unlink()
    (folder / f"{head.place}.json.0badf00d").touch()  # what a killed write left on Azure
    service.verify_audit_log()


@pytest.mark.parametrize(("since", "limit"), [(-1, 10), (0, 0), (0, 10_001)])
def test_impossible_pages_are_refused(service: LocalService, since: int, limit: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"since={since}, limit={limit}"):
        service.audit_log(since, limit)


# --- the command ---------------------------------------------------------------------------------


def call(*words: object, service: ServiceClient | None = None) -> Any:
    return CliRunner().invoke(main, ["audit-log", *map(str, words)], obj=lambda: service)


def test_an_export_is_verified_where_there_is_no_cluster(
    service: LocalService, tmp_path: Path
) -> None:
    early = tmp_path / "early.jsonl"
    assert call("export", early, service=service).exit_code == 0
    service._registry.create_run(US, CONFIG)
    late = tmp_path / "late.jsonl"
    assert call("export", late, service=service).exit_code == 0
    assert len(late.read_text().splitlines()) == 7
    program = (
        "import sys; from tg_tinker.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, sorted({'ray', 'torch', 'sqlalchemy',"
        " 'transformers', 'actors'} & set(sys.modules)))"
    )
    words = ["audit-log", "verify", str(late), "--since", str(early), "--public-key"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, str(service._home / "audit.pub")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "verified: 6 rows" in done.stdout
    assert "consistent since head 5" in done.stdout
    assert done.stdout.endswith("0 []\n")
    found = call("verify", early, "--since", late, "--public-key", service._home / "audit.pub")
    assert (found.exit_code, "a head of row 6 is known" in found.output) == (1, True)


def test_an_export_never_overwrites_a_file(service: LocalService, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    found = call("export", tmp_path / "there", service=service)
    assert (found.exit_code, "File exists" in found.output) == (1, True)
    assert (tmp_path / "there").read_text() == "mine"


def test_an_export_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[AuditRow]:
        yield good()[0]
        raise IntegrityError("the second is damaged")

    with pytest.raises(IntegrityError, match="second"):
        write_export(tmp_path / "log", rows(), read_head(vector("good")))
    assert not (tmp_path / "log").exists()


def test_show_and_verify_say_what_there_is(service: LocalService, tmp_path: Path) -> None:
    shown = call("show", "--since", 3, service=service).output.splitlines()
    assert [line.split()[0] for line in shown] == ["row", "4", "5"]
    assert "run.create" in shown[1]
    assert "5 rows" in call("verify", service=service).output
    assert call("verify", tmp_path / "x", service=service).exit_code == 1
    missing = call("verify", tmp_path / "x", "--public-key", VECTORS / "audit.pub")
    assert (missing.exit_code, "No such file" in missing.output) == (1, True)
    with pytest.raises(NotFoundError, match="public key"):
        read_public_key(tmp_path / "audit.pub")


# --- a real service ------------------------------------------------------------------------------

CANARY = "qzvx-canary-prompt"


def post(url: str, key: str, body: dict[str, Any]) -> int:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def for_one_use(config: TrainingConfig) -> TrainingConfig:
    """The same in private, for one use of each unit."""
    dp = DPConfig(noise_multiplier=1.0, max_participations=1)
    return config.model_copy(update={"dp_config": dp, "dataset_id": "patients"})


@pytest.mark.slow
def test_everything_that_a_service_does_leaves_its_row_and_no_content(
    home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Training, private training, artifacts, sampling over SDK and HTTP, keys."""
    tokens = [70, 71, 72, 73, 74, 75, 76, 77]
    batch = {"input_ids": [tokens]}
    config = TrainingConfig(model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2))
    with ServiceClient(address="local") as service:
        key, info = service.create_api_key("a label", days=1)
        url = service.serve_http(str(tiny_model), port=free_port())
        with service.create_training_client(config) as tc:
            calls = [tc.forward_backward(batch), tc.forward_backward({"input_ids": [tokens[:5]]})]
            tc.optim_step().result()
            results = [call.result() for call in calls]
            saved = tc.save_state(metadata={"note": CANARY}).artifact_id
            tc.sample([CANARY, CANARY], max_tokens=3, temperature=0)
            assert list(tc.sample_stream(CANARY, max_tokens=3))
            assert post(url, key, {"model": tc.id, "prompt": CANARY, "max_tokens": 4}) == 200
            assert post(url, key, {"model": saved, "prompt": CANARY, "max_tokens": 4}) == 200
            assert post(url, f"{key}x", {"model": "base", "prompt": CANARY}) == 401
            tc.load_state(saved)
            tc.forward_backward(batch)
            step = tc.optim_step()
            again = Request(step.future_id, "optim_step", 1, "any", 0)  # a repeat is no other step
            assert tc._link.open(tc._link.send(again), again.request_id).value == step.result()
            # The row of the step is there although the client closes at once.
        with service.get_training_client(tc.id):
            pass
        with service.create_training_client(for_one_use(config)) as private:
            private.forward_backward(batch)
            private.optim_step().result()
            private.forward_backward(batch)
            assert isinstance(private.optim_step().exception(), DPBudgetExceededError)
        service.export_adapter(saved, tmp_path / "adapter")
        service.delete_artifact(saved)
        service.revoke_api_key(info.key_id)
        head, rows = service.verify_audit_log(), service.audit_log()
    assert head.since is not None, "save_state and export put heads into the store"
    assert (head.seq, head.hash) == (rows[-1].seq, rows[-1].hash)
    check_rows(rows, tc.id, private.id, saved, info.key_id)
    stored = "".join(row.line() for row in rows)
    hashes = [part for one in results for part in (one.batch_hash, one.gradient_hash)]
    for secret in (*hashes, CANARY, key, "a label", str(tokens)[1:-1]):
        assert secret.removeprefix("sha256:") not in stored


def check_rows(rows: list[AuditRow], run: str, private: str, saved: str, key: str) -> None:
    """What happened to each, in order; rows of different actors may come in between."""
    one, three, by_key = f"{run}@1", f"{run}@3", f"api-key {key}"
    expected = {
        run: [
            ("sdk", "run.create", "ok"), ("sdk", "run.claim", "ok"), (one, "step", "ok"),
            ("sdk", "sample", "ok"), ("sdk", "sample", "ok"), (by_key, "sample", "ok"),
            (one, "step", "ok"), ("sdk", "run.complete", "ok"), ("sdk", "run.claim", "ok"),
            (three, "run.resume", "ok"), ("sdk", "run.complete", "ok"),
        ],
        saved: [
            (one, "artifact.save", "ok"), (by_key, "artifact.load", "ok"), (by_key, "sample", "ok"),
            (one, "artifact.load", "ok"), (three, "artifact.load", "ok"),
            ("sdk", "artifact.load", "ok"), ("sdk", "artifact.export", "ok"),
            ("sdk", "artifact.delete", "ok"),
        ],
        private: [
            ("sdk", "run.create", "ok"), ("sdk", "run.claim", "ok"), (f"{private}@1", "step", "ok"),
            ("sdk", "run.complete", "ok"),
        ],
        "patients": [
            (f"{private}@1", "dataset.register", "ok"), (f"{private}@1", "budget.reserve", "ok"),
            (f"{private}@1", "budget.charge", "ok"),
            (f"{private}@1", "budget.charge", "dp_budget_exceeded"),
        ],
        key: [
            ("sdk", "api_key.create", "ok"), (by_key, "api_key.check", "access_denied"),
            ("sdk", "api_key.revoke", "ok"),
        ],
    }  # fmt: skip
    for subject, wanted in expected.items():
        found = [(row.who, row.event, row.outcome) for row in rows if row.subject == subject]
        assert found == wanted, subject
    assert {row.subject for row in rows} == set(expected)
