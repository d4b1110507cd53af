"""Tests keyrings by their location: files and environment variables, and what neither ever
shows."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.operations import keys
from actors.process import forget_keyrings
from actors.registry.registry import Registry
from actors.storage.home import DATABASE, KEYRING, SEALED, create
from actors.storage.key_providers import (
    EnvironmentKeyring,
    FileKeyring,
    KeyProvider,
    new_text,
    open_keyring,
)
from actors.storage.secrets import FILE as SECRETS
from actors.storage.signing import PUBLIC_KEY, SIGNING_KEY
from support.artifacts import TENANT, Service, assert_same, checkpoint
from support.artifacts import service as service  # a fixture
from tg_tinker.cli.main import main
from tg_tinker.errors import IntegrityError, InvalidRequestError, StorageError
from tg_tinker.storage.envelope import new_key
from tg_tinker.storage.keyrings import SETTING, Variable, audit_folder, default_place, place_of

VARIABLE, CONTEXT = "CLINIC_KEYS", b"artifact 7"
WHERE = f"env:{VARIABLE}"


def in_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> EnvironmentKeyring:
    monkeypatch.setenv(VARIABLE, text)
    ring = open_keyring(WHERE)
    assert isinstance(ring, EnvironmentKeyring)
    return ring


@pytest.fixture(params=["file", "env"])
def ring(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> KeyProvider:
    if request.param == "env":
        return in_environment(monkeypatch, new_text())
    return FileKeyring.create(tmp_path / "keyring")


def secrets_in(text: str) -> list[str]:
    """Returns every form in which the keys of a keyring's text could be shown."""
    encoded = json.loads(text)["keys"].values()
    raw = [base64.b64decode(key) for key in encoded]
    return [*encoded, *map(repr, raw), *(key.hex() for key in raw)]


# --- every provider ------------------------------------------------------------------------------


def test_a_provider_opens_what_it_wrapped_in_its_place_alone(ring: KeyProvider) -> None:
    data_key = new_key()
    wrapped = ring.wrap(data_key, CONTEXT)
    assert ring.unwrap(json.loads(json.dumps(wrapped)), CONTEXT) == data_key
    assert wrapped["key_id"] == ring.primary == ring.key_ids[-1]
    with pytest.raises(IntegrityError):
        ring.unwrap(wrapped, b"artifact 8")


def test_what_is_derived_is_the_same_each_time_and_another_for_each_purpose(
    ring: KeyProvider,
) -> None:
    assert ring.derive(b"a") == ring.derive(b"a")
    assert ring.derive(b"a")[0] == ring.primary
    assert len({ring.derive(b"a")[1], ring.derive(b"b")[1]}) == 2
    assert len(ring.derive(b"a")[1]) == 32


def test_one_text_is_one_keyring_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = FileKeyring.create(tmp_path / "keyring")
    file.rotate()
    env = in_environment(monkeypatch, (tmp_path / "keyring").read_text())
    assert (env.key_ids, env.primary) == (file.key_ids, file.primary) == (["k1", "k2"], "k2")
    assert env.derive(b"p") == file.derive(b"p")
    data_key = new_key()
    assert env.unwrap(file.wrap(data_key, CONTEXT), CONTEXT) == data_key
    assert (env.provider, file.provider) == ("env", "file")


# --- the environment -----------------------------------------------------------------------------


def test_a_keyring_in_the_environment_is_read_only_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = new_text()
    ring = in_environment(monkeypatch, text)
    with pytest.raises(InvalidRequestError, match=f"keys new --after {WHERE}.*--resume"):
        ring.rotate()
    with pytest.raises(InvalidRequestError, match="secret manager"):
        ring.retire("k1")
    assert ring.key_ids == ["k1"]
    assert os.environ[VARIABLE] == text


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_missing_or_empty_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(StorageError, match=rf"{VARIABLE} holds no keyring.*keys new"):
        open_keyring(WHERE)


def damages(text: str) -> Iterator[str]:
    content = json.loads(text)
    key = content["keys"]["k1"]
    yield from (text[:-1], text + "x", f"[{text}]", f'"{key}"', key, "{}", "5", "[" * 100_000)
    yield json.dumps(content | {"format": 2})
    yield json.dumps(content | {"primary": "k2"})
    yield json.dumps(content | {"primary": [key]})
    yield json.dumps(content | {"keys": {"k1": key[:-4]}})
    yield json.dumps(content | {"keys": [key]})
    for name in ("", "k0", "k01", "1", "k1 ", "kk", "k-1", "K1", "k" + "9" * 5000):
        yield json.dumps(content | {"primary": name, "keys": {name: key}})


