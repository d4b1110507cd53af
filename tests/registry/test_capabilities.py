"""Tests who gets a data key: the actor of a run in its epoch, readers, and nobody else."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.artifacts import fetch
from actors.artifacts.publish import Draft
from actors.engine.checkpoint import from_files, to_files
from actors.operations import keys, verify
from actors.registry.audit_log import ANYONE, SDK
from actors.registry.registry import Registry
from actors.storage.capabilities import READER, RUN, Capability, Issuer
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.key_providers import new_text
from actors.storage.secrets import Secrets
from serve_app.replica.sources import Sources
from support.artifacts import TENANT, Service, assert_same, checkpoint
from support.artifacts import service as service  # a fixture
from tg_tinker import LoRAConfig, ServiceClient, TrainingConfig
from tg_tinker.errors import (
    AccessDeniedError,
    ActorLostError,
    InvalidRequestError,
    NotFoundError,
    TGTinkerError,
)
from tg_tinker.storage.envelope import derive_key, new_key, open_payload

THEM = "bank"
CONFIG = TrainingConfig(model_ref="some/model").model_dump_json()


def client(registry: Registry, tenant: str = TENANT) -> Capability:
    """Returns the capability of the living actor of a new run."""
    run = registry.runs.create(tenant, CONFIG)
    return registry.data_keys.capability(tenant, run, registry.runs.claim(run))


def seen(registry: Registry, tenant: str = TENANT) -> list[tuple[str, str, str, str]]:
    rows = [json.loads(line) for line in registry.audit_log.rows(tenant, 0, 1000)]
    return [(row["who"], row["event"], row["subject"], row["outcome"]) for row in rows]


def opened(service: Service, capability: Capability, artifact: str) -> bytes:
    wrapped = service.store.read_key(TENANT, artifact)
    return service.registry.data_keys.open(capability, artifact, wrapped, service.store.root)


# --- what a capability allows --------------------------------------------------------------------


def test_an_actor_makes_artifacts_and_reads_those_of_all_runs_of_its_tenant(
    service: Service,
) -> None:
    artifact, other = service.publish(), client(service.registry)
    files = fetch.fetch(service.registry, service.store, other, artifact)
    assert_same(from_files(files), checkpoint())
    assert seen(service.registry)[-1] == (other.who, "artifact.load", artifact, "ok")
    assert len(service.registry.data_keys.new(other, "art-new", service.store.root)[0]) == 32


def test_a_reader_reads_and_makes_nothing(service: Service) -> None:
    artifact, reader = service.publish(), service.registry.data_keys.reader(TENANT)
    assert opened(service, reader, artifact) == opened(service, service.capability, artifact)
    before = seen(service.registry)
    with pytest.raises(AccessDeniedError, match="reader makes no artifacts"):
        service.registry.data_keys.new(reader, "the patient in bed 7", service.store.root)
    refusal = (SDK, "artifact.save", "", "access_denied")
    assert seen(service.registry) == [*before, refusal], "or text was noted that anyone may choose"


def test_the_audit_log_names_the_reader_that_was_given_a_capability(service: Service) -> None:
    artifact = service.publish()
    sources = Sources(service.registry, new_key(), "tg", str(service.root), "some/model")
    sources.find(TENANT, (), artifact, "api-key 7").fetch()
    assert seen(service.registry)[-1] == ("api-key 7", "artifact.load", artifact, "ok")
    assert [*verify.verify(service.registry, str(service.root), TENANT)] == [(artifact, "")]
    assert seen(service.registry)[-1] == (SDK, "artifact.load", artifact, "ok")
    with pytest.raises(InvalidRequestError):
        service.registry.data_keys.reader(TENANT, service.capability.who)


def test_a_capability_outlives_a_restart_a_rotation_and_the_end_of_a_key(service: Service) -> None:
    """An actor that has trained for days must still be able to save."""
    service.registry.data_keys.rotate(TENANT)
    [*keys.rewrap(service.registry, str(service.root))]
    keys.retire(service.registry, str(service.root), TENANT, "k1")
    again = Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    artifact = replace(service, registry=again).publish()
    assert len(opened(replace(service, registry=again), service.capability, artifact)) == 32


# --- what it does not ----------------------------------------------------------------------------


def uses(service: Service, artifact: str) -> list[Callable[[Capability], object]]:
    return [
        lambda shown: service.registry.data_keys.new(shown, "art-new", service.store.root),
        lambda shown: opened(service, shown, artifact),
    ]


def test_an_actor_that_was_replaced_or_ended_is_given_no_key(service: Service) -> None:
    artifact, old = service.publish(), service.capability
    for end in (
        lambda: service.registry.runs.claim(service.run),
        lambda: service.registry.runs.finish(service.run, service.epoch + 1, "completed"),
    ):
        end()
        for use in uses(service, artifact):
            with pytest.raises(ActorLostError, match="get_training_client"):
                use(old)
    assert seen(service.registry)[-3:-1] == [  # again within a minute: only counted
        (old.who, "artifact.save", "art-new", "actor_lost"),
        (old.who, "artifact.load", artifact, "actor_lost"),
    ]


def test_a_replaced_actor_learns_it_before_it_copies_or_stores_anything(service: Service) -> None:
    service.registry.runs.claim(service.run)
    with pytest.raises(ActorLostError):
        Draft(service.registry, service.store, service.capability, to_files(checkpoint()))
    assert service.files() == []


@pytest.mark.parametrize("off", [-1, 1])
def test_no_capability_is_issued_for_another_epoch(service: Service, off: int) -> None:
    with pytest.raises(ActorLostError):
        service.registry.data_keys.capability(TENANT, service.run, service.epoch + off)


def test_no_capability_is_issued_for_the_run_of_another_tenant(service: Service) -> None:
    for tenant, run in ((THEM, service.run), (TENANT, "tc-none")):
        with pytest.raises(NotFoundError):
            service.registry.data_keys.capability(tenant, run, service.epoch)


def test_an_artifact_that_is_there_gets_no_second_key(service: Service) -> None:
    """A deleted artifact gets none either, because its id would make it exist again."""
    artifact, deleted = service.publish(), service.publish()
    service.registry.artifacts.delete(TENANT, deleted)
    for shown in (service.capability, client(service.registry), client(service.registry, THEM)):
        for taken in (artifact, deleted):
            with pytest.raises(AccessDeniedError, match="an artifact of this id"):
                service.registry.data_keys.new(shown, taken, service.store.root)
            row = (shown.who, "artifact.save", taken, "access_denied")
            assert seen(service.registry, shown.tenant)[-1] == row


def test_another_tenant_learns_nothing_and_the_owner_learns_of_it(service: Service) -> None:
    artifact = service.publish()
    for them in (client(service.registry, THEM), service.registry.data_keys.reader(THEM)):
        before = seen(service.registry, THEM)
        with pytest.raises(NotFoundError) as foreign:
            opened(service, them, artifact)
        with pytest.raises(NotFoundError) as missing:
            service.registry.data_keys.open(them, "art-none", b"{}", service.store.root)
        assert str(foreign.value).replace(artifact, "art-none") == str(missing.value)
        assert seen(service.registry, THEM) == before
    assert seen(service.registry)[-1] == (ANYONE, "artifact.ask", artifact, "access_denied")
    assert THEM not in str(seen(service.registry))


def forgeries(service: Service) -> Iterator[Capability]:
    own, reader = service.capability, service.registry.data_keys.reader(TENANT)
    other = client(service.registry)
    yield replace(own, who=f"{service.run}@{service.epoch + 1}")
    yield replace(own, who=other.who)  # the right run with another's tag
    yield replace(own, tenant=THEM)
    yield replace(reader, kind=RUN, who=own.who)
    yield replace(own, kind=READER)
    yield replace(own, serial=reader.serial)
    yield replace(reader, serial="")
    yield replace(reader, who=f"{reader.who}{reader.serial}", serial="")
    yield replace(client(service.registry, THEM), tenant=TENANT)
    for tag in (b"", own.tag[:-1], own.tag + b"\0", bytes(32), own.tag[::-1], reader.tag):
        yield replace(own, tag=tag)
    for position in range(32):
        tag = bytearray(own.tag)
        tag[position] ^= 1
        yield replace(own, tag=bytes(tag))


def test_a_forged_capability_is_refused_and_noted(service: Service) -> None:
    artifact = service.publish()
    for forged in forgeries(service):
        for use in uses(service, artifact):
            with pytest.raises(AccessDeniedError, match="not issued here"):
                use(forged)
    noted = [row for row in seen(service.registry) if row[0] == ANYONE]
    assert noted == [  # the same again within a minute is counted
        (ANYONE, "artifact.save", "", "access_denied"),
        (ANYONE, "artifact.load", artifact, "access_denied"),
        (ANYONE, "artifact.ask", artifact, "access_denied"),  # with the name of another tenant
    ]


def test_what_a_forger_writes_is_in_no_row_and_no_error(service: Service) -> None:
    text = "the patient in bed 7"
    forged = Capability(RUN, text, text, bytes(32))
    for shown in (forged, replace(forged, tenant=TENANT)):
        with pytest.raises(AccessDeniedError) as caught:
            service.registry.data_keys.new(shown, text, service.store.root)
        assert text not in str(caught.value)
    assert text not in str(seen(service.registry))
    assert seen(service.registry, text) == []


def test_a_capability_of_another_registry_is_none_here(service: Service, tmp_path: Path) -> None:
    create(tmp_path / "other")
    there = Registry(f"sqlite:///{tmp_path / 'other' / DATABASE}", tmp_path / "other" / KEYRING)
    with pytest.raises(AccessDeniedError):
        opened(service, there.data_keys.reader(TENANT), service.publish())


class FixedSecrets(Secrets):
    """One secret that is on no disk."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def keys(self, name: str, purpose: bytes) -> dict[int, bytes]:
        return {1: derive_key(self._secret, purpose)}


