"""Tests the keyring file and the home directory: who may read them, and what is never done to
them."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import signal
import stat
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.storage.home import DATABASE, KEYRING, SEALED, create
from actors.storage.key_providers import FileKeyring
from actors.storage.secrets import FILE as SECRETS
from actors.storage.signing import PUBLIC_KEY, SIGNING_KEY
from tg_tinker.errors import IntegrityError, InvalidRequestError, StorageError
from tg_tinker.storage.envelope import new_key

CONTEXT = b"artifact 7"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def keyring(tmp_path: Path) -> Path:
    FileKeyring.create(tmp_path / "keyring")
    return tmp_path / "keyring"


@pytest.fixture
def careless_umask() -> Iterator[None]:
    """Sets a careless umask, which no file of ours may follow."""
    before = os.umask(0)
    yield
    os.umask(before)


def keys_in(path: Path) -> list[bytes]:
    return [base64.b64decode(key) for key in json.loads(path.read_text())["keys"].values()]


# --- the keyring -----------------------------------------------------------------------------


def test_a_data_key_comes_back_in_another_process_of_the_same_file(keyring: Path) -> None:
    data_key = new_key()
    wrapped = json.loads(json.dumps(FileKeyring(keyring).wrap(data_key, CONTEXT)))
    assert FileKeyring(keyring).unwrap(wrapped, CONTEXT) == data_key
    assert wrapped["key_id"] == FileKeyring(keyring).primary
    assert data_key not in base64.b64decode(wrapped["wrapped"])


def test_a_new_keyring_is_readable_by_its_owner_alone(tmp_path: Path, careless_umask: None) -> None:
    FileKeyring.create(tmp_path / "keyring")
    assert mode(tmp_path / "keyring") == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keyring"], "a partial file is left"


def test_every_keyring_has_a_key_of_its_own(tmp_path: Path) -> None:
    for name in "abc":
        FileKeyring.create(tmp_path / name)
    keys = [key for name in "abc" for key in keys_in(tmp_path / name)]
    assert {len(key) for key in keys} == {32}
    assert len(set(keys)) == 3


@pytest.mark.parametrize("wider", [0o640, 0o604, 0o660, 0o644, 0o666, 0o610, 0o601, 0o620])
def test_a_keyring_that_others_may_touch_is_refused(keyring: Path, wider: int) -> None:
    keyring.chmod(wider)
    with pytest.raises(StorageError, match=rf"mode {wider:04o}.*chmod 600"):
        FileKeyring(keyring)


@pytest.mark.parametrize("narrow", [0o600, 0o400, 0o700])
def test_a_keyring_that_only_its_owner_may_read_is_taken(keyring: Path, narrow: int) -> None:
    keyring.chmod(narrow)
    FileKeyring(keyring)


def test_an_existing_keyring_is_never_overwritten(keyring: Path) -> None:
    before = keyring.read_bytes()
    with pytest.raises(FileExistsError):
        FileKeyring.create(keyring)
    assert keyring.read_bytes() == before
    assert [path.name for path in keyring.parent.iterdir()] == ["keyring"]


def test_not_even_an_empty_file_or_a_dangling_link_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("empty", "link"):
        with pytest.raises(FileExistsError):
            FileKeyring.create(tmp_path / name)
    assert (tmp_path / "empty").read_bytes() == b""
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_keyring_is_a_typed_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no such keyring.*No such file"):
        FileKeyring(tmp_path / "no such keyring")


def changed(keyring: Path, **values: Any) -> str:
    return json.dumps(json.loads(keyring.read_text()) | values)


def damages(keyring: Path) -> Iterator[str | bytes]:
    content = keyring.read_text()
    short = base64.b64encode(bytes(16)).decode()
    yield from ("", "{}", "[]", "null", "5", '"keys"', content[:-1], content + "x", b"\xff\xfe\xff")
    yield from (content.replace("keys", "kyes"), content.replace("primary", "first"))
    yield from (changed(keyring, keys={}), changed(keyring, keys=[]), changed(keyring, keys=None))
    yield changed(keyring, keys={"k1": "no base64!"})
    yield changed(keyring, keys={"k1": 5})
    yield changed(keyring, keys={"k1": short})
    yield changed(keyring, keys={"k1": ""})
    yield from (changed(keyring, primary="k2"), changed(keyring, primary=["k1"]))
    yield changed(keyring, format=2)


def test_a_damaged_keyring_is_refused_without_showing_it(keyring: Path) -> None:
    key = json.loads(keyring.read_text())["keys"]["k1"]
    for damage in list(damages(keyring)):
        keyring.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
        with pytest.raises(IntegrityError, match="is damaged: restore its backup") as caught:
            FileKeyring(keyring)
        assert key not in str(caught.value)


def test_a_key_of_another_keyring_does_not_open(tmp_path: Path, keyring: Path) -> None:
    """Two keyrings name their keys alike, but the keys differ."""
    other = FileKeyring.create(tmp_path / "other")
    wrapped = FileKeyring(keyring).wrap(new_key(), CONTEXT)
    with pytest.raises(IntegrityError):
        other.unwrap(wrapped, CONTEXT)


def test_a_key_in_another_place_does_not_open(keyring: Path) -> None:
    ring = FileKeyring(keyring)
    with pytest.raises(IntegrityError):
        ring.unwrap(ring.wrap(new_key(), CONTEXT), b"artifact 8")


def test_a_key_that_the_ring_does_not_have_is_named_with_those_it_has(keyring: Path) -> None:
    ring = FileKeyring(keyring)
    with pytest.raises(IntegrityError, match=r"needs key 'k9'.*has \['k1'\]"):
        ring.unwrap({**ring.wrap(new_key(), CONTEXT), "key_id": "k9"}, CONTEXT)


@pytest.mark.parametrize("name", ["x" * 10**6, "k1\x1b[31m", "k", "K1", "k1\n", None, 1])
def test_what_is_no_name_of_a_key_is_not_repeated(keyring: Path, name: Any) -> None:
    """Anyone who can write to the store may have put it there."""
    ring = FileKeyring(keyring)
    with pytest.raises(
        IntegrityError, match=r"^the wrapped data key is damaged: restore its backup"
    ):
        ring.unwrap({**ring.wrap(new_key(), CONTEXT), "key_id": name}, CONTEXT)


@pytest.mark.parametrize(
    "wrong",
    [
        {}, [], 5, {"key_id": "k1"}, {"wrapped": "AAAA"}, {"key_id": "k1", "wrapped": "A"},
        {"key_id": "k1", "wrapped": "!!!!"}, {"key_id": "k1", "wrapped": 5},
        {"key_id": "k1", "wrapped": ""}, {"key_id": ["k1"], "wrapped": "AAAA"},
    ],
)  # fmt: skip
def test_a_damaged_wrapped_key_is_an_integrity_error(keyring: Path, wrong: Any) -> None:
    with pytest.raises(IntegrityError):
        FileKeyring(keyring).unwrap(wrong, CONTEXT)


def test_one_wrapped_key_has_one_text(keyring: Path) -> None:
    """The last character before the padding of base64 has two bits that no byte holds."""
    ring = FileKeyring(keyring)
    wrapped = ring.wrap(new_key(), CONTEXT)
    text = wrapped["wrapped"]
    last = text.rstrip("=")[-1]
    others = [char for char in string.ascii_letters + string.digits + "+/" if char != last]
    same = [
        changed for char in others
        if base64.b64decode(changed := text.rstrip("=")[:-1] + char + "=") == base64.b64decode(text)
    ]  # fmt: skip
    assert len(same) == 3
    for changed in same:
        with pytest.raises(IntegrityError):
            ring.unwrap({**wrapped, "wrapped": changed}, CONTEXT)
    with pytest.raises(IntegrityError):
        ring.unwrap(dict(reversed(wrapped.items())), CONTEXT)


def test_a_keyring_never_prints_its_keys(keyring: Path) -> None:
    ring = FileKeyring(keyring)
    (key,) = keys_in(keyring)
    for shown in (repr(ring), str(ring), f"{ring.wrap(new_key(), CONTEXT)}"):
        assert base64.b64encode(key).decode() not in shown
        assert repr(key) not in shown


# --- several processes on one file -----------------------------------------------------------


def test_every_ring_of_a_file_has_the_keys_that_it_holds_now(keyring: Path) -> None:
    one, other = FileKeyring(keyring), FileKeyring(keyring)
    data_key, derived = new_key(), one.derive(b"purpose")
    wrapped = one.wrap(data_key, CONTEXT)
    assert [other.rotate(), one.rotate()] == ["k2", "k3"]
    other.retire("k1")
    assert one.key_ids == other.key_ids == ["k2", "k3"]
    assert one.primary == one.wrap(data_key, CONTEXT)["key_id"] == "k3"
    assert one.derive(b"purpose") == other.derive(b"purpose") != derived
    assert other.unwrap(one.wrap(data_key, CONTEXT), CONTEXT) == data_key
    with pytest.raises(IntegrityError, match="needs key 'k1'"):
        one.unwrap(wrapped, CONTEXT)
    with pytest.raises(InvalidRequestError, match=r"'k1' cannot be retired.*\['k2'\]"):
        one.retire("k1")


def test_rotations_at_the_same_time_lose_no_key(keyring: Path) -> None:
    def rotate(_: int) -> str:
        return FileKeyring(keyring).rotate()

    with ThreadPoolExecutor(8) as pool:
        names = [*pool.map(rotate, range(24))]
    assert sorted(names) == sorted(f"k{n}" for n in range(2, 26))
    assert FileKeyring(keyring).key_ids == [f"k{n}" for n in range(1, 26)]


def test_a_change_waits_for_that_of_another_process(keyring: Path) -> None:
    """The lock ends with the process that held it, however that process ended."""
    code = "import fcntl, os, sys; d = os.open(sys.argv[1], os.O_RDONLY);"
    code += "fcntl.flock(d, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with (
        subprocess.Popen(
            [sys.executable, "-c", code, str(keyring)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as holder,
        ThreadPoolExecutor(1) as pool,
    ):  # fmt: skip
        assert holder.stdout is not None
        holder.stdout.readline()
        rotation = pool.submit(FileKeyring(keyring).rotate)
        with pytest.raises(TimeoutError):
            rotation.result(0.5)
        assert FileKeyring(keyring).key_ids == ["k1"]  # reading does not wait
        holder.kill()
        assert rotation.result(30) == "k2"


def test_a_lock_on_what_others_may_open_holds_up_no_change(
    keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user of the machine without any right to the keyring can read a folder of mode 0755."""
    monkeypatch.setattr("actors.storage.key_providers._PATIENCE_S", 0.0)
    keyring.parent.chmod(0o755)
    stranger = os.open(keyring.parent, os.O_RDONLY)
    fcntl.flock(stranger, fcntl.LOCK_EX)
    ring = FileKeyring(keyring)
    assert ring.rotate() == "k2"
    ring.retire("k1")
    assert {path.name: mode(path) for path in keyring.parent.iterdir()} == {"keyring": 0o600}
    os.close(stranger)