def test_a_damaged_text_is_refused_by_the_name_of_its_variable_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = new_text()
    for damage in damages(text):
        with pytest.raises(IntegrityError, match=rf"variable {VARIABLE} is damaged") as caught:
            in_environment(monkeypatch, damage)
        error: BaseException | None = caught.value
        while error is not None:  # what was raised before it may be shown, too
            said = f"{error} {error!r} {vars(error)}"
            assert not any(secret in said for secret in secrets_in(text))
            error = error.__cause__ or error.__context__


def test_a_text_is_taken_with_the_white_space_that_managers_add(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert in_environment(monkeypatch, f" {new_text()}\n").primary == "k1"


def test_processes_that_need_no_keyring_drop_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    text = new_text()
    monkeypatch.setattr(os, "environ", os.environ | {"A": text, "B": text[:-9], "C": "kept"})
    forget_keyrings()
    assert "C" in os.environ
    assert not {"A", "B"} & set(os.environ)


def test_a_child_of_such_a_process_does_not_inherit_it() -> None:
    code = (
        "import os, subprocess; from actors.process import forget_keyrings; forget_keyrings();"
        f"print(subprocess.run(['printenv', '{VARIABLE}']).returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {VARIABLE: new_text()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1"]


# --- what names a keyring ------------------------------------------------------------------------


def test_a_place_is_a_path_or_a_variable() -> None:
    assert place_of("/a/keyring") == place_of(Path("/a/keyring")) == Path("/a/keyring")
    assert place_of("~/keyring") == Path.home() / "keyring"
    assert place_of("a/keyring") == Path.cwd() / "a/keyring"
    assert place_of("env:A_1") == Variable("A_1")
    assert str(place_of("env:A_1")) == "env:A_1"
    assert audit_folder(Path("/a/keyring"), Path("/home")) == Path("/a")
    assert audit_folder(Variable("A"), Path("/home")) == Path("/home")


def test_the_default_place_is_the_setting_or_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    assert default_place(Path("/home")) == Path("/home/keyring")
    monkeypatch.setenv(SETTING, "env:A")
    assert default_place(Path("/home")) == Variable("A")
    monkeypatch.setenv(SETTING, "/a/keyring")
    assert default_place(Path("/home")) == Path("/a/keyring")


@pytest.mark.parametrize(
    "wrong",
    [
        "env:",
        "env:1A",
        "env:A B",
        "env:A=1",
        "env:{text}",
        "{text}",
        "kms://key",
        "kms:key",
        "a\0b",
        "a\x1bb",
    ],
)
def test_what_names_no_keyring_is_refused_and_not_repeated(wrong: str) -> None:
    text = new_text()
    with pytest.raises(InvalidRequestError, match="never the text itself") as caught:
        open_keyring(wrong.replace("{text}", text))
    assert not any(secret in str(caught.value) for secret in secrets_in(text))


PASTED = bytes(range(221, 253))  # with + and / in its base64


@pytest.mark.parametrize("around", ["{}", '"{}"', '"k1": "{}"', "k1={}", "/{}", "x/{}", "{}\n"])
@pytest.mark.parametrize("key", [base64.b64encode(PASTED), base64.urlsafe_b64encode(PASTED)])
def test_a_key_in_the_place_of_a_path_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, key: bytes, around: str
) -> None:
    refuse_pasted(monkeypatch, around.format(key.decode()))


@pytest.mark.parametrize("key", [PASTED.hex(), base64.urlsafe_b64encode(PASTED).decode()[:-1]])
def test_a_key_in_another_form_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    refuse_pasted(monkeypatch, key)


def refuse_pasted(monkeypatch: pytest.MonkeyPatch, pasted: str) -> None:
    monkeypatch.setenv(SETTING, pasted)
    for call in (lambda: open_keyring(pasted), lambda: default_place(Path("/home"))):
        with pytest.raises(InvalidRequestError, match="never the text itself") as caught:
            call()
        assert pasted not in str(caught.value)


def test_paths_as_they_are_common_are_none(tmp_path: Path) -> None:
    for path in (
        "/var/lib/docker/overlay2/" + "0123456789abcdef" * 4 + "/merged/keyring",
        "/opt/volumes/pvc-0d9c3f5e-8a3b-4a44-9c55-2d3c9e2ad1f3_default_keys/keyring",
        "data/tenants/clinic-berlin/keys/2026/keyring",
    ):
        assert place_of(path) == Path.cwd() / path


# --- the home, the registry and the audit key of a keyring that is elsewhere ---------------------


def test_a_home_whose_keyring_is_in_the_environment_holds_none(tmp_path: Path) -> None:
    assert create(tmp_path / "home", WHERE)
    assert {p.name for p in (tmp_path / "home").iterdir()} == {
        DATABASE, SEALED, SIGNING_KEY, PUBLIC_KEY, SECRETS,
    }  # fmt: skip
    assert not create(tmp_path / "home", WHERE)


