"""Tests what the chain and the heads of the audit log prove, by the rules alone."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.audit import THEM, TIME, US, VECTORS, good, vector
from tg_tinker import (
    IntegrityError,
)
from tg_tinker.records.audit_log import AuditRow, chained, empty, verify
from tg_tinker.records.files import read_head, verify_export
from tg_tinker.records.heads import AuditHead
from tg_tinker.storage.envelope import new_signing_key

EXPECTED: dict[str, str] = json.loads((VECTORS / "expected.json").read_text())
PUBLIC_KEY = (VECTORS / "audit.pub").read_bytes()


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
    """The operator has the key, so only an earlier head in other hands shows the change."""
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
    """Returns the good rows after one edit.

    In half of the cases the hashes after the edit are computed again.
    """
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