def cuts(text: str) -> st.SearchStrategy[tuple[str, str, str]]:
    """Returns a strategy that cuts a text into three parts."""
    places = st.lists(st.integers(0, len(text)), min_size=2, max_size=2).map(sorted)
    return places.map(lambda at: (text[: at[0]], text[at[0] : at[1]], text[at[1] :]))


@given(
    st.text(alphabet='ab", @\n', min_size=1, max_size=9).flatmap(
        lambda text: st.lists(cuts(text), min_size=2, max_size=2)
    )
)
def test_no_two_clients_share_a_capability(two: list[tuple[str, str, str]]) -> None:
    """Not even two readers of the same tenant and name."""
    issuer = Issuer(FixedSecrets(b"secret"))
    first, second = (issuer.issue(*one) for one in two)
    assert first.tag != second.tag
    assert issuer.genuine(first)
    for other in (replace(first, tag=second.tag), replace(first, serial=second.serial)):
        assert not issuer.genuine(other)
    assert not Issuer(FixedSecrets(b"another")).genuine(first)


def test_each_reader_and_keeper_has_a_capability_of_its_own(service: Service) -> None:
    keys = service.registry.data_keys
    shown = [keys.reader(TENANT), keys.reader(TENANT), keys.keeper(TENANT), keys.keeper(TENANT)]
    assert len({one.tag for one in shown}) == len({one.serial for one in shown}) == 4
    again = keys.capability(TENANT, service.run, service.epoch)
    assert again == service.capability, "an actor that restarts is the same client"


