"""Tests the folder of Ray's sockets: where it is, and what is told before Ray fails there."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import validate_socket_filepath

from support.listener import Listener
from support.other_user import as_nobody, needs_root
from tg_tinker import ClusterUnavailableError, InvalidRequestError
from tg_tinker.cluster import connection, node
from tg_tinker.cluster.other_users import keeps_out
from tg_tinker.cluster.ray_folder import SOCKET, check_ray_folder, ray_folder

ROOM = 107 - len(f"/ray/{SOCKET}")


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("value", ["/scratch", "", "a", None])
def test_the_folder_is_the_one_that_ray_takes(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/other")
    if value is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, value)
    assert str(ray_folder()) == get_default_ray_temp_dir()


def test_a_path_that_just_fits_is_taken_and_one_longer_is_refused() -> None:
    fits = "/" + "x" * (ROOM - 1)
    check_ray_folder({"TMPDIR": fits})
    validate_socket_filepath(f"{fits}/ray/{SOCKET}")
    with pytest.raises(InvalidRequestError, match=f"TMPDIR, which has {ROOM + 1} characters"):
        check_ray_folder({"TMPDIR": f"{fits}x"})
    with pytest.raises(OSError, match="cannot exceed"):
        validate_socket_filepath(f"{fits}x/ray/{SOCKET}")


def test_a_short_folder_of_rays_own_makes_a_long_one_harmless() -> None:
    check_ray_folder({"TMPDIR": "/" + "x" * 104, "RAY_TMPDIR": tempfile.gettempdir()})
    check_ray_folder({})


@pytest.mark.usefixtures("embedded")
def test_no_socket_of_ray_has_a_longer_path() -> None:
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    sockets = [path for path in folder.rglob("*") if path.is_socket()]
    assert len(sockets) >= 2
    longest = max(len(str(path.relative_to(folder.parent))) for path in sockets)
    assert longest <= len(SOCKET)


@needs_root
@pytest.mark.usefixtures("embedded")
def test_another_user_gets_at_no_file_of_an_embedded_cluster() -> None:
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert keeps_out(session / "sockets")
    raylet = session / "sockets/raylet"
    assert raylet.is_socket()
    for attack in (
        lambda: os.listdir(session),  # noqa: PTH208
        lambda: raylet.rename(session / "sockets/moved"),
        lambda: socket.socket(socket.AF_UNIX).connect(str(raylet)),
        lambda: (session / "logs/raylet.out").read_text(),
    ):
        assert as_nobody(attack) == "PermissionError"
    connection.check_requires_token()


@pytest.mark.parametrize(
    "folder", ["/scratch/" + "x" * 100, "/\u00fc", "scratch", "", "/it's", "/etc/passwd"]
)
def test_an_unusable_folder_is_told_before_anything_starts(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself fails with four types of errors, or after half a minute."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", folder)
    home = tmp_path / "home"
    monkeypatch.setenv("TG_TINKER_HOME", str(home))
    monkeypatch.setattr(connection, "lazy_ray", lambda: pytest.fail("Ray was loaded"))
    with pytest.raises(InvalidRequestError, match=r"below TMPDIR.*set RAY_TMPDIR"):
        connection.connect("local")
    home.mkdir()
    with pytest.raises(InvalidRequestError, match=r"below TMPDIR.*set RAY_TMPDIR"):
        node.start(home, environment=os.environ)
    assert list(home.iterdir()) == []
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(InvalidRequestError, match=r"below RAY_TMPDIR"):
        connection.connect("local")


def test_any_failure_of_rays_start_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (Exception("the node timed out"), OSError(28, "No space left"), KeyError("x")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(ray, "init", fail)
        with pytest.raises(ClusterUnavailableError, match="Ray did not start") as caught:
            connection.connect("local")
        assert "space" not in str(caught.value)


def test_an_embedded_cluster_starts_for_this_user_alone_whatever_the_umask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's processes make their sockets with the umask that they start with."""
    seen = []

    def started(*_: object, **__: object) -> None:
        seen.append(os.umask(0o077))
        raise KeyError

    monkeypatch.setattr(ray, "init", started)
    before = os.umask(0)
    try:
        with pytest.raises(ClusterUnavailableError):
            connection.connect("local")
        assert os.umask(0) == 0, "the program has its own again"
    finally:
        os.umask(before)
    assert seen == [0o077]


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_cluster_that_ray_start_noted_below_another_folder_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(connection, "_SHARED", tmp_path / "shared")
    monkeypatch.setenv(name, str(tmp_path))
    assert connection.running_cluster() is None
    with Listener(b"") as cluster:
        note = tmp_path / "ray/ray_current_cluster"
        note.parent.mkdir()
        note.write_text(f"127.0.0.1:{cluster.port}")
        assert connection.running_cluster() == f"127.0.0.1:{cluster.port}"
        note.write_bytes(b"\xff")
        assert connection.running_cluster() is None
