"""Tests artifacts on a real registry and store: what is restored, and every way in which nothing
may be."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.artifacts import adapters, delete, fetch, publish
from actors.artifacts.publish import Draft
from actors.engine.checkpoint import from_files, to_files
from actors.registry.registry import Registry
from actors.registry.rollback import kept
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.key_providers import FileKeyring
from actors.storage.keyring import parse_wrapped
from actors.storage.signing import PUBLIC_KEY
from actors.storage.store import ArtifactStore
from support.artifacts import (
    ADAPTER,
    NOTE,
    TENANT,
    TENSOR,
    WHEN,
    Service,
    assert_same,
    checkpoint,
)
from support.artifacts import service as service  # a fixture
from support.old_homes import FIXTURE
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
)
from tg_tinker.records.successions import Signers

# --- what comes back -------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, {}, {"x": torch.ones(3)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_published_state_comes_back_bit_for_bit(
    service: Service, optimizer: dict[str, torch.Tensor] | None, dtype: torch.dtype
) -> None:
    weights = {TENSOR: torch.randn(3, 5).to(dtype), "empty": torch.zeros(0, dtype=dtype)}
    saved = checkpoint(weights=weights, optimizer=optimizer)
    assert_same(service.fetch(service.publish(saved)), saved)


def test_an_artifact_of_several_segments_comes_back(service: Service) -> None:
    saved = checkpoint(size=2**18)
    assert_same(service.fetch(service.publish(saved)), saved)


def test_it_comes_back_through_another_registry_and_store(service: Service) -> None:
    artifact = service.publish()
    again = Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    store = ArtifactStore(str(service.root))
    assert_same(
        from_files(fetch.fetch(again, store, again.data_keys.reader(TENANT), artifact)),
        checkpoint(),
    )


def test_the_answer_says_what_is_on_disk_and_how_it_is_sealed(service: Service) -> None:
    draft = Draft(service.registry, service.store, service.capability, to_files(checkpoint()))
    size, seal = publish.publish(
        service.registry, service.store, draft, run_id=service.run, epoch=service.epoch, step=3,
        include_optimizer=True,
    )  # fmt: skip
    artifact = draft.artifact_id
    folder = [path for path in service.files_of(artifact) if path.parent.name == artifact]
    assert size == sum(path.stat().st_size for path in folder)
    info = service.registry.catalogue.get(TENANT, artifact)
    assert (info.size_bytes, info.step, info.include_optimizer) == (size, 3, True)
    assert (seal.algorithm, seal.format_version) == ("AES256_GCM_HKDF_1MB", 1)
    assert (seal.key_id, seal.key_provider) == service.registry.data_keys.key_info()


def test_two_saves_of_one_state_share_no_ciphertext(service: Service) -> None:
    one, other = service.publish(), service.publish()
    for mine, theirs in zip(service.files_of(one), service.files_of(other), strict=True):
        assert mine.read_bytes() != theirs.read_bytes()
    assert_same(service.fetch(one), service.fetch(other))


def test_the_files_lie_where_the_documentation_says(service: Service) -> None:
    artifact = service.publish()
    sealed = {f"{name}.enc" for name in to_files(checkpoint())}
    expected = {f"t/{TENANT}/a/{artifact}/{name}" for name in sealed | {"manifest.json"}}
    expected |= {f"t/{TENANT}/keys/{artifact}.json"}
    # Row 3, after its run was created and claimed:
    expected |= {f"t/{TENANT}/audit/{service.registry.audit_log.head(TENANT).place}.json"}
    assert {path.relative_to(service.root).as_posix() for path in service.files()} == expected
    manifest = json.loads((service.root / f"t/{TENANT}/a/{artifact}/manifest.json").read_text())
    assert set(manifest["files"]) == sealed


# --- what must not ---------------------------------------------------------------------------


def test_one_flipped_byte_anywhere_in_any_file_is_noticed(service: Service) -> None:
    """Covers every byte of the wrapped key, and bytes of all parts of manifest and sealed files."""
    artifact = service.publish()
    files = service.files_of(artifact)
    assert len(files) == 5
    for path in files:
        whole = path.read_bytes()
        some = (0, 1, 32, 33, 39, 40, len(whole) // 2, len(whole) - 17, len(whole) - 1)
        for position in range(len(whole)) if path.parent.name == "keys" else some:
            for pattern in (0x01, 0xFF):
                changed = bytearray(whole)
                changed[position] ^= pattern
                path.write_bytes(changed)
                with pytest.raises((IntegrityError, NotFoundError)):
                    service.fetch(artifact)
        path.write_bytes(whole)
    assert_same(service.fetch(artifact), checkpoint())


def test_a_wrapped_key_in_another_spelling_is_refused(service: Service) -> None:
    artifact = service.publish()
    path = service.root / f"t/{TENANT}/keys/{artifact}.json"
    found = json.loads(path.read_bytes())
    plain, name = json.dumps(found), found["key_id"]
    others = (
        json.dumps(found, indent=1), json.dumps(found | {"note": ""}), f"{plain}\n", f" {plain}",
        json.dumps(dict(reversed(found.items()))), json.dumps([*found.items()]),
        plain.replace(f'"{name}"', f'"\\u006b{name[1:]}"'),
        plain.replace("{", f'{{"key_id": "{name}", '), plain.replace("/", "\\/") + " ",
        plain.replace('="', '=="'), plain.replace('": "', '":"'),
    )  # fmt: skip
    for text in others:
        assert text != plain
        path.write_text(text)
        with pytest.raises(IntegrityError):
            service.fetch(artifact)


def test_the_keys_of_an_older_release_have_the_one_spelling() -> None:
    found = [*FIXTURE.glob("home/store/t/*/keys/*.json")]
    assert found
    for path in found:
        assert {*parse_wrapped(path.read_bytes())} == {"key_id", "wrapped"}


def test_a_changed_file_is_named(service: Service) -> None:
    artifact = service.publish()
    path = service.root / f"t/{TENANT}/a/{artifact}/optimizer.safetensors.enc"
    path.write_bytes(bytes(100))
    with pytest.raises(
        IntegrityError, match=r"optimizer\.safetensors\.enc.*not what was published"
    ):
        service.fetch(artifact)


def test_a_truncated_or_extended_file_is_noticed(service: Service) -> None:
    artifact = service.publish()
    for path in service.files_of(artifact):
        whole = path.read_bytes()
        for content in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", b"x" + whole):
            path.write_bytes(content)
            with pytest.raises((IntegrityError, NotFoundError)):
                service.fetch(artifact)
        path.write_bytes(whole)


def test_a_missing_file_is_named(service: Service) -> None:
    artifact = service.publish()
    for path in service.files_of(artifact):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(NotFoundError, match=path.name):
            service.fetch(artifact)
        path.write_bytes(whole)


def test_files_swapped_between_two_artifacts_are_noticed(service: Service) -> None:
    one, other = service.publish(), service.publish(checkpoint(step=4))
    for mine, theirs in zip(service.files_of(one), service.files_of(other), strict=True):
        a, b = mine.read_bytes(), theirs.read_bytes()
        mine.write_bytes(b)
        theirs.write_bytes(a)
        for artifact in (one, other):
            with pytest.raises(IntegrityError):
                service.fetch(artifact)
        mine.write_bytes(a)
        theirs.write_bytes(b)


def test_a_whole_artifact_put_in_the_place_of_another_is_noticed(service: Service) -> None:
    """Old weights under a new id, with their own manifest and key, would be a rollback."""
    old, new = service.publish(), service.publish(checkpoint(step=4))
    for mine, theirs in zip(service.files_of(old), service.files_of(new), strict=True):
        theirs.write_bytes(mine.read_bytes())
    with pytest.raises(IntegrityError):
        service.fetch(new)
    assert_same(service.fetch(old), checkpoint())


def test_files_swapped_inside_an_artifact_are_noticed(service: Service) -> None:
    artifact = service.publish()
    folder = service.root / f"t/{TENANT}/a/{artifact}"
    weights, optimizer = sorted(folder.glob("*.safetensors.enc"))
    a, b = weights.read_bytes(), optimizer.read_bytes()
    weights.write_bytes(b)
    optimizer.write_bytes(a)
    with pytest.raises(IntegrityError):
        service.fetch(artifact)


def test_another_keyring_opens_nothing(service: Service) -> None:
    service.publish()
    create(service.home / "other")
    keyring = service.home / "other" / KEYRING
    for _ in range(2):
        with pytest.raises(IntegrityError, match="another key than the 'k1'"):
            Registry(f"sqlite:///{service.home / DATABASE}", keyring)
        FileKeyring(keyring).rotate()  # its primary key has a name that is not known yet
    assert service.registry.data_keys.rotate(TENANT) == "k2"  # and was not noted as the other's


def test_another_tenant_fetches_exports_and_deletes_nothing(
    service: Service, tmp_path: Path
) -> None:
    artifact = service.publish()
    with pytest.raises(NotFoundError):
        service.fetch(artifact, tenant="bank")
    with pytest.raises(NotFoundError):
        delete.delete(service.registry, str(service.root), "bank", artifact)
    with pytest.raises(NotFoundError):
        adapters.export_adapter(
            service.registry, str(service.root), "bank", artifact, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
    assert_same(service.fetch(artifact), checkpoint())


@pytest.mark.parametrize("artifact", ["art-none", "", "../x", "art/../../keyring"])
def test_an_unknown_id_is_not_found_before_any_file_is_touched(
    service: Service, artifact: str
) -> None:
    with pytest.raises(NotFoundError, match="list_artifacts"):
        service.fetch(artifact)
    with pytest.raises(NotFoundError, match="list_artifacts"):
        delete.delete(service.registry, str(service.root), TENANT, artifact)
    assert (service.home / KEYRING).exists()


@pytest.mark.parametrize("files", [{}, {"state.json": b"{}"}, {"state.json": b"\xff"}])
def test_files_that_are_no_state_are_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(IntegrityError):
        from_files(files)


def test_a_state_with_broken_tensors_is_refused() -> None:
    files = to_files(checkpoint())
    for name in files:
        for content in (b"", b"junk", files[name][:-1]):
            with pytest.raises(IntegrityError):
                from_files(files | {name: content})


# --- deletion --------------------------------------------------------------------------------


def test_a_deleted_artifact_leaves_no_file_and_nothing_opens_it(service: Service) -> None:
    artifact, kept = service.publish(), service.publish()
    copies = {path: path.read_bytes() for path in service.files_of(artifact)}
    delete.delete(service.registry, str(service.root), TENANT, artifact)
    assert service.files_of(artifact) == []
    with pytest.raises(NotFoundError):
        service.fetch(artifact)
    for path, content in copies.items():  # an old copy is put back
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(NotFoundError):
        service.fetch(artifact)
    assert_same(service.fetch(kept), checkpoint())


def test_an_artifact_that_lost_its_manifest_can_be_deleted(service: Service) -> None:
    artifact = service.publish()
    (service.root / f"t/{TENANT}/a/{artifact}/manifest.json").unlink()
    delete.delete(service.registry, str(service.root), TENANT, artifact)
    assert service.files_of(artifact) == []
    assert service.registry.catalogue.find(TENANT) == []


def test_a_deletion_is_in_the_head_that_the_store_keeps(service: Service) -> None:
    """The head makes a database from before the deletion detectable."""
    artifact = service.publish()
    delete.delete(service.registry, str(service.root), TENANT, artifact)
    rows = service.registry.audit_log.rows(TENANT, 0, 100)
    public = (service.home / PUBLIC_KEY).read_bytes()
    newest = max(kept(str(service.root), TENANT, Signers(public)), key=lambda head: head.seq)
    assert (newest.seq, json.loads(rows[-1])["event"]) == (len(rows), "artifact.delete")


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_in_the_store_is_never_followed(
    service: Service, tmp_path: Path, inside: bool
) -> None:
    """A link may be the folder of an artifact, or be inside it.

    Anyone who can write to the store chooses its target.
    """
    mine = tmp_path / "mine"
    (mine / "deep").mkdir(parents=True)
    (mine / "manifest.json").write_text("{}")
    (mine / "deep" / "letter").write_text("dear")
    artifact = service.publish()
    folder = service.root / f"t/{TENANT}/a/{artifact}"
    if inside:
        (folder / "evil").symlink_to(mine)
        delete.delete(service.registry, str(service.root), TENANT, artifact)
        assert service.files_of(artifact) == []
    else:
        shutil.rmtree(folder)
        folder.symlink_to(mine)
        with pytest.raises(StorageError, match="symbolic link"):
            service.fetch(artifact)
        with pytest.raises(StorageError, match="symbolic link"):
            delete.delete(service.registry, str(service.root), TENANT, artifact)
    assert (mine / "deep" / "letter").read_text() == "dear"
    assert (mine / "manifest.json").exists()


def test_deleting_twice_is_not_found(service: Service) -> None:
    artifact = service.publish()
    delete.delete(service.registry, str(service.root), TENANT, artifact)
    with pytest.raises(NotFoundError):
        delete.delete(service.registry, str(service.root), TENANT, artifact)


# --- failures while saving -------------------------------------------------------------------


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """Lets no file of this process grow beyond the limit."""
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signal_before)


@pytest.mark.parametrize("limit_bytes", [0, 100, 1000, 200_000])
def test_a_full_disk_is_a_typed_error_and_leaves_nothing(
    service: Service, limit_bytes: int
) -> None:
    """Covers every file of the artifact, from the smallest to the one of 2 MiB."""
    kept = service.publish()
    before = {path: path.read_bytes() for path in service.files()}
    large = checkpoint(size=2**18)
    with full_disk(limit_bytes), pytest.raises(StorageError, match="free or fix the disk"):
        service.publish(large)
    assert {path: path.read_bytes() for path in service.files()} == before
    assert [info.artifact_id for info in service.registry.catalogue.find(TENANT)] == [kept]
    assert_same(service.fetch(service.publish(large)), large)


def test_a_disk_that_is_full_at_the_wrapped_key_keeps_no_part_of_it(service: Service) -> None:
    with full_disk(0), pytest.raises(StorageError):
        service.store.write_artifact(TENANT, "art-1", {}, b"key", lambda: b"{}")
    assert service.files() == []


def test_a_database_that_cannot_grow_is_a_typed_error_and_leaves_no_files(
    service: Service,
) -> None:
    log = service.home / f"{DATABASE}-wal"
    small = checkpoint(size=1, optimizer=None, weights={"b": torch.tensor(1.5)})
    largest = max(len(content) for content in to_files(small).values()) + 1000
    while log.stat().st_size < 2 * largest:  # the log is longer than any file of the artifact
        service.registry.runs.claim(service.registry.runs.create(TENANT, '{"model_ref": "m"}'))
    with full_disk(largest), pytest.raises(StorageError, match="database refused"):
        service.publish(small)
    assert service.files() == []
    assert service.registry.catalogue.find(TENANT) == []
    assert_same(service.fetch(service.publish(small)), small)


@pytest.mark.parametrize("off", [-1, 1])
def test_an_actor_of_another_epoch_publishes_nothing_and_leaves_no_file(
    service: Service, off: int
) -> None:
    with pytest.raises(ActorLostError):
        service.publish(epoch=service.epoch + off)
    assert service.files() == []
    assert service.registry.catalogue.find(TENANT) == []


def test_a_replaced_actor_publishes_nothing_and_harms_nothing(service: Service) -> None:
    kept = service.publish()
    service.registry.runs.claim(service.run)
    before = service.files()
    with pytest.raises(ActorLostError):
        service.publish()
    assert service.files() == before
    assert_same(service.fetch(kept), checkpoint())


def test_a_save_whose_tenant_key_was_retired_meanwhile_is_refused(service: Service) -> None:
    """The key is rotated, rewrapped and retired during the upload.

    The retirement does not count the artifact, and nothing could open it.
    """
    registry = service.registry

    def slow(store: ArtifactStore, draft: Draft) -> None:
        publish.write(store, draft)
        registry.data_keys.rotate(TENANT)
        registry.data_keys.retire(TENANT, "k1", {})

    draft = Draft(registry, service.store, service.capability, to_files(checkpoint()))
    with pytest.raises(StorageError, match="'k1' was retired"):
        publish.publish(
            registry, service.store, draft, run_id=service.run, epoch=service.epoch, step=3,
            include_optimizer=True, write=slow,
        )  # fmt: skip
    assert service.files_of(draft.artifact_id) == []


@pytest.mark.parametrize("entered", [True, False])
def test_a_save_whose_answer_is_lost_keeps_the_files_of_an_artifact(
    service: Service, monkeypatch: pytest.MonkeyPatch, entered: bool
) -> None:
    enter = service.registry.artifacts.publish

    def lost(*arguments: Any) -> None:
        if entered:
            enter(*arguments)
        raise ClusterUnavailableError("no answer")

    monkeypatch.setattr(service.registry.artifacts, "publish", lost)
    with pytest.raises(ClusterUnavailableError):
        service.publish()
    saved = service.registry.catalogue.find(TENANT)
    assert len(saved) == entered
    for info in saved:
        assert_same(service.fetch(info.artifact_id), checkpoint())
    assert entered or [path for path in service.files() if "/a/" in str(path)] == []


def test_files_without_a_manifest_are_no_artifact(service: Service) -> None:
    """A crash leaves such files, because a save writes the manifest last."""
    artifact = service.publish()
    (service.root / f"t/{TENANT}/a/{artifact}/manifest.json").unlink()
    with pytest.raises(NotFoundError, match=r"manifest\.json is not in the store"):
        service.fetch(artifact)


def test_the_manifest_is_the_last_file_written(service: Service) -> None:
    artifact = service.publish()
    times = {path.name: path.stat().st_mtime_ns for path in service.files_of(artifact)}
    assert times["manifest.json"] == max(times.values())
    written = [*to_files(checkpoint())]
    assert times[f"{artifact}.json"] >= max(times[f"{name}.enc"] for name in written)


# --- nothing readable at rest ----------------------------------------------------------------


def found_in(files: list[Path], text: str) -> list[str]:
    forms = [text.encode(), text.encode("utf-16-le"), text.encode().hex().encode()]
    return [p.name for p in files if any(f in p.read_bytes() + p.name.encode() for f in forms)]


def test_notes_tensor_names_run_and_adapter_never_appear_in_the_store(service: Service) -> None:
    service.publish()
    files = service.files()
    for text in (NOTE, TENSOR, "lora_A", "q_proj", service.run, WHEN.isoformat(), "geometry"):
        assert found_in(files, text) == []


def test_the_scan_would_find_what_is_stored_in_clear(service: Service) -> None:
    """This is the control: the scan finds the same files before they are sealed, and what a
    manifest contains."""
    artifact = service.publish()
    for name, content in to_files(checkpoint()).items():
        (service.root / name).write_bytes(content)
    for text in (NOTE, TENSOR, "lora_A", "q_proj", WHEN.isoformat(), "geometry", artifact):
        assert found_in(service.files(), text)


def test_weights_and_their_values_never_appear_in_the_store(service: Service) -> None:
    value = torch.randn(64)
    service.publish(checkpoint(weights={"w": value}, optimizer={"m": value}))
    for path in service.files():
        assert value.numpy().tobytes()[:16] not in path.read_bytes()


def test_folders_of_an_artifact_are_closed_to_others(service: Service) -> None:
    before = os.umask(0)
    try:
        artifact = service.publish()
    finally:
        os.umask(before)
    for path in service.files_of(artifact):
        assert path.parent.stat().st_mode & 0o077 == 0


# --- export ----------------------------------------------------------------------------------


def test_an_adapter_is_exported_as_a_peft_directory(service: Service, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    target = tmp_path / "new" / "adapter"
    adapters.export_adapter(service.registry, str(service.root), TENANT, service.publish(), target)
    assert {path.name for path in target.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    config = json.loads((target / "adapter_config.json").read_text())
    assert config == ADAPTER | {"base_model_name_or_path": "some/model"}
    weights = load_file(target / "adapter_model.safetensors")
    for name, tensor in checkpoint().state.weights.items():
        assert torch.equal(weights[name], tensor)


@pytest.mark.parametrize("kind", ["directory", "file", "gone", "hub id", "folder of a hub id"])
def test_an_export_names_a_base_that_others_find(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").touch()
    model_ref, named = {
        "directory": (str(tmp_path / "model"), str(tmp_path / "model")),
        "file": (str(tmp_path / "model.gguf"), None),
        "gone": (str(tmp_path / "gone"), None),
        "hub id": ("org/name", "org/name"),
        "folder of a hub id": ("~/name", None),
    }[kind]
    registry = service.registry
    run = registry.runs.create(TENANT, TrainingConfig(model_ref=model_ref).model_dump_json())
    epoch = registry.runs.claim(run)
    capability = registry.data_keys.capability(TENANT, run, epoch)
    artifact = replace(service, run=run, epoch=epoch, capability=capability).publish()
    sealed = {path: path.read_bytes() for path in service.files_of(artifact)}
    target = tmp_path / "adapter"
    adapters.export_adapter(service.registry, str(service.root), TENANT, artifact, target)
    found = json.loads((target / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == named
    assert {path: path.read_bytes() for path in service.files_of(artifact)} == sealed


def test_an_export_drops_the_notes_of_the_owner(service: Service, tmp_path: Path) -> None:
    adapters.export_adapter(
        service.registry, str(service.root), TENANT, service.publish(), tmp_path / "out"
    )
    assert found_in([*(tmp_path / "out").iterdir()], NOTE) == []


def test_a_full_fine_tune_is_no_adapter(service: Service, tmp_path: Path) -> None:
    artifact = service.publish(checkpoint(adapter_config=None))
    with pytest.raises(InvalidRequestError, match="full fine-tune, not an adapter"):
        adapters.export_adapter(
            service.registry, str(service.root), TENANT, artifact, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_a_changed_artifact_is_not_exported_at_all(service: Service, tmp_path: Path) -> None:
    artifact = service.publish()
    weights = service.root / f"t/{TENANT}/a/{artifact}/adapter_model.safetensors.enc"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError):
        adapters.export_adapter(
            service.registry, str(service.root), TENANT, artifact, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


# --- the audit log -----------------------------------------------------------------------------


class NoRoomForHeads(ArtifactStore):
    def write_audit_head(self, tenant: str, place: str, line: str) -> None:
        raise StorageError("the disk is full")


def test_an_artifact_is_there_although_the_store_took_no_head(service: Service) -> None:
    full = replace(service, store=NoRoomForHeads(str(service.root)))
    assert_same(service.fetch(full.publish()), checkpoint())


def full_disk_on_export(tenant: str, artifact_id: str) -> None:
    raise StorageError("the disk is full")


def test_what_is_not_in_the_audit_log_is_not_exported(service: Service, tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)
    registry.audit_log.record_export = full_disk_on_export  # type: ignore[method-assign]
    artifact = service.publish()
    with pytest.raises(StorageError, match="disk is full"):
        adapters.export_adapter(
            registry, str(service.root), TENANT, artifact, tmp_path / "out"
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
