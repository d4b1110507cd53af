"""Tests a machine with other users: what they may write, replace, read and listen at."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._common.utils import try_to_create_directory

from support.listener import Listener
from support.other_user import NOBODY, as_nobody, needs_root, nobody_at_it, nobody_listens
from tg_tinker import ClusterUnavailableError, InvalidRequestError
from tg_tinker.cluster import authentication, connection, node
from tg_tinker.cluster.other_users import (
    is_closed,
    is_exposed,
    keeps_names,
    keeps_out,
    others_listen,
    read_own,
)
from tg_tinker.cluster.ray_folder import private_ray_folder
from tg_tinker.errors import StorageError

USUAL = f"tg-{os.geteuid()}"


@pytest.fixture
def shared() -> Iterator[Path]:
    """Yields a temporary directory of all users; those of pytest are closed to others."""
    with tempfile.TemporaryDirectory(prefix="tg", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty home, in an environment that names no cluster."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TG_TINKER_HOME", str(tmp_path))
    monkeypatch.setattr(connection, "_SHARED", tmp_path / "none")
    return tmp_path


def temporary(folder: Path) -> dict[str, str]:
    return {"TMPDIR": str(folder)}


# --- Ray's folder --------------------------------------------------------------------------------


def test_ray_keeps_its_files_in_a_folder_that_only_its_user_enters(shared: Path) -> None:
    found = private_ray_folder(temporary(shared))
    assert found == shared / USUAL / "ray"
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    assert private_ray_folder(temporary(shared)) == found


def test_a_folder_that_is_closed_already_gets_no_other_one(shared: Path) -> None:
    shared.chmod(0o700)
    assert private_ray_folder(temporary(shared)) == shared / "ray"
    assert [*shared.iterdir()] == []


def test_the_name_of_the_closed_folder_takes_room(shared: Path) -> None:
    fits = shared / ("x" * (24 - len(str(shared))))
    longer = fits.with_name(f"{fits.name}x")
    for folder in (fits, longer):
        folder.mkdir(mode=0o755)
    assert len(str(private_ray_folder(temporary(fits)))) <= 39 + len("/ray")
    with pytest.raises(InvalidRequestError, match=r"26 characters.*leave room for 25"):
        private_ray_folder(temporary(longer))
    longer.chmod(0o700)
    assert private_ray_folder(temporary(longer)) == longer / "ray"


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_folder_that_is_not_there_is_made_closed(shared: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert private_ray_folder(temporary(shared / "a/b")) == shared / "a/b/ray"
    finally:
        os.umask(before)
    assert is_closed(shared / "a")
    assert is_closed(shared / "a/b")


def test_a_link_is_followed_once_and_not_by_ray(
    shared: Path, tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(shared)
    assert private_ray_folder(temporary(tmp_path / "link")) == shared / USUAL / "ray"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(InvalidRequestError, match="set RAY_TMPDIR"):
        private_ray_folder(temporary(tmp_path / "round"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "round"))
    assert connection.running_cluster() is None


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_in_which_others_may_rename_is_refused(shared: Path, mode: int) -> None:
    (shared / "below").mkdir(mode=0o700)
    shared.chmod(mode)
    for folder in (shared, shared / "below", shared / "new"):
        with pytest.raises(InvalidRequestError, match=r"other users replace.*set RAY_TMPDIR"):
            private_ray_folder(temporary(folder))
    assert {path.name for path in shared.iterdir()} == {"below"}


@needs_root
def test_a_sticky_folder_of_another_user_is_refused(shared: Path) -> None:
    """Its owner may rename what is in it."""
    os.chown(shared, NOBODY, NOBODY)
    with pytest.raises(InvalidRequestError, match="other users replace"):
        private_ray_folder(temporary(shared))


@needs_root
@pytest.mark.parametrize("squat", ["folder", "link", "link to ours", "nothing", "file", "closed"])
def test_a_name_that_another_user_took_first_is_left_to_him(shared: Path, squat: str) -> None:
    usual, ours = shared / USUAL, shared / "ours"
    ours.mkdir(mode=0o700)
    take: dict[str, Callable[[], Any]] = {
        "folder": lambda: (usual.mkdir(), usual.chmod(0o777)),
        "link": lambda: usual.symlink_to("/"),
        "link to ours": lambda: usual.symlink_to(ours),
        "nothing": lambda: usual.symlink_to(shared / "missing"),
        "file": usual.touch,
        "closed": lambda: usual.mkdir(mode=0o700),
    }
    as_nobody(lambda: take[squat]() and None)
    assert usual.lstat().st_uid == NOBODY
    found = private_ray_folder(temporary(shared)).parent
    assert found not in (usual, ours)
    assert found.parent == shared
    assert is_closed(found)


@needs_root
def test_another_user_neither_sees_nor_replaces_what_ray_makes(shared: Path) -> None:
    sockets = private_ray_folder(temporary(shared)) / "session/sockets"
    try_to_create_directory(str(sockets))  # as Ray does: open to all
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o777
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(sockets / "raylet"))
        for attack in (
            lambda: os.listdir(sockets),  # noqa: PTH208
            lambda: os.listdir(shared / USUAL),  # noqa: PTH208
            lambda: (sockets / "raylet").rename(sockets / "moved"),
            lambda: (shared / USUAL).rename(shared / "moved"),
            (sockets / "raylet").unlink,
            lambda: socket.socket(socket.AF_UNIX).connect(str(sockets / "raylet")),
            lambda: (shared / USUAL).chmod(0o777),
        ):
            assert as_nobody(attack) == "PermissionError"


@pytest.mark.parametrize("join", [None, "127.0.0.1:1"])
def test_each_node_of_up_keeps_its_files_in_a_closed_folder(
    shared: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch, join: str | None
) -> None:
    class Started(Exception):  # noqa: N818
        pass

    def launched(arguments: list[str], *_: object) -> None:
        assert f"{shared / USUAL}/ray" == arguments[arguments.index("--temp-dir") + 1]
        raise Started

    monkeypatch.setattr(node, "_launched", launched)
    monkeypatch.setattr(node, "_check_free", lambda *_: None)
    monkeypatch.setattr(node, "answers", lambda _: True)
    monkeypatch.setattr(node, "check_authenticated", lambda *_: None)
    with pytest.raises(Started):
        node.start(empty_home, join=join, environment=temporary(shared))


# --- the address of a cluster --------------------------------------------------------------------


def noted(folder: Path, address: str) -> Path:
    """Writes a note as `ray start` does, in a folder that it opens to all."""
    try_to_create_directory(str(folder / "ray"))
    note = folder / "ray/ray_current_cluster"
    note.write_text(address)
    return note


def test_a_note_where_others_may_write_must_be_named(
    shared: Path,
    empty_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TMPDIR", str(shared))
    with Listener(b"") as cluster:
        address = f"127.0.0.1:{cluster.port}"
        noted(shared, address)
        with pytest.raises(ClusterUnavailableError, match="name it, by `address`"):
            connection.running_cluster()
        assert connection.fitting_cluster() is None
        (warned,) = caplog.messages
        assert "passed over, because it was not named" in warned
        shared.chmod(0o700)
        assert connection.running_cluster() == address
        shared.chmod(0o755)
        (shared / "ray").chmod(0o755)
        assert connection.running_cluster() == address
        (shared / "ray").chmod(0o1777)  # sticky is not enough where the file itself is
        with pytest.raises(ClusterUnavailableError, match="name it"):
            connection.running_cluster()
    assert connection.running_cluster() is None  # it does not answer


@needs_root
def test_no_file_link_or_folder_of_another_user_names_a_cluster(
    shared: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(shared))
    with Listener(b"") as cluster:
        address = f"127.0.0.1:{cluster.port}"
        ours, lent = shared / "ours", shared / "lent"
        for one in (ours, lent):
            one.write_text(address)
        lent.chmod(0o666)  # else the kernel may refuse a second name for it
        note = noted(shared, address)
        note.unlink()
        for attack in (
            lambda: note.write_text(address),
            lambda: note.symlink_to(ours),
            lambda: note.hardlink_to(lent),
            lambda: os.mkfifo(note),
            note.mkdir,
        ):
            made = as_nobody(lambda attack=attack: attack() and None)  # type: ignore[misc]
            if made is None:
                for folder in (0o777, 0o1777, 0o755):
                    (shared / "ray").chmod(folder)
                    assert connection.running_cluster() is None
                (shared / "ray").chmod(0o777)
                note.rmdir() if note.is_dir() else note.unlink()


@needs_root
def test_another_user_does_not_choose_among_clusters_of_ours(
    shared: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(shared))
    with Listener(b"") as cluster:
        address = f"127.0.0.1:{cluster.port}"
        noted(empty_home, address)
        as_nobody(lambda: (shared / "ray").symlink_to(empty_home / "ray"))
        assert connection.running_cluster() is None
        (shared / "ray").unlink()
        (shared / "ray").symlink_to(empty_home / "ray")  # our own choice
        assert connection.running_cluster() == address


@needs_root
def test_what_another_user_flips_is_never_taken(
    shared: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.setattr(node, "answers", lambda address: ":" in address)
    note = noted(shared, "10.9.9.9:1")
    note.rename(shared / "ours")
    his, swap = shared / "his", shared / "ray/swap"
    as_nobody(lambda: his.write_text("10.6.6.6:1"))

    def flip() -> None:
        for place in (shared / "ours", his):
            swap.unlink(missing_ok=True)
            swap.symlink_to(place)
            swap.replace(note)
        swap.write_text("10.6.6.6:1")
        swap.replace(note)

    deadline, calls = time.monotonic() + 1, 0
    with nobody_at_it(flip):
        while time.monotonic() < deadline or calls < 100:
            assert connection.running_cluster() is None
            calls += 1


def test_what_was_checked_is_what_is_read(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note, his = shared / "note", shared / "his"
    note.write_text("10.9.9.9:1")
    his.write_text("10.6.6.6:1")
    fstat = os.fstat

    def swapped(descriptor: int) -> os.stat_result:
        note.rename(shared / "away")
        his.rename(note)
        return fstat(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", swapped)
        assert read_own(note) == "10.9.9.9:1"
    assert note.read_text() == "10.6.6.6:1"


@needs_root
def test_the_port_of_another_users_program_is_no_cluster_of_ours(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that was killed leaves its note, and anyone may listen at its port then."""
    monkeypatch.setenv("RAY_TMPDIR", str(empty_home))
    with nobody_listens() as address:
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
            noted(empty_home, f"{host}:{address.partition(':')[2]}")
            assert connection.running_cluster() is None
        up = node.Node(address, "", os.getpid(), node._begun(os.getpid()))
        (empty_home / "node.json").write_text(json.dumps(vars(up)))
        assert connection.running_cluster() is None


