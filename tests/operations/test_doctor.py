"""Tests `tg-tinker doctor`: each check finds what it is for, and changes nothing."""

from __future__ import annotations

import base64
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from actors.operations import doctor, doctor_cluster, doctor_nodes
from actors.operations.doctor import OK, PROBLEM, SCARCE, TOO_LITTLE, WARNING, Finding, examine
from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING, create
from actors.storage.key_providers import FileKeyring, new_text
from actors.storage.objects import LocalFolder
from actors.storage.secrets import FILE as SECRETS
from actors.storage.signing import PUBLIC_KEY, SIGNING_KEY
from support.machines import certificates
from support.storage_servers import s3_store
from tg_tinker.cli.main import main
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError, StorageError
from tg_tinker.storage.databases import default_database
from tg_tinker.storage.keyrings import SETTING

VARIABLE = "CLINIC_KEYS"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    create(tmp_path / "home")
    monkeypatch.setenv("TG_TINKER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SETTING, raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    # Of this machine the tests want to know nothing.
    monkeypatch.setattr(doctor, "running_cluster", lambda: None)
    monkeypatch.setattr(doctor, "check_authenticated", lambda address: None)
    monkeypatch.setattr(doctor_cluster, "_outside", lambda proc: set())
    monkeypatch.setattr(doctor_cluster, "_sockets_folder", lambda process: None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=SCARCE))
    return tmp_path / "home"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Returns a `/proc` of a kernel with nothing to warn of."""
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/swaps").write_text("Filename Type Size Used Priority\n")
    (tmp_path / "proc/sys/kernel/core_pattern").write_text("core\n")
    return tmp_path / "proc"


def found(
    home: Path, keyring: str | None = None, store: str | None = None, proc: Path = Path("/proc")
) -> dict[str, Finding]:
    findings = [*examine(home, keyring or str(home / KEYRING), store or str(home / "store"), proc)]
    assert len({finding.check for finding in findings}) == len(findings) == 23
    assert {finding.status for finding in findings} <= {OK, WARNING, PROBLEM}
    assert all(finding.message for finding in findings)
    return {finding.check: finding for finding in findings}


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


# --- home, keyring, audit key --------------------------------------------------------------------


def test_a_new_home_has_one_weakness_only(home: Path, proc: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    checks = found(home, proc=proc)
    assert checks["keyring and store"].status == WARNING
    assert "stolen disk" in checks["keyring and store"].message
    for name in ("home", "keyring", "audit key", "secrets", "store", "usage statistics", "swap"):
        assert checks[name].status == OK, checks[name]
    assert tree(tmp_path) == before


def test_a_home_that_is_not_there_is_a_problem_and_is_not_made(tmp_path: Path) -> None:
    checks = found(tmp_path / "none")
    assert [checks[name].status for name in ("home", "keyring", "audit key")] == [PROBLEM] * 3
    assert "tg-tinker init" in checks["home"].message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "check"),
    [(".", "home"), (KEYRING, "keyring"), (SIGNING_KEY, "audit key"), (SECRETS, "secrets")],
)
def test_what_others_may_read_is_a_problem(home: Path, name: str, check: str) -> None:
    (home / name).chmod(0o750)
    checks = found(home)
    assert checks[check].status == PROBLEM
    assert "0750" in checks[check].message
    assert "chmod" in checks[check].message
    assert [c for c, finding in checks.items() if finding.status == PROBLEM] == [check]


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (KEYRING, "keyring"),
        (SIGNING_KEY, "audit key"),
        (PUBLIC_KEY, "audit key"),
        (SECRETS, "secrets"),
    ],
)
def test_what_is_damaged_is_a_problem(home: Path, name: str, check: str) -> None:
    (home / name).write_text("{")
    assert found(home)[check].status == PROBLEM


def test_a_home_of_an_earlier_release_is_told_what_follows_from_its_signing_key(
    home: Path,
) -> None:
    (home / SECRETS).unlink()
    finding = found(home)["secrets"]
    assert finding.status == OK
    assert "follow from audit.key" in finding.message


def test_secrets_that_were_lost_are_a_problem(home: Path) -> None:
    Registry(f"sqlite:///{home / DATABASE}", home / KEYRING).close()
    (home / SECRETS).unlink()
    finding = found(home)["keyring and registry"]
    assert finding.status == PROBLEM
    assert "restore the newest backup of secrets.json" in finding.message


def test_a_keyring_in_the_environment_is_a_warning_and_is_not_shown(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"env:{VARIABLE}"
    monkeypatch.delenv(VARIABLE, raising=False)
    assert found(home, where)["keyring"].status == WARNING
    assert "not set in this shell" in found(home, where)["keyring"].message
    text = new_text()
    monkeypatch.setenv(VARIABLE, text)
    checks = found(home, where)
    assert checks["keyring"].status == WARNING
    assert "/proc" in checks["keyring"].message
    assert checks["keyring and store"].status == OK
    monkeypatch.setenv(VARIABLE, text[:-1])
    assert found(home, where)["keyring"].status == PROBLEM
    key = json.loads(text)["keys"]["k1"]
    said = str([*checks.values(), *found(home, where).values()])
    assert key not in said
    assert repr(base64.b64decode(key)) not in said


def used(home: Path) -> Registry:
    """Returns the registry of a home in which something was done."""
    registry = Registry(default_database(home), str(home / KEYRING))
    registry.runs.create("clinic", TrainingConfig(model_ref="m").model_dump_json())
    return registry


def test_a_keyring_that_is_older_or_another_one_is_a_problem(home: Path) -> None:
    registry, keyring = used(home), home / KEYRING
    older = keyring.read_text()
    registry.data_keys.rotate("clinic")
    registry.close()
    assert found(home)["keyring and registry"].status == OK
    for text, said in (
        (older, r"older copy: it lacks k2. Restore the newest copy"),
        (new_text(), "another key than the 'k1'"),
        (new_text().replace("k1", "k7"), "it lacks k1, k2"),
    ):
        keyring.write_text(text)
        finding = found(home)["keyring and registry"]
        assert finding.status == PROBLEM
        assert said in finding.message
    keyring.chmod(0o640)
    assert found(home)["keyring and registry"].status == WARNING


def test_it_leaves_the_database_as_it_is(home: Path, tmp_path: Path) -> None:
    used(home).close()
    with sqlite3.connect(home / DATABASE) as connection:  # as a copy is, and of an older version
        connection.execute("DROP TABLE orphans")
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    FileKeyring(home / KEYRING).rotate()
    before = tree(tmp_path)
    checks = found(home)
    assert checks["keyring and registry"].status == checks["registry"].status == OK
    assert tree(tmp_path) == before


def test_a_damaged_database_is_a_problem(home: Path) -> None:
    used(home).close()
    (home / DATABASE).write_bytes((home / DATABASE).read_bytes()[:-4096])
    finding = found(home)["registry"]
    assert (finding.status, "registry restore" in finding.message) == (PROBLEM, True)


# --- keyring and store apart ---------------------------------------------------------------------


def test_a_store_on_another_device_is_fine(home: Path, tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # noqa: S108 - nothing is written there
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("shared memory is no device of its own here")
    for store in (str(memory), str(memory / "tg-tinker-not-there" / "store")):
        assert doctor._apart(home / KEYRING, store).status == OK
    assert doctor._apart(home / KEYRING, str(tmp_path / "new" / "store")).status == WARNING


def test_a_store_that_is_none_is_not_called_apart(home: Path) -> None:
    found = doctor._apart(home / KEYRING, "s3://key:secret@bucket")
    assert (found.status, found.message) == (WARNING, "not compared: fix the store first")


@pytest.mark.parametrize("store", ["s3://bucket/prefix", "gs://bucket/prefix"])
def test_a_bucket_is_not_on_this_device(home: Path, store: str) -> None:
    assert doctor._apart(home / KEYRING, store).status == OK


def test_a_store_by_file_uri_is_seen_to_be_on_this_device(home: Path, tmp_path: Path) -> None:
    assert doctor._apart(home / KEYRING, f"file://{tmp_path}/store").status == WARNING


# --- the store -----------------------------------------------------------------------------------


class Broken(LocalFolder):
    """A folder that fails in one operation, or returns other content."""

    def __init__(self, root: Path, operation: str) -> None:
        super().__init__(root)
        self._fails = operation

    def put(self, name: str, content: Any) -> int:
        size = super().put(name, content)
        self._refuse("put")
        return size

    def read(self, name: str, most: int | None = None) -> bytes:
        self._refuse("read")
        return b"other" if self._fails == "differ" else super().read(name, most)

    def delete(self, name: str) -> None:
        self._refuse("delete")
        super().delete(name)

    def _refuse(self, operation: str) -> None:
        if operation == self._fails:
            raise StorageError(f"the store refused to {operation}: mend it")


@pytest.mark.parametrize("operation", ["put", "read", "delete", "differ"])
def test_a_store_that_fails_in_any_way_is_a_problem_and_keeps_no_probe(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(doctor, "open_objects", lambda *_: Broken(tmp_path / "store", operation))
    assert found(home, store=str(tmp_path / "store"))["store"].status == PROBLEM
    if operation != "delete":
        assert list((tmp_path / "store").iterdir()) == []


def test_a_folder_that_is_there_is_written_read_and_left_as_it_was(home: Path) -> None:
    (home / "store").mkdir()
    finding = found(home)["store"]
    assert finding.status == OK
    assert "removed a probe" in finding.message
    assert list((home / "store").iterdir()) == []


def test_a_store_below_a_file_is_a_problem(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert found(home, store=str(tmp_path / "file" / "store"))["store"].status == PROBLEM
    assert found(home, store=str(tmp_path / "file"))["store"].status == PROBLEM


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_cannot_be_made_is_a_problem(home: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert found(home, store=str(tmp_path / "closed" / "store"))["store"].status == PROBLEM


def test_a_malformed_store_is_a_problem_and_is_not_repeated(home: Path) -> None:
    finding = found(home, store="s3://me:hunter2@bucket/prefix")["store"]
    assert finding.status == PROBLEM
    assert "hunter2" not in finding.message


def test_a_bucket_is_written_read_and_left_as_it_was(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    with s3_store(tmp_path / "server") as server:
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        assert found(home, store=f"{server.uri}/doctor")["store"].status == OK
        left = doctor.open_objects(f"{server.uri}/doctor", doctor.RetryPolicy()).list_below()
        assert left == []
        missing = found(home, store="s3://no-such-bucket/doctor")["store"]
        assert missing.status == PROBLEM
        assert "no such bucket" in missing.message
    unreachable = found(home, store=f"{server.uri}/doctor")["store"]
    assert unreachable.status == PROBLEM


# --- the machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "status"),
    [(SCARCE, OK), (SCARCE - 1, WARNING), (TOO_LITTLE, WARNING), (TOO_LITTLE - 1, PROBLEM)],
)
def test_little_room_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert found(home)["free space"].status == status


@pytest.mark.parametrize("full", ["store", "ray"])
def test_the_fullest_of_home_store_and_what_ray_spills_counts(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    for name in ("store", "ray"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    usage = lambda path: SimpleNamespace(free=5 if path == tmp_path / full else 2**50)  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage)
    finding = found(home, store=str(tmp_path / "store"))["free space"]
    assert finding.status == PROBLEM
    assert str(tmp_path / full) in finding.message


@pytest.mark.parametrize(
    ("areas", "status"),
    [("", OK), ("/dev/zram0 partition 1 0 100\n", OK), ("/dev/sda2 partition 1 0 -2\n", WARNING)],
)
def test_swap_on_a_disk_is_a_warning(home: Path, proc: Path, areas: str, status: str) -> None:
    (proc / "swaps").write_text(f"Filename Type Size Used Priority\n{areas}")
    finding = found(home, proc=proc)["swap"]
    assert finding.status == status
    assert ("/dev/sda2" in finding.message) == (status == WARNING)


@pytest.mark.parametrize(
    ("pattern", "limit", "status"),
    [("core", 0, OK), ("core", 4096, WARNING), ("|/usr/lib/apport %p", 0, WARNING)],
)
def test_core_dumps_are_a_warning(
    home: Path, proc: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, limit: int, status: str
) -> None:
    (proc / "sys/kernel/core_pattern").write_text(f"{pattern}\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    finding = found(home, proc=proc)["core dumps"]
    assert finding.status == status
    assert ("/usr/lib/apport" in finding.message) == pattern.startswith("|")


def test_a_system_without_these_files_is_examined_all_the_same(home: Path, tmp_path: Path) -> None:
    assert found(home, proc=tmp_path / "none")["swap"].status == WARNING


@pytest.mark.parametrize(
    ("variable", "running", "file", "status"),
    [
        ("0", None, None, OK), ("1", None, '{"usage_stats": false}', WARNING),
        ("0", "host:1", None, WARNING), ("0", "host:1", '{"usage_stats": false}', OK),
        ("0", "host:1", '{"usage_stats": true}', WARNING), ("0", "host:1", "{", WARNING),
        ("0", "host:1", "[]", WARNING),
    ],
)  # fmt: skip
def test_usage_statistics_that_may_leave_are_a_warning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    variable: str, running: str | None, file: str | None, status: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "running_cluster", lambda: running)
    if file is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/config.json").write_text(file)
    assert found(home)["usage statistics"].status == status


# --- a cluster on this machine --------------------------------------------------------------------


def test_several_tenants_in_one_registry_are_told_what_a_tenant_is(home: Path) -> None:
    assert found(home)["tenants"].status == OK
    registry = Registry(default_database(home), home / KEYRING)
    for tenant in ("north", "south"):
        registry.runs.create(tenant, json.dumps({"model_ref": "m"}))
    finding = found(home)["tenants"]
    assert finding.status == WARNING
    assert finding.message.startswith("2 in this registry")
    assert "whoever runs programs on the cluster reads the data of all" in finding.message


@pytest.fixture
def entered() -> Iterator[Path]:
    """Yields a folder that all users may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("mode", "status"), [(None, OK), (0o600, OK), (0o640, PROBLEM), (0o604, PROBLEM)]
)
def test_a_token_that_others_may_read_is_a_problem(
    home: Path, entered: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None, status: str
) -> None:
    monkeypatch.setenv("HOME", str(entered / "user"))
    elsewhere = entered / "token"
    for path in (entered / "user/.ray/auth_token", elsewhere):
        if mode is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("hunter2")
            path.chmod(mode)
        finding = found(home)["token"]
        assert finding.status == status
        assert str(path) in finding.message
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(elsewhere))


