"""Tests statements that a signing key follows another, and which key is in force at a row."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tg_tinker.errors import IntegrityError
from tg_tinker.records.files import read_public_key, verify_export
from tg_tinker.records.successions import Signers, Succession, chain_to
from tg_tinker.storage.envelope import new_signing_key, public_key_of

VECTORS = Path(__file__).parents[1] / "vectors" / "home_keys"
EXPECTED: dict[str, Any] = json.loads((VECTORS / "expected.json").read_text())
KEYS = [key.encode() for key in EXPECTED["signing_keys"]]
PINS = [read_public_key(VECTORS / f"audit{n}.pub") for n in (1, 2, 3)]
CHAIN = [Succession.parse(line) for line in EXPECTED["chain"]]


# --- frozen --------------------------------------------------------------------------------------


def test_statements_are_made_as_they_were_frozen() -> None:
    assert [Succession.of(*pair) for pair in pairwise(KEYS)] == CHAIN
    assert [step.line() for step in CHAIN] == EXPECTED["chain"]


@pytest.mark.parametrize("pin", PINS)
def test_a_frozen_export_verifies_with_each_public_key(pin: bytes) -> None:
    assert verify_export(VECTORS / "good.jsonl", pin).seq == 4
    for name in ("by_replaced_key", "by_first_key"):
        with pytest.raises(IntegrityError, match="another key signed"):
            verify_export(VECTORS / f"{name}.jsonl", pin)


def test_an_export_from_before_a_rotation_verifies_with_the_key_of_its_time_alone() -> None:
    assert verify_export(VECTORS / "before.jsonl", PINS[0]).seq == 1
    for pin in PINS[1:]:
        with pytest.raises(IntegrityError, match="another key signed"):
            verify_export(VECTORS / "before.jsonl", pin)


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pin", PINS)
def test_each_key_is_in_force_from_its_row_to_the_next(pin: bytes) -> None:
    signers = Signers(pin, [(5, CHAIN[0]), (9, CHAIN[1])])
    found = [PINS.index(signers.at(row)) for row in (0, 4, 5, 8, 9, 99)]
    assert found == [0, 0, 1, 1, 2, 2]


def test_a_key_that_nobody_endorsed_is_never_in_force() -> None:
    thief = new_signing_key()
    branch = Succession.of(KEYS[0], thief)
    for steps in ([CHAIN[0], branch], [branch], [branch, CHAIN[0]]):
        signers = Signers(PINS[1], enumerate(steps, 5))
        assert public_key_of(thief) not in {signers.at(row) for row in range(9)}
    assert Signers(PINS[0], [(5, CHAIN[0]), (6, branch)]).at(9) == PINS[1]
    assert Signers(PINS[0], [(5, CHAIN[1])]).at(9) == PINS[0]


def test_a_row_that_is_repeated_changes_nothing() -> None:
    steps = [(5, CHAIN[0]), (7, CHAIN[0]), (9, CHAIN[1]), (11, CHAIN[0])]
    for pin in PINS:
        assert [PINS.index(Signers(pin, steps).at(row)) for row in (4, 6, 8, 10, 12)] == [
            0, 1, 1, 2, 2,
        ]  # fmt: skip


def test_a_chain_ends_at_its_key_and_loops_nowhere() -> None:
    assert chain_to(PINS[2], CHAIN) == CHAIN
    assert chain_to(PINS[1], CHAIN) == CHAIN[:1]
    assert chain_to(PINS[0], [*CHAIN, Succession.of(KEYS[2], KEYS[0])]) != []


@pytest.mark.parametrize(
    "change",
    [
        {"key": "0" * 64}, {"previous": CHAIN[0].key}, {"signature": CHAIN[0].countersignature},
        {"countersignature": CHAIN[0].signature}, {"key": CHAIN[0].key.upper()}, {"key": 5},
    ],
)  # fmt: skip
def test_a_statement_that_was_changed_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        Succession.parse(replace(CHAIN[0], **change).line())


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", f"{CHAIN[0].line()} ", "[" * 100_000])
def test_another_text_is_no_statement(text: str) -> None:
    with pytest.raises(IntegrityError, match="no statement"):
        Succession.parse(text)