def test_a_lock_that_is_not_given_back_is_told(
    keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.storage.key_providers._PATIENCE_S", 0.1)
    with keyring.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            StorageError, match=r"another process has been changing.*nothing was changed"
        ):
            FileKeyring(keyring).rotate()
    assert FileKeyring(keyring).rotate() == "k2"


def test_a_keyring_that_is_damaged_lost_or_opened_later_is_refused_by_every_call(
    keyring: Path,
) -> None:
    ring, content = FileKeyring(keyring), keyring.read_bytes()
    wrapped = ring.wrap(new_key(), CONTEXT)
    calls: list[Callable[[], object]] = [
        lambda: ring.primary, lambda: ring.key_ids, lambda: ring.wrap(new_key(), CONTEXT),
        lambda: ring.unwrap(wrapped, CONTEXT), lambda: ring.derive(b"purpose"), ring.rotate,
        lambda: ring.retire("k1"),
    ]  # fmt: skip
    for call in calls:
        keyring.write_bytes(content[:-1])
        with pytest.raises(IntegrityError, match="is damaged"):
            call()
        keyring.unlink()
        with pytest.raises(StorageError, match="cannot read the keyring"):
            call()
        assert [*keyring.parent.iterdir()] == []
        keyring.write_bytes(content)
        keyring.chmod(0o644)
        with pytest.raises(StorageError, match="mode 0644"):
            call()
        keyring.chmod(0o600)
    assert keyring.read_bytes() == content


