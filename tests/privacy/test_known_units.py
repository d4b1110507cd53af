"""Tests the lookup of rows that another dataset of the same tenant knows, and its warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.privacy import known_units
from actors.privacy.known_units import OverlapWarnings, known_elsewhere
from actors.privacy.units import unit_ids
from actors.registry.registry import Registry
from support.privacy_helpers import ROWS, PrivateSession, private_session, registry, rows
from tg_tinker.errors import IntegrityError

IDS = [f"person-{row}" for row in range(len(ROWS))]
FORGOTTEN = "4 of these 4 rows were charged under old"


@pytest.fixture(scope="module")
def known() -> Registry:
    return registry()


def session(model: Path, known: Registry, **values: Any) -> PrivateSession:
    values["dp"] = {"unit": "example"} | values.get("dp", {})
    return private_session(model, known=known, **values)


def trained(model: Path, known: Registry, dataset: str, **values: Any) -> PrivateSession:
    """Returns a session after one step on the first four rows."""
    s = session(model, known, dataset_id=dataset, **values)
    s.forward_backward(rows(ROWS[:4], example_ids=IDS[:4]))
    s.optim_step()
    return s


def warned(s: PrivateSession, chosen: Any = ROWS[:4], **fields: Any) -> list[str]:
    return [
        one
        for one in s.forward_backward(rows(chosen, **fields)).warnings
        if "did you forget dataset_id" in one
    ]


@pytest.mark.parametrize("unit", ["example", "id"])
@pytest.mark.parametrize("contract", ["participation", "worst_case", "client_poisson"])
def test_a_forgotten_data_set_shows_in_the_first_calls(
    tiny_model: Path, contract: str, unit: str
) -> None:
    """The old dataset is found under every contract, also if its unit differs from the present
    one."""
    known = registry()
    dp = {"sampling": contract, "unit": unit, "dataset_size": 16}
    trained(tiny_model, known, "old", dp=dp, max_steps=2)
    s = session(tiny_model, known)  # no dataset_id: `default` pays
    (told,) = warned(s, example_ids=IDS[:4])
    assert told.startswith(f"{FORGOTTEN}, and this run is charged to default")
    (told,) = warned(s, ROWS[3:6], example_ids=IDS[3:6])
    assert told.startswith("1 of these 3 rows")
    assert warned(s, ROWS[4:6], example_ids=IDS[4:6]) == []
    assert warned(s, example_ids=IDS[:4]) == []  # no longer one of the first calls


def test_units_that_samples_are_drawn_from_are_known_before_they_are_drawn(
    tiny_model: Path,
) -> None:
    known = registry()
    dp = {"sampling": "poisson", "dataset_size": 8, "accountant_type": "rdp"}
    drawing = private_session(
        tiny_model, known=known, dataset_id="old", batch_size=2, max_steps=3, dp=dp
    )
    drawing.poisson.register(rows())
    (told,) = warned(session(tiny_model, known))
    assert told.startswith(FORGOTTEN)


def test_the_own_data_set_and_rows_that_are_new_cause_no_warning(
    tiny_model: Path, known: Registry
) -> None:
    trained(tiny_model, known, "own")
    s = session(tiny_model, known, dataset_id="own")
    assert warned(s) == []
    assert warned(s, ROWS[4:]) == []


def test_another_tenant_is_never_asked(tiny_model: Path, known: Registry) -> None:
    s = trained(tiny_model, known, "theirs")
    other = session(tiny_model, known)
    other.budget.tenant = "somebody"
    assert known.ledgers.unit_keys("somebody") == {}
    keys = other.budget.registry.ledgers.unit_keys(other.budget.tenant)
    assert known_elsewhere(other.budget, keys, rows(), "default") == [set()] * len(ROWS)
    units = unit_ids(s.budget.key, rows(ROWS[:4]), "example")
    assert known.ledgers.known_units("default", {"theirs": units}) == {"theirs": {*units}}
    assert known.ledgers.known_units("somebody", {"theirs": units}) == {"theirs": set()}


def test_hidden_metrics_hide_the_warning(tiny_model: Path, known: Registry) -> None:
    trained(tiny_model, known, "hidden")
    s = session(tiny_model, known, dp={"show_private_metrics": False})
    assert s.forward_backward(rows(ROWS[:4])).warnings == ()


def test_the_warning_is_in_no_entry_row_or_log(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    known = registry()
    trained(tiny_model, known, "old")
    s = session(tiny_model, known)
    assert warned(s)
    s.optim_step()
    entries = [str(known.ledgers.entries("default", name)) for name in ("old", "default")]
    written = [*entries, *known.audit_log.rows("default", 0, 1000), caplog.text]
    assert not any("forget" in text or "of these" in text for text in written)
    assert "old" not in entries[1]


def test_a_row_without_an_id_is_unknown_to_a_data_set_of_ids(tiny_model: Path) -> None:
    known = registry()
    trained(tiny_model, known, "people", dp={"unit": "id"})
    s = session(tiny_model, known)
    assert warned(s) == []
    assert len(warned(s, example_ids=IDS[:4])) == 1


def test_the_lookup_is_bounded_and_a_lost_key_stops_no_run(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = registry()
    trained(tiny_model, known, "old")
    s = session(tiny_model, known)
    asked: list[int] = []
    real = known.ledgers.known_units

    def counted(tenant: str, units: dict[str, list[bytes]]) -> dict[str, set[bytes]]:
        asked.append(sum(map(len, units.values())))
        return real(tenant, units)

    monkeypatch.setattr(known.ledgers, "known_units", counted)
    monkeypatch.setattr(known_units, "ROWS", 2)
    overlaps = OverlapWarnings(s.budget)
    found = [overlaps.of(rows()) for _ in range(5)]
    assert asked == [2] * known_units.CALLS
    assert [bool(one) for one in found] == [True] * 3 + [False] * 2

    def lost(tenant: str) -> None:
        raise IntegrityError("the key is lost")

    monkeypatch.setattr(known.ledgers, "unit_keys", lost)
    assert OverlapWarnings(s.budget).of(rows()) == ()