@pytest.mark.parametrize("named", ["auto", None])
def test_ray_is_never_asked_to_find_a_cluster(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    """It would take the first program of anybody whose command line looks like a GCS."""
    monkeypatch.setattr(connection, "lazy_ray", lambda: pytest.fail("Ray was asked"))
    monkeypatch.setattr(connection, "_start_embedded", lambda: None)
    if named is None:
        assert connection.connect(None)
        monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterUnavailableError, match="no cluster runs here"):
        connection.connect(named)


def test_the_cluster_of_up_is_found_by_its_home(empty_home: Path) -> None:
    mine = node.Node("10.0.0.1:1", "", os.getpid(), node._begun(os.getpid()))
    (empty_home / "node.json").write_text(json.dumps(vars(mine)))
    assert connection.running_cluster() == "10.0.0.1:1"


@needs_root
def test_a_node_that_another_user_notes_is_not_read(empty_home: Path, shared: Path) -> None:
    mine = node.Node("10.0.0.1:1", "", os.getpid(), node._begun(os.getpid()))
    for make in ("link", "file", "open"):
        note = shared / make
        note.write_text(json.dumps(vars(mine)))
        if make == "file":
            os.chown(note, NOBODY, NOBODY)
        if make == "open":
            note.chmod(0o666)
        place = shared / "node.json"
        place.symlink_to(note) if make == "link" else note.rename(place)
        assert node.read(shared) is None
        place.unlink()