def test_a_keyring_outside_the_home_is_made_with_its_audit_key_beside_it(tmp_path: Path) -> None:
    (tmp_path / "other disk").mkdir(mode=0o700)
    where = str(tmp_path / "other disk" / "keys.json")
    assert create(tmp_path / "home", where)
    assert [p.name for p in (tmp_path / "home").iterdir()] == [DATABASE]
    Registry(f"sqlite:///{tmp_path / 'home' / DATABASE}", where)
    assert not create(tmp_path / "home", where)


@pytest.mark.parametrize("lost", [DATABASE, PUBLIC_KEY])
def test_half_a_home_of_such_a_keyring_is_never_completed(tmp_path: Path, lost: str) -> None:
    home = tmp_path / "home"
    create(home, WHERE)
    (home / DATABASE).write_bytes(b"runs")
    (home / lost).unlink()
    with pytest.raises(StorageError, match=rf"lost its {lost}"):
        create(home, WHERE)


def test_a_making_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "home" / DATABASE).touch()
    assert create(tmp_path / "home", WHERE)


def moved(service: Service, monkeypatch: pytest.MonkeyPatch, text: str) -> Service:
    """Returns the service after its keyring was moved from the home into the environment."""
    monkeypatch.setenv(VARIABLE, text)
    (service.home / KEYRING).unlink(missing_ok=True)
    registry = Registry(f"sqlite:///{service.home / DATABASE}", WHERE, service.home)
    return replace(service, registry=registry)


def test_a_keyring_moves_into_the_environment_and_rotates_there(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = service.publish()
    service.registry.ledgers.register(TENANT, "chats", 8.0, 1e-5, "example")
    units = service.registry.ledgers.unit_key(TENANT, "chats")
    service = moved(service, monkeypatch, (service.home / KEYRING).read_text())
    assert_same(service.fetch(old), checkpoint())
    assert service.registry.data_keys.key_info() == ("k1", "env")
    with pytest.raises(InvalidRequestError, match="read-only"):
        service.registry.data_keys.rotate(TENANT)
    service = moved(service, monkeypatch, new_text(after=WHERE))
    fresh = service.registry.data_keys.key_info()[0]
    assert keys.uses(service.registry, str(service.root)).artifacts == {"k1": 1, fresh: 0}
    assert [*keys.rewrap(service.registry, str(service.root))] == [(old, "")]
    assert keys.uses(service.registry, str(service.root)).artifacts == {"k1": 0, fresh: 1}
    without = json.loads(os.environ[VARIABLE])
    del without["keys"]["k1"]
    service = moved(service, monkeypatch, json.dumps(without))
    assert_same(service.fetch(old), checkpoint())
    assert service.registry.ledgers.unit_key(TENANT, "chats") == units


# --- the command ---------------------------------------------------------------------------------


def printed(*words: str) -> Any:
    return CliRunner().invoke(main, ["keys", "new", *words])


def test_the_command_prints_a_fresh_keyring_or_one_with_a_key_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [printed().stdout for _ in range(2)]
    assert texts[0] != texts[1]
    monkeypatch.setenv(VARIABLE, texts[0])
    after = json.loads(printed("--after", WHERE).stdout)
    assert [*after["keys"]] == ["k1", after["primary"]]
    assert after["primary"] != json.loads(printed("--after", WHERE).stdout)["primary"]
    assert after["keys"]["k1"] == json.loads(texts[0])["keys"]["k1"]
    assert len({*after["keys"].values()}) == 2


def test_the_command_fails_in_a_line_that_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = new_text()
    monkeypatch.setenv(VARIABLE, text[:-1])
    for words in (("--after", WHERE), ("--after", text), ("--after", "/no/keyring")):
        found = printed(*words)
        assert found.exit_code == 1
        assert found.stdout == ""
        assert not any(secret in found.output for secret in secrets_in(text))


# --- nothing shows a key -------------------------------------------------------------------------


def test_no_repr_log_or_reachable_text_shows_a_key(
    ring: KeyProvider, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keyring"
    text = file.read_text() if file.exists() else os.environ[VARIABLE]
    with caplog.at_level(logging.DEBUG):
        data_key = new_key()
        ring.unwrap(ring.wrap(data_key, CONTEXT), CONTEXT)
        shown = [repr(ring), str(ring), repr(vars(ring)), f"{ring.wrap(data_key, CONTEXT)}"]
    for secret in (*secrets_in(text), repr(data_key), data_key.hex()):
        assert not any(secret in said for said in (*shown, caplog.text))