# --- nothing shows a key or a tag ----------------------------------------------------------------


def test_neither_tag_nor_data_key_shows_in_a_row_a_repr_an_error_or_the_database(
    service: Service,
) -> None:
    artifact = service.publish()
    key = opened(service, service.capability, artifact)
    said = [repr(service.capability), str(service.capability), repr(service.registry)]
    for use in uses(service, artifact):
        with pytest.raises(TGTinkerError) as caught:
            use(replace(service.capability, who="tc-x@1"))
        said += [str(caught.value), repr(caught.value), str(caught.value.to_wire())]
    stored = b"".join(path.read_bytes() for path in service.home.glob("registry.db*"))
    shown = "".join(said).encode() + stored + str(seen(service.registry)).encode()
    for secret in (key, service.capability.tag):
        texts = (secret.hex(), base64.b64encode(secret).decode(), repr(secret))
        assert not any(form in shown for form in (secret, *(text.encode() for text in texts)))


# --- in a real service ---------------------------------------------------------------------------


def holds(pid: int, needle: bytes) -> bool:
    """Returns whether the writable memory of a process contains some bytes, read from outside."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in maps:
            place, mode, *_ = line.split()
            start, end = (int(part, 16) for part in place.split("-"))
            if mode != "rw-p":
                continue
            try:
                memory.seek(start)
                if needle in memory.read(end - start):
                    return True
            except (OSError, ValueError):  # such as [vvar]
                continue
    return False


@pytest.mark.slow
def test_the_tenant_key_never_enters_a_training_actor(
    home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def look(_: Any) -> tuple[int, set[str]]:  # in here, so that it travels by value
        return os.getpid(), set(os.environ)

    text, decoy = new_text(), new_text()
    monkeypatch.setenv("CLINIC_KEYS", text)
    monkeypatch.setenv("OLD_KEYS", decoy)
    raw = base64.b64decode(json.loads(text)["keys"]["k1"])
    started: list[dict[str, Any]] = []
    with ServiceClient(address="local", keyring="env:CLINIC_KEYS") as service:
        assert not (home / KEYRING).exists()
        start = service._cluster.start_training
        monkeypatch.setattr(
            service._cluster, "start_training", lambda **a: started.append(a) or start(**a)
        )
        config = TrainingConfig(model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2))
        with service.create_training_client(config) as tc:
            saved = tc.save_state()
            assert tc.load_state(saved.artifact_id).step == 0
            assert saved.encryption.key_provider == "env"
            (arguments,) = started
            shown = open_payload(service._registry.key, arguments["capability"])
            assert shown.who == f"{tc.id}@1"
            assert shown.tag not in b"".join(v for v in arguments.values() if type(v) is bytes)
            names = (f"{tc.id}@1", "tg_tinker.storage", "tg_tinker.registry")
            actors = [ray.get_actor(name, namespace="tg_tinker") for name in names]
            training, storage, registry = ray.get(
                [actor.__ray_call__.remote(look) for actor in actors]
            )
            for _, variables in (training, storage):
                assert not {"CLINIC_KEYS", "OLD_KEYS"} & variables
            try:
                found = [holds(pid, raw) for pid, _ in (training, storage, registry)]
            except PermissionError:
                pytest.skip("this system lets nobody read the memory of a process")
            assert found == [False, False, True]