@pytest.mark.parametrize("change", ["rotate", "retire"])
def test_what_a_killed_change_left_is_removed_by_the_next_and_nothing_else(
    keyring: Path, change: str
) -> None:
    """The partial file holds all keys in clear, and one of them may be retired by now."""
    ring = FileKeyring(keyring)
    ring.rotate()
    left = killed_while_writing(keyring)
    assert keys_in(left)[:2] == keys_in(keyring)
    others = {".keyring.swp", ".keyring.1234", "keyring.bak", ".keyring2.0123456789abcdef"}
    for name in others:
        keyring.with_name(name).touch()
    assert ring.rotate() == "k3" if change == "rotate" else ring.retire("k1") is None
    assert {path.name for path in keyring.parent.iterdir()} == others | {"keyring"}


def killed_while_writing(keyring: Path) -> Path:
    """Returns the partial file of a rotation that died before it replaced the keyring."""
    before = {*keyring.parent.iterdir()}
    code = (
        "import os, pathlib, signal, sys; from actors.storage.key_providers import FileKeyring;"
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "FileKeyring(pathlib.Path(sys.argv[1])).rotate()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(keyring)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = {*keyring.parent.iterdir()} - before
    return left


def test_a_change_that_may_not_be_durable_is_not_called_none(
    keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("actors.storage.key_providers.sync", refuse)
    with pytest.raises(StorageError, match="was changed, but a crash may restore the old keyring"):
        FileKeyring(keyring).rotate()
    assert FileKeyring(keyring).key_ids == ["k1", "k2"]


def test_a_file_left_by_a_process_of_the_same_number_is_in_nobodys_way(keyring: Path) -> None:
    keyring.with_name(f".keyring.{os.getpid()}").touch()
    assert FileKeyring(keyring).rotate() == "k2"


# --- the home directory ----------------------------------------------------------------------


def test_a_new_home_is_open_to_its_owner_alone(tmp_path: Path, careless_umask: None) -> None:
    home = tmp_path / "new" / "home"
    assert create(home) is True
    assert mode(home) == 0o700
    made = (KEYRING, DATABASE, SIGNING_KEY, PUBLIC_KEY, SECRETS, SEALED)
    assert {path.name: mode(path) for path in home.iterdir()} == dict.fromkeys(made, 0o600)
    FileKeyring(home / KEYRING)


def test_an_existing_directory_that_others_may_read_is_refused_and_left_as_it_is(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(StorageError, match=r"0755.*chmod 700"):
        create(tmp_path)
    assert mode(tmp_path) == 0o755
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o700)
    assert create(tmp_path)


def test_a_home_whose_making_was_interrupted_is_completed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / DATABASE).touch()
    assert create(home)
    assert FileKeyring(home / KEYRING).primary


def test_a_second_create_returns_false_and_changes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    create(home)
    (home / DATABASE).write_bytes(b"runs")
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    assert create(home) is False
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before


@pytest.mark.parametrize(("lost", "left"), [(KEYRING, DATABASE), (DATABASE, KEYRING)])
def test_half_a_home_is_refused_and_never_completed(tmp_path: Path, lost: str, left: str) -> None:
    create(tmp_path / "home")
    (tmp_path / "home" / DATABASE).write_bytes(b"runs")
    (tmp_path / "home" / lost).unlink()
    with pytest.raises(StorageError, match=rf"lost its {lost}.*backup"):
        create(tmp_path / "home")
    found = {path.name for path in (tmp_path / "home").iterdir()}
    assert found == {left, SIGNING_KEY, PUBLIC_KEY, SECRETS, SEALED}


def test_a_home_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot use the home .* set TG_TINKER_HOME"):
        create(tmp_path / "file" / "home")
    with pytest.raises(StorageError, match=r"cannot use the home .* set TG_TINKER_HOME"):
        create(tmp_path / "file")
