"""Tests that a path stays a path on its way through URLs: of homes, databases, backups, stores."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from actors.operations import doctor
from actors.registry.backup import backup, restore
from actors.registry.database import MISREAD
from actors.registry.registry import Registry
from actors.registry.scratch import scratch_registry
from actors.storage import home
from actors.storage.objects import LocalFolder
from actors.storage.store import ArtifactStore
from tg_tinker.client.service import ServiceClient
from tg_tinker.cluster.connection import connect
from tg_tinker.errors import InvalidRequestError, StorageError
from tg_tinker.storage.databases import check_database, default_database, revision_on_record
from tg_tinker.storage.home import home_directory
from tg_tinker.storage.keyrings import place_of
from tg_tinker.storage.sqlite_files import sqlite_file, sqlite_url
from tg_tinker.storage.stores import as_text, parse

NAMES = [
    "what?v=1", "?", "%", "%41", "%2F", "%zz", "100%", "a%3Fb", "#1", "a b", " a", "a ", "a+b",
    "ä", "日本", "🙂", "a&b=c", "a;b", "a:b", "s3:", "a@b", "u:p@h", "[a]", "a*b", "'q'", '"q"',
    "a\\n", "$HOME", "{x}", "<x>", "a|b", "a,b", "~", "-rf", "file:", "sqlite:", ":memory:",
    "a?mode=memory", "a?vfs=x", "x" * 200,
]  # fmt: skip
"""Names of folders with each character that means something in a URL, a shell or a path."""

CONTROLS = ["a\nb", "a\rb", "a\tb", "a\x1b[2Jb", "a\x7fb", "a\u2028b", os.fsdecode(b"a\xffb")]
"""Names that the system allows, and that no URL, terminal or call of Ray takes."""


@pytest.mark.parametrize("name", NAMES)
def test_a_home_of_any_name_has_its_registry_inside_and_closed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above").mkdir()
    place = tmp_path / "above" / name
    monkeypatch.setenv("TG_TINKER_HOME", str(place))
    assert home_directory() == place
    home.create(place)
    url = default_database(place)
    with closing(Registry(url, place / "keyring")) as registry:
        registry.runs.create("default", "{}")
        assert revision_on_record(place / "registry.db"), "a reader of the file finds it too"
        reached = backup(url, place / "backup.db")
    assert [one.name for one in place.parent.iterdir()] == [name]
    modes = {stat.S_IMODE(one.stat().st_mode) for one in place.glob("registry.db*")}
    assert modes == {0o600}
    assert restore(place / "backup.db", sqlite_url(place / "restored.db")) == reached
    with closing(Registry(check_database(url), place / "keyring", looks_only=True)) as again:
        assert again.audit_log.tenants() == ["default"]
    assert [one.name for one in place.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_store_of_any_name_is_where_it_was_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "store"
    for root in (as_text(str(folder)), as_text(folder.as_uri())):
        assert parse(root) == parse(as_text(root)) == folder
    ArtifactStore(folder.as_uri()).objects.put("x", b"1")
    assert LocalFolder(folder).read("x") == b"1"


@pytest.mark.parametrize("name", NAMES)
def test_a_path_and_its_url_lead_to_each_other(name: str) -> None:
    file = Path("/x", name, "registry.db")
    assert sqlite_file(sqlite_url(file)) == file
    assert check_database(sqlite_url(file)) == sqlite_url(file), "the same text in every process"


def test_what_a_url_of_a_file_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_database("sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"
    assert check_database("sqlite:////a%20b/c#d/%/e.db") == "sqlite:////a b/c%23d/%25/e.db"
    assert sqlite_file("postgresql+psycopg://tg@127.0.0.1/registry") is None


@pytest.mark.parametrize("url", [
    "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://host/x.db", "sqlite:////x/what?v=1",
    "sqlite:////x.db?mode=memory", "sqlite:////x/a%0Ab.db", "sqlite:////x/a\nb.db",
    "sqlite:////x/%ff.db", "sqlite:////x/%00.db",
])  # fmt: skip
def test_a_url_that_names_no_one_file_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="write \\? as %3F") as caught:
        check_database(url)
    assert "x" not in str(caught.value).replace("text", "").partition("sqlite")[0]


def test_a_line_break_in_the_url_of_a_server_is_refused() -> None:
    """One parser of URLs drops it, the other does not: they would see two hosts."""
    with pytest.raises(InvalidRequestError, match="a database URL is"):
        check_database("postgresql+psycopg://tg@127.0.0.1\n.example.org/registry")


@pytest.mark.parametrize("name", CONTROLS)
def test_a_home_whose_name_cannot_be_told_is_refused_before_it_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TG_TINKER_HOME", str(tmp_path / name))
    with pytest.raises(InvalidRequestError, match="path in TG_TINKER_HOME has control") as caught:
        ServiceClient(address="local")
    assert name not in str(caught.value)
    assert [*tmp_path.iterdir()] == []


def test_dots_after_a_link_lead_where_the_system_says(tmp_path: Path) -> None:
    """SQLAlchemy would open `tmp_path/registry.db`."""
    place = tmp_path / "real" / "inner"
    place.mkdir(parents=True)
    (tmp_path / "real").chmod(0o700)
    (tmp_path / "link").symlink_to(place)
    scratch_registry(tmp_path / "real").close()
    (tmp_path / "registry.db").touch()
    path = tmp_path / "link" / ".." / "registry.db"
    with closing(Registry(sqlite_url(path), tmp_path / "real" / "keyring")) as registry:
        registry.runs.create("default", "{}")
    assert (tmp_path / "registry.db").stat().st_size == 0
    with closing(sqlite3.connect(tmp_path / "real" / "registry.db")) as file:
        assert file.execute("SELECT count(*) FROM runs").fetchone() == (1,)


# --- what an older release has left ---------------------------------------------------------


def as_before(place: Path) -> Path:
    """Makes a home whose rows are where commit 22e0997 put them; returns that file."""
    home.create(place)
    Registry(sqlite_url(place / "registry.db"), place / "keyring").close()
    misread = Path(sa.make_url(f"sqlite:///{place}/registry.db").database or "")
    (place / "registry.db").rename(misread)
    (place / "registry.db").touch(0o600)
    return misread


def test_rows_beside_the_home_are_named_and_come_back_once_they_are_moved(tmp_path: Path) -> None:
    """An empty registry would know of no budget that was spent."""
    place = tmp_path / "what?v=1"
    misread = as_before(place)
    assert misread == tmp_path / "what"
    url = sqlite_url(place / "registry.db")
    with pytest.raises(StorageError, match="misread the path") as caught:
        Registry(url, place / "keyring")
    assert f"kept the registry of this home in {misread}," in str(caught.value)
    assert caught.value.details == {"reason": MISREAD}
    assert (place / "registry.db").stat().st_size == 0, "nothing was changed"
    found = {f.check: f for f in doctor.examine(place, str(place / "keyring"), str(place / "s"))}
    assert found["registry"].status == doctor.PROBLEM
    misread.replace(place / "registry.db")
    Registry(url, place / "keyring").close()


def test_a_new_home_beside_a_file_or_a_home_of_the_misread_name_opens(tmp_path: Path) -> None:
    (tmp_path / "what").write_text("notes")
    home.create(tmp_path / "what?v=1")
    Registry(sqlite_url(tmp_path / "what?v=1/registry.db"), tmp_path / "what?v=1/keyring").close()
    scratch_registry(tmp_path / "A").close()
    home.create(tmp_path / "%41")
    Registry(sqlite_url(tmp_path / "%41/registry.db"), tmp_path / "%41/keyring").close()


# --- the keyring ----------------------------------------------------------------------------


def test_a_path_with_an_equals_sign_is_no_key(tmp_path: Path) -> None:
    """Runs are often named by their settings: `lr=0.1`."""
    place = tmp_path / "outputs/of/many/experiments/in/the/clinic/lr=0.1"
    home.create(place)
    assert place_of(str(place / "keyring")) == place / "keyring"


# --- no home, no working directory ----------------------------------------------------------


def test_a_removed_working_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for refused in (
        lambda: parse("store"),
        lambda: check_database("sqlite:///x.db"),
        lambda: place_of("keyring"),
        lambda: connect("local"),
    ):
        with pytest.raises(
            InvalidRequestError, match="working directory of this program was removed"
        ):
            refused()
    assert parse("/x") == Path("/x")
