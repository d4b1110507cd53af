"""Tests a store on a disk that fails at any call, and processes that are killed while they
write."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Event

import pytest

from actors.storage.objects import LocalFolder
from actors.storage.store import MANIFEST, ArtifactStore
from support.disks import Calls
from support.stores import (
    ARTIFACT,
    CONTENT_OF_MANIFEST,
    FILES,
    KEY,
    TENANT,
    is_whole,
    names,
)
from tg_tinker.errors import IntegrityError, NotFoundError, StorageError


def saves(folder: Path, spoil: Callable[[int], None]) -> tuple[ArtifactStore, Exception | None]:
    """Saves while some system calls are spoiled; returns the store and the error."""
    store = ArtifactStore(str(folder))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("actors.storage.store.PARALLEL", 1)
        Calls(monkeypatch, spoil)
        try:
            store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
        except Exception as error:
            return store, error
    return store, None


def calls_of_a_save(folder: Path) -> int:
    made = 0

    def spoil(number: int) -> None:
        nonlocal made
        made = number

    saves(folder, spoil)
    return made


def test_a_save_makes_calls_that_can_be_spoiled(tmp_path: Path) -> None:
    """There are five files at least, each with open, write, fsync, rename, and open and fsync of
    the folder."""
    assert calls_of_a_save(tmp_path / "s") >= 5 * 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("onwards", [False, True], ids=["once", "from then on"])
def test_an_error_of_the_disk_at_any_call_leaves_nothing(
    tmp_path: Path, number: int, onwards: bool
) -> None:
    for k in range(1, calls_of_a_save(tmp_path / "whole") + 1):

        def spoil(call: int, k: int = k) -> None:
            if call == k or (onwards and call > k):
                raise OSError(number, os.strerror(number))

        store, error = saves(tmp_path / str(k), spoil)
        assert isinstance(error, StorageError), k
        assert os.strerror(number) in str(error)
        assert error.details["errno"] == number
        assert not is_whole(store), k
        if "may be left" in str(error):  # the disk refused to make the removal durable
            assert onwards
        else:
            assert store.objects.list_below() == [], k
    assert saves(tmp_path / str(k), lambda _: None)[1] is None  # the disk is fine again
    assert is_whole(store)


def test_a_process_killed_at_any_call_leaves_no_artifact_or_a_whole_one(tmp_path: Path) -> None:
    total = calls_of_a_save(tmp_path / "counted")
    whole = []
    for k in range(1, total + 1):
        folder = tmp_path / str(k)
        child = os.fork()
        if not child:
            saves(
                folder, lambda call, k=k: os.kill(os.getpid(), signal.SIGKILL) if call == k else 0
            )
            os._exit(1)  # it should be dead
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        store = ArtifactStore(str(folder))
        whole.append(is_whole(store))
        store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
        assert is_whole(store)
        store.delete(TENANT, ARTIFACT)
        left = [name for name in names(store.objects) if "/keys/." not in name]
        assert left == []
    assert whole == sorted(whole)  # once it is there it stays
    assert True in whole
    assert False in whole


def test_what_a_killed_write_left_is_listed_and_goes_with_its_folder(tmp_path: Path) -> None:
    objects = LocalFolder(tmp_path)
    objects.put("a/b/x", b"1")
    (tmp_path / "a/b/.y.0badf00d").write_bytes(b"part")
    assert names(objects, "a") == ["a/b/.y.0badf00d", "a/b/x"]
    objects.delete_all("a/b")
    assert names(objects) == []
    assert not (tmp_path / "a/b").exists()


def special(folder: Path) -> Iterator[Path]:
    """Yields paths that exist and are not plain files."""
    folder.mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    yield folder / "pipe"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    yield folder / "socket"
    with suppress(PermissionError):  # a container may make none
        os.mknod(folder / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
        yield folder / "zero"


def test_what_is_no_plain_file_is_no_object_and_holds_nobody_up(tmp_path: Path) -> None:
    store = LocalFolder(tmp_path)
    for path in special(tmp_path / "t"):
        name = f"t/{path.name}"
        for read in (store.read, store.size):
            with pytest.raises(NotFoundError, match=f"{name} is not in the store"):
                read(name)
    assert store.list_below() == []
    store.delete_all("t")
    assert [*tmp_path.iterdir()] == []


def test_a_head_or_key_without_end_is_refused_before_memory_is(tmp_path: Path) -> None:
    """A file with a hole costs its maker nothing."""
    store = ArtifactStore(str(tmp_path))
    store.write_artifact(TENANT, ARTIFACT, FILES, KEY, lambda: CONTENT_OF_MANIFEST)
    store.write_audit_head(TENANT, "1-ff", "{}")
    folder = tmp_path / f"t/{TENANT}"
    for path in (folder / "audit/1-ff.json", folder / f"keys/{ARTIFACT}.json",
                 folder / f"a/{ARTIFACT}/{MANIFEST}", folder / f"a/{ARTIFACT}/a.enc"):  # fmt: skip
        os.truncate(path, 2**40)
    assert store.read_head(f"t/{TENANT}/audit/1-ff.json") == ""
    calls: list[Callable[[], bytes]] = [
        lambda: store.read_key(TENANT, ARTIFACT),
        lambda: store.read(TENANT, ARTIFACT, MANIFEST),
        lambda: store.read(TENANT, ARTIFACT, "a.enc", 5000),
    ]
    for call in calls:
        with pytest.raises(IntegrityError, match="longer than what was put there"):
            call()


def test_names_that_a_stranger_gave_are_listed_as_text(tmp_path: Path) -> None:
    """They are shown neither as commands to a terminal, nor as bytes that are no text."""
    folder = tmp_path / "t" / TENANT / "audit"
    folder.mkdir(parents=True)
    for name in (
        b"\x1b[2J\x1b]0;owned\x07.json",
        b"\xff.json",
        "a\u202eb".encode(),
        "\u00e4".encode(),
    ):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).touch()
    store = ArtifactStore(str(tmp_path))
    found = [info.name for info in store.objects.list_below()]
    assert len(found) == 4
    assert all(name.isprintable() for name in found)
    assert f"t/{TENANT}/audit/\\x1b[2J\\x1b]0;owned\\x07.json" in found
    assert f"t/{TENANT}/audit/\u00e4" in found
    assert [store.read_head(name) for name in store.audit_heads(TENANT)] == [""] * 4


def test_folders_are_for_their_owner_only(tmp_path: Path) -> None:
    ArtifactStore(str(tmp_path / "new/store")).objects.put("a/b/c", b"x")
    for folder in ("new", "new/store", "new/store/a", "new/store/a/b"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


def test_every_new_name_is_made_durable_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    objects = LocalFolder(tmp_path / "s")
    objects.put("a/b", b"x")
    order = [path.relative_to(tmp_path).as_posix() for path in synced]
    assert [*order[:2], order[3]] == [".", "s", "s/a"]
    assert order[2].startswith("s/a/.b.")
    synced.clear()
    objects.delete("a/b")
    assert synced == [tmp_path / "s/a"]


def test_creating_has_one_winner_on_a_local_folder(tmp_path: Path) -> None:
    objects = LocalFolder(tmp_path)
    contents = [b"%d" % number for number in range(8)]
    for name in map(str, range(20)):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(objects.create, [name] * 8, contents))
        assert won.count(True) == 1
        assert objects.read(name) == contents[won.index(True)]


def test_files_are_written_together_and_a_failure_waits_for_all(tmp_path: Path) -> None:
    """A write that is still under way after a failed save would create its file again after the
    removal."""
    together, go_on = Barrier(3, timeout=30), Event()

    def pieces(fails: bool) -> Iterator[bytes]:
        together.wait()
        if fails:
            raise KeyError("first")
        go_on.wait(1)  # still writing when the other has failed
        yield b"late"

    files = {"fails": pieces(True), "late": pieces(False), "later": pieces(False)}
    store = ArtifactStore(str(tmp_path))
    with pytest.raises(KeyError, match="first"):
        store.write_artifact(TENANT, ARTIFACT, files, KEY, lambda: CONTENT_OF_MANIFEST)
    go_on.set()
    assert store.objects.list_below() == []


def test_files_are_open_to_this_user_alone_whatever_the_umask_of_the_program(
    tmp_path: Path,
) -> None:
    """A program writes heads into the store itself, beside the actors."""
    store, before = LocalFolder(tmp_path), os.umask(0)
    try:
        store.put("audit/head", b"1")
        store.create("other", b"1")
    finally:
        os.umask(before)
    found = [one for one in tmp_path.rglob("*") if one.stat().st_mode & 0o077]
    assert found == []