def test_a_token_that_others_may_replace_is_a_problem_and_one_in_a_closed_folder_is_not(
    home: Path, entered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(entered / "token"))
    (entered / "token").touch(mode=0o600)
    for mode, status in ((0o777, PROBLEM), (0o1777, PROBLEM), (0o775, PROBLEM), (0o700, OK)):
        entered.chmod(mode)
        assert found(home)["token"].status == status
    (entered / "token").chmod(0o644)
    assert found(home)["token"].status == OK


def test_folders_of_ray_in_which_others_may_write_are_a_problem(
    proc: Path, entered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(entered))
    sockets = entered / "ray/session/sockets"
    sockets.mkdir(parents=True)
    (proc / "41").mkdir()
    option = f"--raylet_socket_name={sockets}/raylet"
    (proc / "41/cmdline").write_bytes(f"/ray/raylet\0{option}\0--x".encode())
    assert doctor_cluster._folder(proc).status == OK
    for folder in (sockets, sockets.parent, entered / "ray"):
        folder.chmod(0o777)
        finding = doctor_cluster._folder(proc)
        assert finding.status == PROBLEM
        assert str(sockets) in finding.message
        entered.chmod(0o700)
        assert doctor_cluster._folder(proc).status == OK
        entered.chmod(0o755)
        folder.chmod(0o755)
    (proc / "41/cmdline").write_bytes(f"python\0-m\0x\0{option}".encode())  # of no raylet
    sockets.chmod(0o777)
    assert doctor_cluster._folder(proc).status == OK
    entered.chmod(0o777)
    assert "set RAY_TMPDIR" in doctor_cluster._folder(proc).message


