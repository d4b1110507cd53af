"""Tests a save and a rotation in which any one system call fails, or kills the process.

`test_store_disk` does the same to the store alone; here registry, keys and sweep take part.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.artifacts import fetch, publish
from actors.artifacts.publish import Draft
from actors.operations import keys
from actors.operations.sweep import sweep
from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING
from actors.storage.store import ArtifactStore
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from support.disks import Calls
from tg_tinker import NotFoundError, StorageError

FILES = {"weights": bytes(range(256)) * 40, "state": b"{}"}


def reopened(service: Service) -> Registry:
    return Registry(f"sqlite:///{service.home / DATABASE}", service.home / KEYRING)


def save(service: Service, registry: Registry, draft: Draft) -> None:
    publish.publish(
        registry, service.store, draft, run_id=service.run, epoch=service.epoch, step=1,
        include_optimizer=False,
    )  # fmt: skip


def spoiled(work: Callable[[], object], spoil: Callable[[int], None]) -> int:
    """Runs `work` with some system calls spoiled, one file at a time; returns the number of
    calls."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("actors.storage.store.PARALLEL", 1)
        calls = Calls(monkeypatch, spoil)
        work()
    return calls.made


def killed(work: Callable[[], object], k: int) -> bool:
    """Runs `work` in a child that dies at call `k`; returns False if it makes fewer calls."""
    child = os.fork()
    if not child:
        status = 1
        try:
            spoiled(work, lambda call: os.kill(os.getpid(), signal.SIGKILL) if call == k else None)
            status = 0
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    assert ended in (0, signal.SIGKILL)
    return bool(ended)


def is_there(registry: Registry, service: Service, artifact: str) -> bool:
    """Returns whether an artifact exists and is whole; False when nothing knows of it."""
    store = ArtifactStore(str(service.root))
    known = artifact in {info.artifact_id for info in registry.catalogue.find(TENANT)}
    if not known:
        with pytest.raises(NotFoundError):
            fetch.fetch(registry, store, registry.data_keys.reader(TENANT), artifact)
        return False
    assert fetch.fetch(registry, store, registry.data_keys.reader(TENANT), artifact) == FILES
    return True


def names(service: Service) -> set[str]:
    below = service.root / "t" / TENANT
    found = {path.relative_to(below).as_posix() for path in below.rglob("*") if path.is_file()}
    return {name for name in found if name != "clock" and not name.startswith("audit/")}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("onwards", [False, True], ids=["once", "from then on"])
def test_a_disk_that_fails_at_any_call_of_a_save_leaves_it_out_or_whole(
    service: Service, number: int, onwards: bool
) -> None:
    save(
        service, service.registry, Draft(service.registry, service.store, service.capability, FILES)
    )
    total = spoiled(
        lambda: save(
            service,
            service.registry,
            Draft(service.registry, service.store, service.capability, FILES),
        ),
        lambda call: None,
    )
    outcomes = []
    for k in range(1, total + 1):
        draft, error = Draft(service.registry, service.store, service.capability, FILES), None

        def spoil(call: int, k: int = k) -> None:
            if call == k or (onwards and call > k):
                raise OSError(number, os.strerror(number))

        try:
            spoiled(lambda draft=draft: save(service, service.registry, draft), spoil)
        except StorageError as caught:
            error = caught
        outcomes.append(is_there(service.registry, service, draft.artifact_id))
        assert outcomes[-1] == (error is None), k
        told = ("may be left", "kept files")  # by a disk that does not even delete
        if error and not any(words in error.message for words in told):
            assert not any(draft.artifact_id in name for name in names(service)), k
    assert outcomes == sorted(outcomes)  # once it is entered only a head can fail, and may
    assert {*outcomes} == {False, True}


def test_a_save_that_is_killed_at_any_call_is_out_or_whole_and_swept(service: Service) -> None:
    outcomes, k = [], 0
    while True:
        k += 1
        draft = Draft(service.registry, service.store, service.capability, FILES)
        died = killed(lambda draft=draft: save(service, reopened(service), draft), k)
        registry = reopened(service)
        outcomes.append(is_there(registry, service, draft.artifact_id))
        for _ in range(2):
            list(sweep(registry, service.store, TENANT, 0))
        needed = {info.artifact_id for info in registry.catalogue.find(TENANT)}
        assert len(names(service)) == 4 * len(needed), k
        assert is_there(registry, service, draft.artifact_id) == outcomes[-1]
        if not died:
            break
    assert outcomes == sorted(outcomes)
    assert k > 5 * 6  # files, each: open, write, fsync, rename, open and fsync of the folder


def test_a_rotation_that_is_killed_at_any_call_is_finished_later(service: Service) -> None:
    known = [Draft(service.registry, service.store, service.capability, FILES) for _ in range(2)]
    for draft in known:
        save(service, service.registry, draft)

    def rotate() -> None:
        registry = reopened(service)
        registry.data_keys.rotate(TENANT)
        assert [problem for _, problem in keys.rewrap(registry, str(service.root))] == ["", ""]

    k, died = 0, True
    while died:
        k += 1
        died = killed(rotate, k)
        registry = reopened(service)
        assert all(is_there(registry, service, draft.artifact_id) for draft in known), k
        root = str(service.root)
        assert [problem for _, problem in keys.rewrap(registry, root)] == ["", ""]
        *older, primary = registry.data_keys.key_ids()
        assert keys.uses(registry, root).artifacts == dict.fromkeys(older, 0) | {primary: 2}
        for key_id in older:
            keys.retire(registry, root, TENANT, key_id)
        assert all(is_there(registry, service, draft.artifact_id) for draft in known), k
        for _ in range(2):
            list(sweep(registry, service.store, TENANT, 0))
        assert len(names(service)) == 4 * len(known), k
    assert k > 10


def test_a_killed_child_is_told_from_one_that_ended(tmp_path: Path) -> None:
    """This is the control of the two tests above."""
    assert killed(lambda: (tmp_path / "x").open("xb").close(), 1)
    assert not (tmp_path / "x").exists()
    assert not killed(lambda: (tmp_path / "x").open("xb").close(), 5)
    assert (tmp_path / "x").exists()
