"""Tests what an auditor gets: the report, the certificate, and a ledger that is verified from a
file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.privacy_helpers import new_budget, private_config, registry
from tg_tinker.errors import IntegrityError, NotFoundError
from tg_tinker.records.report import OUTSIDE, PrivacyReport, read_ledger


def report(*runs: dict[str, Any], charges: int = 1, noised: bool = True) -> PrivacyReport:
    """Returns the report of a dataset on which each run made these steps, all on one unit."""
    known = registry()
    for values in runs:
        budget = new_budget(known, private_config(Path("none"), dp=values))
        for number in range(charges):
            told = None
            if values.get("sampling") == "poisson":
                draw = budget.draw([b"u" * 16])
                told = draw.position, draw.units
            known.ledgers.charge(
                "default", "default", budget.run_id, budget.epoch, f"{budget.run_id}{number}",
                [b"u" * 16], noised, [], (), told,
            )  # fmt: skip
    return PrivacyReport(known.ledgers.entries("default", "default"))


def only_run(made: PrivacyReport) -> dict[str, Any]:
    (run,) = made.certificate()["runs"].values()
    return dict(run)


def test_the_certificate_states_the_whole_guarantee() -> None:
    made = report({"noise_multiplier": 1.0, "max_grad_norm": 0.5}, charges=2)
    stated = json.loads(json.dumps(made.certificate(), allow_nan=False))
    assert stated["registered"] == {"epsilon": 8.0, "delta": 1e-5}
    assert stated["spent"]["epsilon"] == pytest.approx(6.573, abs=1e-3)
    assert stated["guarantee"] is True
    assert stated["adjacency"].startswith("zero-out")
    assert stated["unit"] == "one example: a distinct sequence of input tokens"
    assert stated["opt_outs"] == stated["linked_datasets"] == []
    assert stated["outside"] == list(OUTSIDE)
    assert "choice of checkpoint did not depend on losses" in stated["presumes"]
    head = made.entries[-1]["hash"]
    assert stated["ledger"] == {"birth": made.entries[0]["hash"], "head": head, "entries": 4}
    run = only_run(made)
    expected = {
        "contract": "participation", "vouched_by": "server: counted uses", "accountant": "exact",
        "noise_multiplier": 1.0, "bound": 0.5, "batch": 8, "dtype": "float32", "charges": 2,
        "counted": 2, "limit": 2, "metrics_shown": True, "sample_rate": None,
    }  # fmt: skip
    assert {key: run[key] for key in expected} == expected


VOUCHED = {
    "participation": "server", "poisson": "server", "client_poisson": "owner",
    "worst_case": "nobody",
}  # fmt: skip


@pytest.mark.parametrize(("contract", "who"), VOUCHED.items())
def test_the_certificate_says_who_vouches(contract: str, who: str) -> None:
    sampled = {"dataset_size": 80, "accountant_type": "rdp"} if "poisson" in contract else {}
    run = only_run(report({"noise_multiplier": 4.0, "sampling": contract} | sampled))
    assert run["vouched_by"].startswith(f"{who}: ")
    assert run["sample_rate"] == (0.1 if sampled else None)


def test_after_an_asserted_sample_was_refuted_the_owner_vouches_no_more() -> None:
    sampled = {"dataset_size": 80, "accountant_type": "rdp", "sampling": "client_poisson"}
    made = report({"noise_multiplier": 4.0} | sampled)
    (run,) = made.ledger.accounts
    again = [*made.entries, made.ledger.append(
        {"type": "fall_back", "run": run, "count": 1, "limit": None, "spent": 0.0625}
    )]  # fmt: skip
    assert only_run(PrivacyReport(again))["vouched_by"] == "server: counted uses"


def test_opt_outs_are_named_and_end_the_guarantee() -> None:
    made = report({"noise_multiplier": 1.0, "target_epsilon": None}, noised=False)
    stated = made.certificate()
    assert stated["guarantee"] is False
    assert stated["spent"]["epsilon"] is None
    assert math.isinf(made.total_epsilon)
    assert "without noise" in stated["opt_outs"][0]
    assert "no guarantee: a step was made without noise" in str(made)
    allowed = report({"noise_multiplier": 1.0, "allow_nonprivate_init": True})
    assert "trained without privacy" in allowed.certificate()["opt_outs"][0]
    assert allowed.certificate()["guarantee"] is False


def test_the_report_reads_as_text() -> None:
    text = str(report({"noise_multiplier": 1.0}))
    assert "dataset default: epsilon 4.377 of 8 spent, delta 1e-05" in text
    assert "participation, sigma 1, 1 charges, 1 uses of a unit (of 2)" in text


# --- a ledger in a file --------------------------------------------------------------------------


def write(path: Path, entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_ledger_in_a_file_is_the_same(tmp_path: Path) -> None:
    made = report({"noise_multiplier": 1.0})
    read = read_ledger(write(tmp_path / "l.jsonl", made.entries))
    assert read.certificate() == made.certificate()
    for entry in made.entries:
        read.check_head(entry["hash"])


def test_a_ledger_that_was_cut_off_shows_by_its_head(tmp_path: Path) -> None:
    made = report({"noise_multiplier": 1.0})
    read = read_ledger(write(tmp_path / "l.jsonl", made.entries[:-1]))
    with pytest.raises(IntegrityError, match="cut off"):
        read.check_head(made.entries[-1]["hash"])


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        read_ledger(tmp_path / "absent.jsonl")
    (tmp_path / "text").write_text("no json")
    with pytest.raises(IntegrityError, match="one JSON object per line"):
        read_ledger(tmp_path / "text")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError, match="one JSON object per line"):
        read_ledger(tmp_path / "bytes")
    with pytest.raises(IntegrityError, match="empty"):
        read_ledger(write(tmp_path / "empty", []))
    with pytest.raises(IntegrityError, match="not a ledger"):
        read_ledger(write(tmp_path / "list", [[1]]))
