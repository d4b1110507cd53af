"""Tests an old database that is restored under a real service: refused, then booked, then
trained on."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support import clusters
from support.privacy_helpers import ROWS
from support.storage_servers import free_ports
from tg_tinker import (
    DPBudgetExceededError,
    DPConfig,
    LedgerMismatchError,
    LoRAConfig,
    NotFoundError,
    RollbackError,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.cli.main import main
from tg_tinker.records.entries import Entry

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:a step has")]
DATA = "clinic-2026"


def config(model: Path) -> TrainingConfig:
    dp = DPConfig(noise_multiplier=4.0, target_epsilon=8.0, max_participations=4)
    return TrainingConfig(
        model_ref=str(model), lora_config=LoRAConfig(rank=2), batch_size=2, dataset_id=DATA,
        dp_config=dp,
    )  # fmt: skip


def step(tc: TrainingClient) -> Any:
    tc.forward_backward({"input_ids": ROWS[:2]})
    return tc.optim_step().result()


def set_aside(home: Path, where: Path) -> None:
    """Copies the database while no process has it open."""
    where.mkdir()
    for file in home.glob("registry.db*"):
        shutil.copy2(file, where / file.name)


def put_back(home: Path, where: Path) -> None:
    for file in home.glob("registry.db*"):
        file.unlink()
    for file in where.iterdir():
        shutil.copy2(file, home / file.name)


def entries(service: ServiceClient) -> list[Entry]:
    """Returns the entries as the database has them; the report would refuse an old database."""
    return list(service._registry.ledgers.entries(service._tenant, DATA))


def test_an_old_database_under_newer_heads_trains_nothing(
    embedded: None, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    old, heads = tmp_path / "old", home / "ledger-heads"
    with clusters.service() as service:
        tc = service.create_training_client(config(tiny_model))  # never closed, like a crash
        step(tc)
        saved = tc.save_state().artifact_id
        before = entries(service)
    set_aside(home, old)
    with clusters.service() as service:
        tc = service.get_training_client(tc.id)
        step(tc)
        newer = tc.save_state().artifact_id
        spent = step(tc).dp_metrics.total_epsilon
        lost = entries(service)[len(before) :]
    assert len(lost) == 2
    put_back(home, old)

    refusing: dict[str, Callable[[ServiceClient], object]] = {
        "create": lambda service: service.create_training_client(config(tiny_model)),
        "get": lambda service: service.get_training_client(tc.id),
        "register": lambda service: service.register_dataset(DATA, 8.0),
        "report": lambda service: service.privacy_report(DATA),
    }
    with clusters.service() as service:
        for who, part in (("both", None), ("the store", heads), ("home", home / "store/t")):
            if part is not None:  # only the other one still knows
                part.rename(tmp_path / "hidden")
            for what, act in refusing.items():
                with pytest.raises(LedgerMismatchError, match="newest copy") as caught:
                    act(service)
                assert caught.value.details["behind"], (who, what)
                assert f"tg-tinker privacy book-missing {DATA}" in caught.value.message
            if part is not None:
                (tmp_path / "hidden").rename(part)
        assert entries(service) == before  # nor was the dead run's reservation given back
        with pytest.raises(NotFoundError):
            service.get_artifact(newer)  # it replays into a registry that never published it
        assert "ledger_mismatch" in {row.outcome for row in service.audit_log()}

    accepted = CliRunner().invoke(main, ["registry", "accept", "--yes"])
    assert accepted.exit_code == 0, accepted.output
    with clusters.service() as service, pytest.raises(LedgerMismatchError):
        service.create_training_client(config(tiny_model))  # charges are not accepted by it
    unknown = CliRunner().invoke(main, ["privacy", "book-missing", "nope"])
    assert (unknown.exit_code, "'nope' has no ledger" in unknown.output) == (1, True)
    booked = CliRunner().invoke(main, ["privacy", "book-missing", DATA])
    assert booked.exit_code == 0, booked.output
    assert "2 missing charges were restored" in booked.output
    with clusters.service() as service:
        assert entries(service)[:-1] == before + lost
        assert service.privacy_report(DATA).total_epsilon == spent
        with (
            service.get_training_client(tc.id) as ended,
            pytest.raises(DPBudgetExceededError, match="new client"),
        ):
            ended.forward_backward({"input_ids": ROWS[:2]}).result()
        with service.create_training_client(config(tiny_model)) as fresh:
            assert fresh.load_state(saved).step == 1
            assert step(fresh).dp_metrics.total_epsilon > spent


def test_a_client_sends_what_it_saw_and_leaves_the_last_head_in_the_store(
    embedded: None, home: Path, tiny_model: Path
) -> None:
    with clusters.service() as service:
        with service.create_training_client(config(tiny_model)) as tc:
            step(tc)
            kept = tc._calls.link._kept
            assert kept is not None
            assert kept.newest is not None
            seen = kept.newest
            assert seen.hash == entries(service)[-1]["hash"]
            before = entries(service)
            kept.newest = replace(seen, seq=seen.seq + 5)  # as if the registry had gone back
            tc.forward_backward({"input_ids": ROWS[:2]})
            with pytest.raises(LedgerMismatchError):
                tc.optim_step().result()
            assert (entries(service), tc.step) == (before, 1)
            kept.newest = seen
            step(tc)
            last = entries(service)[-1]["hash"]
        stored = (home / "store/t/default/ledgers").rglob("*.json")
        assert any(last in path.name for path in stored)


def completion(url: str, model: str) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"model": model, "prompt": "abc", "max_tokens": 1}).encode()
    asked = urllib.request.Request(f"{url}/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


def test_an_old_database_under_newer_audit_heads_opens_nothing_that_was_shredded(
    embedded: None, home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    plain = TrainingConfig(model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2))
    bank = partial(clusters.service, tenant="bank")
    with bank() as service, service.create_training_client(plain) as tc:
        shredded = tc.save_state().artifact_id
    set_aside(home, tmp_path / "old")
    shutil.copytree(home / "store", tmp_path / "store")
    with bank() as service:
        service.shred_artifact(shredded)
    put_back(home, tmp_path / "old")
    shutil.copytree(tmp_path / "store", home / "store", dirs_exist_ok=True)
    with bank() as service:
        url = service.serve_http(str(tiny_model), port=free_ports(1)[0])
        uses: dict[str, Callable[[], object]] = {
            "create": lambda: service.create_training_client(plain),
            "get": lambda: service.get_training_client(tc.id),
            "export": lambda: service.export_adapter(shredded, tmp_path / "out"),
            "copy": lambda: service.copy_artifact(shredded),
        }
        for what, use in uses.items():
            with pytest.raises(RollbackError) as caught:
                use()
            assert caught.value.details["object"].startswith("t/bank/audit/"), what
        status, answer = completion(url, shredded)
        assert (status, answer["error"]["code"]) == (500, "rollback")
        assert not service.check_registry().sound
        assert service.accept_registry().openable == (shredded,)
        assert service.check_registry().sound
        assert completion(url, shredded)[0] == 200
        with service.get_training_client(tc.id) as back:
            assert back.load_state(shredded).artifact_id == shredded
        assert "older copy was accepted at row" in str(service.verify_audit_log())