@pytest.mark.parametrize("address", ["h:99999", "127.0.0.1:-1", "\u00fc" * 99 + ":1", ":", "x"])
def test_what_is_no_address_answers_nothing(address: str) -> None:
    assert not node.answers(address)
    assert not others_listen(address)


def test_a_pipe_does_not_hold_a_program_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_own(tmp_path / "pipe") is None
    assert read_own(tmp_path / "none") is None
    assert read_own(tmp_path) is None


def test_a_missing_folder_keeps_nothing(tmp_path: Path) -> None:
    assert not keeps_out(tmp_path / "none")
    assert not keeps_names(tmp_path / "none")


# --- the token -----------------------------------------------------------------------------------


@pytest.fixture
def user(shared: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a user's home directory that all may enter."""
    shared.chmod(0o755)
    monkeypatch.setenv("HOME", str(shared))
    return shared


def test_the_token_is_made_closed_and_whole(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, linked = os.link, []

    def watched(made: Path, token: Path) -> None:
        linked.append(token)
        assert stat.S_IMODE(made.stat().st_mode) == 0o600
        assert len(made.read_text()) == 64
        link(made, token)

    monkeypatch.setattr(os, "link", watched)
    before = os.umask(0)
    try:
        authentication.make_token()
    finally:
        os.umask(before)
    token = user / ".ray/auth_token"
    assert [*token.parent.iterdir()] == linked == [token]
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert is_closed(token.parent)
    text = token.read_text()
    authentication.make_token()
    assert token.read_text() == text


@needs_root
def test_another_user_reads_no_token(user: Path) -> None:
    authentication.make_token()
    token = user / ".ray/auth_token"
    assert as_nobody(lambda: os.listdir(token.parent)) == "PermissionError"  # noqa: PTH208
    assert as_nobody(token.read_text) == "PermissionError"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_token_that_others_could_read_is_refused_wherever_it_is_used(
    user: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = user / ".ray/auth_token"
    token.parent.mkdir(mode=0o755)
    token.write_text("hunter2" * 9)
    token.chmod(mode)
    monkeypatch.setattr(connection, "lazy_ray", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr(node, "answers", lambda _: True)
    calls: list[Callable[[], object]] = [
        authentication.make_token,
        authentication.check_token,
        lambda: connection.connect("local"),
        lambda: connection.connect("10.0.0.1:1"),
    ]
    for call in calls * 2:  # a refusal does not hide what it refuses
        with pytest.raises(StorageError, match=f"mode {mode:04o}.*remove it") as caught:
            call()
        assert "hunter2" not in str(caught.value)
    token.chmod(0o600)
    assert authentication.check_token()
    assert is_closed(token.parent)


def test_a_token_in_a_closed_home_was_read_by_nobody(user: Path) -> None:
    user.chmod(0o700)
    token = user / ".ray/auth_token"
    token.parent.mkdir()
    token.touch(mode=0o644)
    assert not is_exposed(token)
    assert authentication.check_token()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


@needs_root
def test_a_token_of_another_user_is_refused(user: Path) -> None:
    token = user / ".ray/auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    os.chown(token, NOBODY, NOBODY)
    with pytest.raises(StorageError, match="another owner"):
        authentication.make_token()
    token.unlink()
    os.chown(token.parent, NOBODY, NOBODY)
    token.parent.chmod(0o777)
    with pytest.raises(StorageError, match="others may write"):
        authentication.make_token()


def test_a_home_that_a_group_may_write_to_is_not_mended_by_a_new_token(user: Path) -> None:
    user.chmod(0o775)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"others may write.*chmod go-w") as caught:
            authentication.make_token()
        assert "remove it" not in str(caught.value)
    user.chmod(0o755)
    assert authentication.check_token()


@pytest.mark.parametrize("taken", ["link", "folder", "no folder"])
def test_a_token_that_cannot_be_made_is_not_left_to_ray(user: Path, taken: str) -> None:
    token = user / ".ray/auth_token"
    if taken == "no folder":
        token.parent.touch()
    else:
        token.parent.mkdir()
        token.symlink_to(user / "elsewhere") if taken == "link" else token.mkdir()
    with pytest.raises(StorageError, match="cannot make Ray's token"):
        authentication.make_token()
    assert not (user / "elsewhere").exists()


def test_a_folder_that_a_group_may_write_to_is_closed(user: Path) -> None:
    """Ray makes it so under the umask of many systems."""
    authentication.make_token()
    (user / ".ray").chmod(0o775)
    assert authentication.check_token()
    assert is_closed(user / ".ray")


def test_a_token_file_that_is_named_is_only_warned_of(
    user: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container's secret may have a mode that nobody there can change."""
    (user / "secret").touch(mode=0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(user / "secret"))
    assert authentication.check_token()
    assert not caplog.records
    (user / "secret").chmod(0o644)
    authentication.make_token()
    assert "mode 0644" in caplog.text
    assert not (user / ".ray").exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(user / "none"))
    assert not authentication.check_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    assert authentication.check_token()


def test_an_embedded_ray_starts_with_folder_token_and_mode_of_ours(
    user: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):  # noqa: N818
        pass

    def init(*_: object, **options: Any) -> None:
        assert is_closed(Path(options["_temp_dir"]).parent)
        assert stat.S_IMODE((user / ".ray/auth_token").stat().st_mode) == 0o600
        assert os.environ["RAY_AUTH_MODE"] == "token"
        raise Started

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterUnavailableError, match="Started"):
        connection.connect("local")
