"""Tests users without a home that they may write to, as in containers that run under a number."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.storage import home
from support.other_user import as_nobody, needs_root, open_to_others
from tg_tinker import InvalidRequestError, ServiceClient, StorageError, TGTinkerError
from tg_tinker.client.home import check_home, init_home
from tg_tinker.cluster import authentication
from tg_tinker.cluster.authentication import make_token, name_token, token_file
from tg_tinker.storage.home import home_directory

ROOT = Path(__file__).parents[2]
NUMBER = "54321"
_PROGRAM = """
from tg_tinker import ServiceClient
with ServiceClient(address="local") as service:
    print(service.register_dataset("clinic", 1.5) or "it works")
"""


@pytest.fixture
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this user one that the system's list lacks, without HOME."""

    def none(_: Any) -> Any:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", none)
    for name in ("HOME", "TG_TINKER_HOME", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def said(work: Callable[[], Any]) -> Callable[[], str]:
    def to_text() -> str:
        try:
            return str(work())
        except TGTinkerError as error:
            return f"{type(error).__name__}: {error.message}"

    return to_text


@pytest.mark.usefixtures("_unknown")
@pytest.mark.parametrize(
    "entry", [home_directory, check_home, init_home, make_token, ServiceClient]
)
def test_a_user_without_any_home_is_told_which_variable_to_set(entry: Callable[[], Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"is unknown: set TG_TINKER_HOME to a folder"):
        entry()


@pytest.mark.usefixtures("_unknown")
def test_the_token_of_a_user_without_a_home_is_in_the_home_of_tg_tinker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tg"
    monkeypatch.setenv("TG_TINKER_HOME", str(place))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    assert token_file() == place / "ray-token"
    name_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(place / "ray-token"), "for Ray's processes"
    make_token()
    assert (place / "ray-token").stat().st_mode & 0o777 == 0o600
    assert home.create(place), "the folder is still a new home, and closed"
    (place / "ray-token").chmod(0o644)
    open_to_others(place)
    with pytest.raises(StorageError, match="others may read it"):
        authentication.check_token()


def test_a_user_with_a_home_keeps_the_token_of_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("TG_TINKER_HOME", str(tmp_path / "tg"))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert token_file() == tmp_path / "user/.ray/auth_token"
    name_token()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "~/mine")
    assert token_file() == tmp_path / "user/mine"


@needs_root
@pytest.mark.parametrize("where", ["closed above", "not ours", "no folder"])
@pytest.mark.parametrize("entry", [check_home, init_home, ServiceClient])
def test_a_home_that_this_user_cannot_use_is_named_with_the_variable(
    where: str, entry: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_others(tmp_path)
    place = {"closed above": tmp_path / "closed/x/tg", "not ours": tmp_path / "tg"}.get(
        where, tmp_path / "file/tg"
    )
    (tmp_path / "closed").mkdir(0o700)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TG_TINKER_HOME", str(place))
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr("tg_tinker.cluster.connection.running_cluster", lambda: None)
    text = as_nobody(said(entry))
    if entry is check_home and where == "not ours":
        assert "there is no TG-Tinker home" in text
    else:
        assert text.startswith(
            f"StorageError: this user (number 65534) cannot use the home {place}"
        )
        assert "set TG_TINKER_HOME to a folder that this user may write to" in text


@pytest.mark.program
@needs_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_a_program_of_a_number_without_a_name_starts_its_own_cluster(tmp_path: Path) -> None:
    """The capability only lets the program read Python where this test has it."""
    place = tmp_path / "user"
    place.mkdir()
    os.chown(place, int(NUMBER), int(NUMBER))
    for above in tmp_path.parents[:2]:
        above.chmod(0o755)
    tmp_path.chmod(0o755)
    reads = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    done = subprocess.run(
        ["setpriv", f"--reuid={NUMBER}", f"--regid={NUMBER}", "--clear-groups", *reads,
         sys.executable, "-c", _PROGRAM],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
             "TG_TINKER_HOME": str(place / "tg")},
        capture_output=True, text=True, timeout=120, check=False, cwd="/",
    )  # fmt: skip
    assert "it works" in done.stdout or "clinic" in done.stdout, done.stderr
    assert (place / "tg/ray-token").stat().st_mode & 0o777 == 0o600
