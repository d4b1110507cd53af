"""Tests what an auditor gets: the report, the certificate, and a ledger that is verified from a
file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.privacy_helpers import planned_budget, private_config, registry
from tg_tinker.errors import IntegrityError, NotFoundError
from tg_tinker.records.report import OUTSIDE, PrivacyReport, read_ledger


def report(*runs: dict[str, Any], charges: int = 1, noised: bool = True) -> PrivacyReport:
    """Returns the report of a dataset on which each run made these steps, all on one unit."""
    known = registry()
    for values in runs:
        budget = planned_budget(known, private_config(Path("none"), dp=values)).open()
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
    for meant in (
        "e^4.377 = 79.61 (epsilon), apart from a probability of 1e-05 (delta)",
        "looking at released weights, claim the registered epsilon 8 instead",
        "at delta 1e-06 epsilon 4.887",
        "2 units epsilon 9.997, 4 units epsilon 24.38, 8 units epsilon 65.32 (exact)",
        "The number of units is not known here.",
        "The spent epsilon also presumes that the decision to stop did not depend",
        "Not covered:\n- Loss,",
    ):
        assert meant in text, meant


def test_a_stop_that_looked_at_weights_has_the_registered_epsilon() -> None:
    made = report({"noise_multiplier": 1.0})
    stated = made.certificate()
    assert stated["epsilon_if_stopping_was_adaptive"] == 8.0 > stated["spent"]["epsilon"]
    assert "not choices from losses, metrics or who was drawn" in stated["presumes"]
    unlimited = report({"noise_multiplier": 1.0, "target_epsilon": None})
    assert unlimited.certificate()["epsilon_if_stopping_was_adaptive"] is None
    assert "no epsilon at all" in str(unlimited)


def test_the_certificate_states_the_figures_of_a_gaussian_ledger() -> None:
    stated = report({"noise_multiplier": 1.0}, charges=2).certificate()
    assert stated["rho"] == pytest.approx(1.0)
    assert [point["delta"] for point in stated["delta_epsilon_curve"]] == [1e-3, 1e-4, *DELTAS]
    assert [(group["units"], group["how"]) for group in stated["groups"]] == [
        (1, "exact"), (2, "exact"), (4, "exact"), (8, "exact"),
    ]  # fmt: skip
    assert stated["groups"][1]["epsilon"] == pytest.approx(15.456, abs=1e-3)


DELTAS = (1e-5, 1e-6, 1e-7)


def test_a_sampled_ledger_has_upper_bounds_and_no_rho() -> None:
    sampled = {"dataset_size": 80, "accountant_type": "rdp", "sampling": "poisson"}
    stated = report({"noise_multiplier": 4.0} | sampled).certificate()
    assert stated["rho"] is None
    assert "depended on who was drawn" in stated["presumes"]
    assert "so their secrecy is computational" in stated["presumes"]
    assert "drawn" not in report({"noise_multiplier": 4.0}).certificate()["presumes"].replace(
        "choices from losses, metrics or who was drawn", ""
    )
    assert all("computational" in run["vouched_by"] for run in stated["runs"].values())
    assert all(group["how"].startswith("upper bound") for group in stated["groups"])
    assert stated["units"] == 80
    assert stated["delta_times_units"] == pytest.approx(8e-4)
    both = report({"noise_multiplier": 4.0} | sampled, {"noise_multiplier": 3.0})
    two = both.certificate()["groups"][1]
    assert (two["epsilon"], two["delta"] > 1e-5) == (2 * both.total_epsilon, True)
    assert f"2 units epsilon {two['epsilon']:.4g} (at delta {two['delta']:.3g})" in str(both)


def test_twice_delta_is_presumed_where_a_run_joined_one_with_a_table() -> None:
    sampled = {"dataset_size": 80, "accountant_type": "prv", "sampling": "poisson"}
    alone = {"noise_multiplier": 4.0, "target_epsilon": 0.4} | sampled
    assert "twice" not in report(alone).certificate()["presumes"]
    joined = report(alone, {"noise_multiplier": 20.0, "target_epsilon": 0.4})
    assert "delta is twice the stated delta" in joined.certificate()["presumes"]


def test_the_units_are_the_most_that_anybody_stated_or_counted() -> None:
    made = report({"noise_multiplier": 1.0, "dataset_size": 3692})
    assert made.certificate()["units"] == 3692
    counted = PrivacyReport(made.entries, counted=5000)
    assert counted.certificate()["delta_times_units"] == pytest.approx(0.05)
    assert "delta x units = 1e-05 x 5000 = 0.05" in str(counted)


def test_a_delta_that_lets_whole_units_out_is_a_caution() -> None:
    made = report({"noise_multiplier": 1.0})
    assert made.certificate()["cautions"] == []
    careless = PrivacyReport(made.entries, counted=100_000)
    assert "delta x units is 1, which is 1 or more" in careless.certificate()["cautions"][0]
    assert "caution: delta x units is 1" in str(careless)


def test_linked_data_sets_and_dropped_draws_are_explained() -> None:
    made = report({"noise_multiplier": 1.0})
    (run,) = made.ledger.accounts
    link = made.ledger.append({"type": "link", "run": run, "datasets": ["first"]})
    linked = PrivacyReport([*made.entries, link])
    assert "the epsilons and the deltas add for a person in both" in str(linked)
    assert linked.certificate()["linked_datasets"] == ["first"]
    made.ledger.dropped = 1
    assert made.certificate()["draws_dropped"] == 1
    assert "1 Poisson draws were told and given up" in str(made)


def test_the_bounded_noise_of_earlier_releases_is_a_caution_where_it_matters() -> None:
    for sigma, cautioned in ((0.2, True), (1.0, False)):
        made = report({"noise_multiplier": sigma, "target_epsilon": 100.0})
        assert made.certificate()["delta_of_bounded_noise"] == 0
        (account,) = made.ledger.accounts.values()
        account.facts = {k: v for k, v in account.facts.items() if k != "noise_range"}
        assert 0 < made.certificate()["delta_of_bounded_noise"] < 1e-2
        assert any("bounded range" in one for one in made.certificate()["cautions"]) is cautioned


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
