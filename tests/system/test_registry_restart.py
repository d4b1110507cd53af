"""Tests a registry that is killed while a client runs: it is restored, and all work continues."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.registry import actor
from actors.registry.registry import PARTS
from support.clusters import registry_pid
from tg_tinker import DPConfig, LoRAConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.cluster import remote_registry
from tg_tinker.cluster.remote_registry import ONCE
from tg_tinker.errors import ClusterUnavailableError
from tg_tinker.records.ledger import Ledger

pytestmark = pytest.mark.slow

ROWS = {"input_ids": [[5, 6, 7, 8], [20, 21, 22], [30, 31, 32, 33]]}
LIFE = secrets.token_hex(32)


@pytest.fixture(scope="module")
def service(embedded: None) -> Iterator[ServiceClient]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(actor, "secrets", SimpleNamespace(token_hex=lambda size: LIFE))
        with ServiceClient("local", namespace="restarts") as service:
            yield service


@pytest.fixture(scope="module")
def client(service: ServiceClient, tiny_model: Path) -> Iterator[TrainingClient]:
    config = TrainingConfig(
        model_ref=str(tiny_model), lora_config=LoRAConfig(rank=4), batch_size=4,
        dp_config=DPConfig(noise_multiplier=100.0), dataset_id=f"d{secrets.token_hex(4)}",
    )  # fmt: skip
    with service.create_training_client(config) as client:
        yield client


def kill() -> None:
    os.kill(registry_pid(), signal.SIGKILL)


def step(client: TrainingClient) -> Any:
    client.forward_backward(ROWS).result(60)
    return client.optim_step().result(60)


def charges(service: ServiceClient, client: TrainingClient) -> list[dict[str, Any]]:
    entries = service._registry.ledgers.entries("default", client.config.dataset_id)
    Ledger.replay(entries)
    return [entry for entry in entries if entry["type"] == "charge"]


def test_a_client_trains_saves_and_samples_across_kills_of_the_registry(
    service: ServiceClient, client: TrainingClient
) -> None:
    key = service._registry.key
    step(client)
    calls: list[Callable[[], Any]] = [
        lambda: step(client),
        lambda: client.save_state().artifact_id,
        lambda: client.sample(["hello"], max_tokens=4),
        lambda: service.list_artifacts(),
        lambda: client.load_state(service.list_artifacts()[-1].artifact_id),
        lambda: client.info(),
    ]
    for call in calls:
        kill()
        call()
    assert len(charges(service, client)) == 2
    kill()
    with ServiceClient(namespace="restarts") as again:
        assert again._registry.key == key == service._registry.key
        other = again.get_training_client(client.id)
        assert step(other).step == client.step == 3
        assert len(charges(again, client)) == 3


def test_kills_during_steps_charge_each_of_them_once_and_note_each_once(
    service: ServiceClient, client: TrainingClient
) -> None:
    """The kills come at random times: in a charge, in its answer, or while the registry starts."""
    before, first = len(charges(service, client)), client.step

    def kill_often() -> None:
        for _ in range(5):
            time.sleep(secrets.randbelow(100) / 200)
            with suppress(ProcessLookupError):
                kill()

    killer = threading.Thread(target=kill_often)
    killer.start()
    receipts = [step(client)]
    while killer.is_alive():
        receipts.append(step(client))
    made = charges(service, client)[before:]
    assert len({entry["charge"] for entry in made}) == len(made) == len(receipts)
    spent = [receipt.dp_metrics.total_epsilon for receipt in receipts]
    assert spent == sorted(set(spent))
    client.close()  # the last step is noted by then
    rows = [row for row in service.audit_log(limit=10_000) if row.event == "step"]
    noted = [row.details["step"] for row in rows if row.subject == client.id]
    assert noted[-len(receipts) :] == [*range(first + 1, first + len(receipts) + 1)]


def test_what_must_not_be_done_twice_fails_and_says_so(
    service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, real = service._registry, service._registry.actor.call

    class Killed:
        """A method whose call arrives and whose answer does not."""

        def remote(self, sealed: bytes) -> Any:
            os.kill(registry_pid(), signal.SIGSTOP)
            ref = real.remote(sealed)
            kill()
            return ref

    kill()  # a registry that is away is waited for, and then asked once
    before = len(service.list_api_keys())
    service.create_api_key("one")
    monkeypatch.setattr(registry.actor, "call", Killed())
    with pytest.raises(ClusterUnavailableError, match="not known whether the call was done"):
        registry.api_keys.create("default", "two", [], None)
    monkeypatch.undo()
    assert len(service.list_api_keys()) == before + 1


def test_a_registry_that_is_silent_is_told_of_and_goes_on_when_it_wakes(
    service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_registry, "_ANSWER_S", 2.0)
    frozen = registry_pid()
    os.kill(frozen, signal.SIGSTOP)
    try:
        for call in (service.list_artifacts, lambda: service.create_api_key("three")):
            with pytest.raises(ClusterUnavailableError, match="the registry has not answered"):
                call()
    finally:
        os.kill(frozen, signal.SIGCONT)
    monkeypatch.undo()
    assert service.list_artifacts()


def test_a_registry_that_ray_was_told_to_end_is_gone_at_once(embedded: None) -> None:
    import ray

    with ServiceClient("local", namespace="ended") as service:
        ray.kill(service._registry.actor)
        started = time.monotonic()
        error: Exception | None = None
        while error is None and time.monotonic() - started < 30:  # Ray ends it a moment later
            try:
                service.list_artifacts()
            except ClusterUnavailableError as refused:
                error = refused
        assert "registry's actor is gone" in str(error)
        assert time.monotonic() - started < 30


def test_the_transport_key_follows_from_nothing_that_lies_on_disk(
    service: ServiceClient, home: Path
) -> None:
    """The signing key is on disk.

    The other half of the transport key, and the transport key itself, are not.
    """
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    secrets_of_it = [LIFE.encode(), service._registry.key, service._registry.key.hex().encode()]
    found = [
        path
        for folder in (session, home)
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size < 2**28
        if any(part in path.read_bytes() for part in secrets_of_it)
    ]
    assert found == []


def test_a_rotation_of_the_transport_secret_leaves_a_running_cluster_its_key(
    service: ServiceClient,
) -> None:
    key = service._registry.key
    service.rotate_secret("transport")
    kill()
    assert service.list_artifacts() is not None
    with ServiceClient(namespace="restarts") as again:
        assert again._registry.key == key


# --- every method is one or the other --------------------------------------------------------

READ = {
    "api_keys.of",
    "api_keys.problems",
    "api_keys.wanted",
    "audit_log.accepted",
    "audit_log.accepting",
    "audit_log.missed",
    "audit_log.successions",
    "audit_log.tenants",
    "audit_log.unknown",
    "catalogue.all",
    "catalogue.check_manifest",
    "catalogue.entries",
    "catalogue.expired",
    "catalogue.find",
    "catalogue.get",
    "catalogue.gone",
    "catalogue.openable",
    "catalogue.reachable",
    "catalogue.reaches",
    "catalogue.stored_as",
    "data_keys.capability",
    "data_keys.held",
    "data_keys.keeper",
    "data_keys.key_ids",
    "data_keys.key_info",
    "data_keys.key_of",
    "data_keys.missing_keys",
    "data_keys.new",
    "data_keys.reader",
    "data_keys.rewrapped",
    "data_keys.rewrapped_held",
    "heads.judge",
    "heads.ledger_head",
    "heads.ledger_name",
    "heads.ledger_names",
    "heads.lost_ledgers",
    "heads.met",
    "heads.refuse_unmet",
    "heads.signed_again",
    "heads.strangers",
    "heads.unknown",
    "ledgers.at_limit",
    "ledgers.counted_units",
    "ledgers.datasets",
    "ledgers.entries",
    "ledgers.known_units",
    "ledgers.privacy_info",
    "ledgers.unit_key",
    "ledgers.unit_keys",
    "orphans.of",
    "runs.get",
    "runs.of",
    "runs.resume_point",
}
"""They change nothing."""

REFUSE = {
    "api_keys.check",
    "audit_log.rows",
    "audit_log.settle",
    "heads.check_lineage",
    "heads.meet_ledger",
    "heads.meet_store",
    "ledgers.admit",
}
"""At most they note a refusal, or write the rows that wait."""

SAME = {
    "artifacts.finish_reseal",
    "artifacts.note_loaded",
    "artifacts.publish",
    "artifacts.publish_copy",
    "audit_log.head",
    "catalogue.set_expiry",
    "catalogue.set_labels",
    "data_keys.rewrap_unit_keys",
    "ledgers.charge",
    "ledgers.draw",
    "ledgers.drop",
    "ledgers.evaluate",
    "ledgers.link",
    "ledgers.note_units",
    "ledgers.open_account",
    "ledgers.register",
    "ledgers.release",
    "orphans.bury",
    "orphans.note",
    "runs.claim",
    "runs.finish",
    "runs.park",
    "runs.record",
}
"""Again they change nothing, or come to the same: two claims raise the epoch, the later counts."""

NOTED_AGAIN = {
    "artifacts.begin_reseal",
    "audit_log.record_export",
    "audit_log.record_import",
    "audit_log.record_sample",
    "data_keys.adopt",
    "data_keys.open",
}
"""They leave another row of the audit log, or skip a name in the store."""


def test_every_method_is_known_to_be_safe_to_repeat_or_is_not_repeated() -> None:
    methods = {
        f"{part}.{name}" for part, kind in PARTS.items() for name in dir(kind) if name[0] != "_"
    }
    parts = [READ, REFUSE, SAME, NOTED_AGAIN, set(ONCE)]
    assert methods == set().union(*parts)
    assert sum(map(len, parts)) == len(methods)