@pytest.mark.parametrize(
    ("number", "mode", "status"),
    [("2.60.0", "", OK), ("2.60.0", "Token", OK), ("2.100.1rc1", "token", OK),
     ("2.55.0", "token", PROBLEM), ("2.9.3", "", PROBLEM), ("2.60.0", "disabled", WARNING)],
)  # fmt: skip
def test_a_ray_that_may_start_without_its_token_is_told(
    monkeypatch: pytest.MonkeyPatch, number: str, mode: str, status: str
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(doctor_cluster, "version", lambda _: number)
    assert doctor_cluster._version().status == status


def test_a_cluster_is_told_by_its_address_and_by_what_it_requires(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(home)["address"].status == OK
    monkeypatch.setattr(doctor, "running_cluster", lambda: "host:1")
    assert doctor._address().status == OK
    for error, status in (
        (InvalidRequestError("requires no token"), PROBLEM),
        (ClusterUnavailableError("no Ray answers"), WARNING),
    ):
        monkeypatch.setattr(doctor, "check_authenticated", Mock(side_effect=error))
        finding = doctor._address()
        assert (finding.status, finding.message) == (status, error.message)


def test_an_address_that_others_may_have_written_is_a_warning(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ClusterUnavailableError("others may write there")
    monkeypatch.setattr(doctor, "running_cluster", Mock(side_effect=error))
    checks = found(home)
    assert checks["address"] == Finding("address", WARNING, error.message)
    for name in doctor_nodes.OF_NODES:
        assert checks[name].status == WARNING


def test_a_token_in_the_environment_is_a_warning_and_is_not_shown(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    finding = found(home)["token"]
    assert finding.status == WARNING
    assert "hunter2" not in finding.message


def test_tls_files_must_be_there_fit_be_closed_and_be_good_for_a_while(tmp_path: Path) -> None:
    assert doctor_cluster._tls({}).status == OK
    for days, status in ((90, OK), (13, WARNING), (-1, PROBLEM)):
        environment = certificates(tmp_path, days)
        assert doctor_cluster._tls(environment).status == status
    environment = certificates(tmp_path)
    (tmp_path / "key.pem").chmod(0o640)
    assert "0640" in doctor_cluster._tls(environment).message
    other = tmp_path / "other"
    other.mkdir()
    foreign = environment | {"RAY_TLS_SERVER_KEY": certificates(other)["RAY_TLS_SERVER_KEY"]}
    (tmp_path / "key.pem").unlink()
    for wrong in (foreign, environment, environment | {"RAY_TLS_CA_CERT": ""}):
        assert doctor_cluster._tls(wrong).status == PROBLEM


ADDRESSES = {
    "loopback": ("tcp", "0100007F"), "another loopback": ("tcp", "0200007F"),
    "mapped loopback": ("tcp6", f"{'0' * 16}FFFF00000100007F"),
    "mapped own": ("tcp6", f"{'0' * 16}FFFF00000302000A"),
    "loopback of 6": ("tcp6", f"{'0' * 24}01000000"),
    "all": ("tcp", "00000000"), "all of 6": ("tcp6", "0" * 32), "own": ("tcp", "0302000A"),
}  # fmt: skip


def listening(proc: Path, program: str, address: str, mode: str, state: str = "0A") -> None:
    """Adds a process of Ray that listens at this address, as the kernel shows it."""
    (proc / "41/fd").mkdir(parents=True)
    (proc / "net").mkdir()
    (proc / "41/cmdline").write_bytes(f"/ray/{program}\0--x".encode())
    (proc / "41/environ").write_bytes(f"A=1\0RAY_AUTH_MODE={mode}\0".encode())
    (proc / "41/fd/7").symlink_to("socket:[4711]")
    (proc / "42").mkdir()  # another user's, say
    file, where = ADDRESSES[address]
    row = f"0: {where}:18EB 0:0 {state} 0:0 00:0 0 1000 0 4711 1 0 100 0 0 10 0"
    (proc / "net" / file).write_text(f"  sl  local_address ...\n{row}\n")


@pytest.mark.parametrize("program", ["gcs_server", "raylet", "dashboard.py"])
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("mode", ["token", "Token", "disabled", ""])
def test_what_listens_beyond_this_machine_without_a_token_is_a_problem(
    proc: Path, program: str, address: str, mode: str
) -> None:
    listening(proc, program, address, mode)
    finding = doctor_cluster._exposure(proc)
    if "loopback" in address:
        assert finding.status == OK
    elif mode.lower() != "token":
        assert finding.status == PROBLEM
        assert program.partition("_")[0].removesuffix(".py") in finding.message.lower()
    else:  # the dashboard takes its token in clear
        assert finding.status == (WARNING if program == "dashboard.py" else OK)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0", "127.example.org"])
def test_a_dashboard_at_the_loopback_lets_nobody_in_though_its_metrics_are_open(
    proc: Path, host: str
) -> None:
    """This is the dashboard that `tg-tinker up` starts."""
    listening(proc, "dashboard.py", "all", "token")
    (proc / "41/cmdline").write_bytes(f"python\0/ray/dashboard.py\0--host={host}\0".encode())
    beyond = host in ("0.0.0.0", "127.example.org")
    assert doctor_cluster._exposure(proc).status == (WARNING if beyond else OK)


@pytest.mark.parametrize(("program", "state"), [("python", "0A"), ("raylet", "01")])
def test_other_programs_and_sockets_that_do_not_listen_are_left_alone(
    proc: Path, program: str, state: str
) -> None:
    listening(proc, program, "all", "", state)
    assert doctor_cluster._exposure(proc).status == OK


def test_a_cluster_that_cannot_be_joined_is_not_called_alike(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ClusterUnavailableError("this cluster wants another token")

    monkeypatch.setattr(doctor, "running_cluster", lambda: "host:1")
    monkeypatch.setattr(doctor_nodes, "Cluster", refuse)
    checks = found(home)
    for name in doctor_nodes.OF_NODES:
        assert checks[name].status == WARNING
        assert "another token" in checks[name].message


@pytest.mark.parametrize(
    ("machines", "tls", "warned"), [(1, "", False), (2, "1", False), (2, "", True)]
)
def test_machines_that_talk_in_clear_are_told_although_it_was_allowed(
    monkeypatch: pytest.MonkeyPatch, machines: int, tls: str, warned: bool
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", tls)
    finding = doctor_nodes._machines({f"10.0.0.{n}" for n in range(machines)})
    assert finding.status == (WARNING if warned else OK)
    assert ("in clear" in finding.message) == warned


def test_a_folder_is_no_store_of_several_machines(tmp_path: Path) -> None:
    for store, machines, status in (
        (str(tmp_path), {"a", "b"}, WARNING), (str(tmp_path), {"a"}, OK),
        ("s3://bucket/prefix", {"a", "b"}, OK), ("nonsense://x", {"a", "b"}, OK),
    ):  # fmt: skip
        finding = doctor_nodes._shared_store(machines, store)
        assert (finding.check, finding.status) == ("shared store", status)
    assert "s3://" in doctor_nodes._shared_store({"a", "b"}, str(tmp_path)).message


# --- the command ---------------------------------------------------------------------------------


def call(*words: str) -> Any:
    return CliRunner().invoke(main, ["doctor", *words])


def test_warnings_end_with_0_and_a_problem_with_1(home: Path) -> None:
    found = call()
    assert found.exit_code == 0
    assert "warning  keyring and store: on one device" in found.output
    (home / KEYRING).chmod(0o644)
    found = call()
    assert found.exit_code == 1
    assert "problem  keyring: " in found.output


def test_json_holds_the_same(home: Path) -> None:
    listed = json.loads(call("--json").stdout)
    assert [set(one) for one in listed] == [{"check", "status", "message"}] * 23
    (home / DATABASE).chmod(0o644)
    (home / SIGNING_KEY).unlink()
    found = call("--json")
    assert found.exit_code == 1
    assert {one["check"]: one["status"] for one in json.loads(found.stdout)}["audit key"] == PROBLEM


def test_it_looks_where_it_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    monkeypatch.setenv(VARIABLE, new_text())
    words = ("--store", str(tmp_path / "store"), "--keyring", f"env:{VARIABLE}")
    assert f"{tmp_path / 'store'}: wrote" in call(*words).output
    monkeypatch.setenv(SETTING, f"env:{VARIABLE}")
    assert f"keyring: env:{VARIABLE}, keys k1" in call().output


def test_a_keyring_that_names_nothing_is_one_line_on_stderr(home: Path) -> None:
    found = call("--keyring", new_text())
    assert found.exit_code == 1
    assert "never the text itself" in found.output.replace("\n", " ")
    assert '"primary"' not in found.output


def test_it_starts_no_cluster(home: Path) -> None:
    code = (
        "import sys; from actors.operations import doctor; from pathlib import Path;"
        "doctor.running_cluster = lambda: None;"  # that of another program on this machine
        f"list(doctor.examine(Path({str(home)!r}), {str(home / KEYRING)!r}, {str(home)!r}));"
        "print({'ray', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
