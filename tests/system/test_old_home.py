"""Tests a home of an earlier release under this one: it opens, verifies, loads and continues.

The home, its base model and the old program's record of it are in `tests/vectors`. They are never
made again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.old_homes import EXPECTED, HUB, old_home
from tg_tinker import (
    AccessDeniedError,
    DPConfig,
    LoRAConfig,
    NotFoundError,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.storage.databases import FIRST_REVISION, REVISION, revision_on_record

pytestmark = pytest.mark.slow

OLD = EXPECTED["tenants"]["default"]
CLINIC = EXPECTED["tenants"]["clinic"]
ROWS = EXPECTED["rows"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = old_home(tmp_path_factory.mktemp("old") / "home")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TG_TINKER_HOME", str(place))
        for name, value in HUB.items():
            patched.setenv(name, value)
        yield place


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def service(home: Path, said: list[str]) -> Iterator[ServiceClient]:
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tg_tinker").addHandler(handler)
    with ServiceClient("local") as client:
        logging.getLogger("tg_tinker").removeHandler(handler)
        yield client


def test_it_is_upgraded_after_a_backup_and_says_so(
    service: ServiceClient, home: Path, said: list[str]
) -> None:
    (backup,) = home.glob("registry-0001-*.db")
    assert revision_on_record(backup) == FIRST_REVISION
    assert revision_on_record(home / "registry.db") == REVISION
    assert any(str(backup) in line and "upgraded the registry" in line for line in said)


def test_its_audit_logs_verify_against_the_heads_that_were_kept(service: ServiceClient) -> None:
    found = service.verify_audit_log()
    assert found.since is not None
    assert found.since.seq <= OLD["audit_log"]["rows"] <= found.seq
    row = service.audit_log(since=OLD["audit_log"]["rows"] - 1, limit=1)[0]
    assert row.hash == OLD["audit_log"]["head"]
    check = service.check_registry()
    assert check.sound
    assert check.foreign == {}
    assert [problem for problem in service.verify_artifacts() if problem[1]] == []


def test_its_budgets_are_spent_as_they_were(service: ServiceClient) -> None:
    for name, expected in OLD["datasets"].items():
        report = service.privacy_report(name)
        assert f"{len(report.entries) - 1}-{report.entries[-1]['hash']}" == expected["place"]
        assert report.ledger.epsilon == pytest.approx(expected["total_epsilon"], rel=1e-9)


def test_its_runs_artifacts_and_keys_are_there(service: ServiceClient) -> None:
    runs = {run.training_client_id: run for run in service.list_training_clients()}
    for expected in OLD["runs"].values():
        run = runs[expected["id"]]
        assert (run.status, run.step) == (expected["status"], expected["step"])
        assert run.last_artifact_id == expected["last_artifact_id"]
    artifacts = {one.artifact_id: one for one in service.list_artifacts()}
    assert set(artifacts) == {one["id"] for one in OLD["artifacts"].values()}
    for expected in OLD["artifacts"].values():
        found = artifacts[expected["id"]]
        until = found.expires_at.isoformat() if found.expires_at else None
        assert (found.step, dict(found.labels), until) == (
            expected["step"], expected["labels"], expected["expires_at"],
        )  # fmt: skip
    keys = service.list_keys()
    assert (keys.primary, keys.artifacts) == (
        EXPECTED["keys"]["primary"], EXPECTED["keys"]["artifacts"],
    )  # fmt: skip


def test_its_api_keys_open_what_they_opened(service: ServiceClient) -> None:
    check: Any = service._registry.api_keys
    for name, key in OLD["api_keys"].items():
        if name in ("live", "narrow"):
            tenant, info = check.check(key["secret"], "default")
            assert (tenant, info.key_id, list(info.models)) == ("default", key["id"], key["models"])
        else:
            with pytest.raises(AccessDeniedError):
                check.check(key["secret"], "default")


def loss(tc: TrainingClient) -> float:
    tc.eval()
    found = tc.forward_backward(EXPECTED["evaluated"]).result().loss
    tc.train()
    return found


@pytest.mark.parametrize("name", ["plain", "lost"])
def test_a_run_comes_back_and_goes_on_as_it_did(service: ServiceClient, name: str) -> None:
    expected = OLD["resumed"][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another torch, lost steps
        tc = service.get_training_client(OLD["runs"][name]["id"])
    assert tc.step == expected["step"]
    tc.forward_backward({"input_ids": [ROWS[at] for at in expected["trained_rows"]]})
    stepped = tc.optim_step().result()
    assert stepped.grad_norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert stepped.learning_rate == pytest.approx(expected["learning_rate"])
    assert loss(tc) == pytest.approx(expected["evaluated_loss"], abs=2e-5)
    tc.save_state()
    tc.close()


@pytest.mark.parametrize("name", ["labelled", "weights only", "copied", "resealed", "parked"])
def test_an_artifact_loads_to_the_same_loss(service: ServiceClient, name: str) -> None:
    """It loads into its own run; another run would need the same adapter."""
    expected = OLD["artifacts"][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tc = service.get_training_client(OLD["runs"]["plain"]["id"])
        loaded = tc.load_state(expected["id"])
        assert "the artifact is of an older version" in " ".join(loaded.warnings)
        assert loss(tc) == pytest.approx(expected["evaluated_loss"], abs=2e-5)


@pytest.mark.parametrize("name", ["deleted", "shredded"])
def test_what_was_deleted_stays_so(service: ServiceClient, name: str) -> None:
    with pytest.raises(NotFoundError):
        service.get_artifact(OLD["gone"][name])


def test_a_private_run_goes_on_and_its_charge_follows_the_old_ledger(
    service: ServiceClient,
) -> None:
    run, expected = OLD["runs"]["participation"], OLD["datasets"]["people"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tc = service.get_training_client(run["id"])
    tc.forward_backward({"input_ids": [ROWS[1], ROWS[2]], "example_ids": ["one", "two"]})
    stepped = tc.optim_step().result()
    assert stepped.step == run["step"] + 1
    report = service.privacy_report("people")
    places = [f"{entry['seq']}-{entry['hash']}" for entry in report.entries]
    assert expected["place"] in places[:-1]
    assert report.ledger.epsilon >= expected["total_epsilon"] - 1e-9
    tc.close()


def test_a_new_private_run_on_an_old_data_set_is_charged_on_top(service: ServiceClient) -> None:
    before = service.privacy_report("people").ledger.epsilon
    dp = DPConfig(
        sampling="worst_case", noise_multiplier=20.0, target_epsilon=8.0, unit="id",
        target_delta=OLD["datasets"]["people"]["delta"],
    )  # fmt: skip
    config = TrainingConfig(
        model_ref=EXPECTED["model_ref"], lora_config=LoRAConfig(rank=2), dp_config=dp,
        dataset_id="people", max_steps=1,
    )  # fmt: skip
    with service.create_training_client(config) as tc:
        ids = [f"person {at}" for at in range(len(ROWS))]
        tc.forward_backward({"input_ids": ROWS, "example_ids": ids})
        tc.optim_step().result()
    assert service.privacy_report("people").ledger.epsilon > before


def test_another_tenant_of_it_is_as_it_was(service: ServiceClient) -> None:
    with ServiceClient(tenant="clinic") as clinic:
        assert clinic.verify_audit_log().seq >= CLINIC["audit_log"]["rows"]
        assert {one.artifact_id for one in clinic.list_artifacts()} == {
            one["id"] for one in CLINIC["artifacts"].values()
        }


def test_its_keys_rotate_and_retire(service: ServiceClient) -> None:
    """`k1` still opens artifacts of the old home. They are wrapped again, and open without it."""
    assert all(not problem for _, problem in service.rewrap_keys())
    service.retire_key("k1")
    assert [problem for problem in service.verify_artifacts() if problem[1]] == []
