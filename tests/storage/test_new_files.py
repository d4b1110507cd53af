"""Tests that what is exported is a new file of mode 0600, whatever is at its path."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.artifacts import adapters
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from tg_tinker import InvalidRequestError
from tg_tinker.demo.plots import plot_training
from tg_tinker.records.audit_log import empty
from tg_tinker.records.files import write_export
from tg_tinker.storage.files import new_file, new_folder

ROOT = Path(__file__).parents[2]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(autouse=True)
def _careless_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


# --- what may be at the path ----------------------------------------------------------------------

OLD = b"old"


def a_file(path: Path, other: Path) -> None:
    path.write_bytes(OLD)
    path.chmod(0o644)


def a_link(path: Path, other: Path) -> None:
    other.write_bytes(OLD)
    path.symlink_to(other)


def a_lost_link(path: Path, other: Path) -> None:
    path.symlink_to(other)


def a_hard_link(path: Path, other: Path) -> None:
    other.write_bytes(OLD)
    path.hardlink_to(other)


def a_pipe(path: Path, other: Path) -> None:
    os.mkfifo(path, 0o666)


def a_folder(path: Path, other: Path) -> None:
    path.mkdir()
    (path / "kept").write_bytes(OLD)


THERE = [a_file, a_link, a_lost_link, a_hard_link, a_pipe, a_folder]
Kind = Callable[[Path, Path], None]


def facts(*paths: Path) -> list[Any]:
    found: list[Any] = []
    for path in paths:
        state = path.lstat() if os.path.lexists(path) else None
        content = path.read_bytes() if state and stat.S_ISREG(state.st_mode) else None
        found.append((state and (state.st_ino, state.st_mode, state.st_nlink), content))
    return found


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, replace: bool = False) -> None:
    with new_file(path, replace=replace) as file:
        file.write(b"new")


@pytest.mark.parametrize("there", THERE)
def test_a_new_file_is_refused_where_something_is(tmp_path: Path, there: Kind) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    there(path, other)
    before, names = facts(path, other), names_in(tmp_path)
    with pytest.raises(FileExistsError):
        write(path)
    assert facts(path, other) == before
    assert names_in(tmp_path) == names


@pytest.mark.parametrize("there", [*THERE[:-1], None])
def test_a_replacement_is_another_file_and_the_old_one_stays_as_it_was(
    tmp_path: Path, there: Kind | None
) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    if there:
        there(path, other)
    old, before = path.lstat().st_ino if there else 0, facts(other)[0]
    write(path, replace=True)
    assert (path.read_bytes(), mode(path)) == (b"new", 0o600)
    assert path.lstat().st_ino != old
    assert not path.is_symlink()
    if there is not a_hard_link:
        assert facts(other)[0] == before
    assert not other.exists() or other.read_bytes() == OLD
    assert {*names_in(tmp_path)} <= {"file", "other"}


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    a_folder(tmp_path / "file", tmp_path)
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "file", replace=True)
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file" / "kept").read_bytes() == OLD


@pytest.mark.parametrize("replace", [False, True])
def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path, replace: bool) -> None:
    if replace:
        (tmp_path / "file").write_bytes(OLD)

    def fail() -> None:
        with new_file(tmp_path / "file", replace=replace) as file:
            file.write(b"half")
            assert {mode(path) for path in tmp_path.iterdir() if path.name != "file"} == {0o600}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names_in(tmp_path) == (["file"] if replace else [])
    assert not replace or (tmp_path / "file").read_bytes() == OLD


def test_what_comes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    writing = new_file(path)
    writing.__enter__().write(b"new")
    a_link(path, other)
    with pytest.raises(FileExistsError):
        writing.__exit__(None, None, None)
    assert other.read_bytes() == OLD
    assert path.is_symlink()


def test_each_folder_that_is_made_is_closed_to_others(tmp_path: Path) -> None:
    new_folder(tmp_path / "a" / "b" / "c")
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3
    (tmp_path / "a").chmod(0o755)
    new_folder(tmp_path / "a" / "b")
    assert mode(tmp_path / "a") == 0o755  # the user's own
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        new_folder(tmp_path / "file")


# --- those who write ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("there", THERE)
def test_an_adapter_is_exported_into_new_files_only(
    service: Service, tmp_path: Path, name: str, there: Kind
) -> None:
    target, other = tmp_path / "out", tmp_path / "other"
    target.mkdir()
    there(target / name, other)
    artifact = service.publish()
    before, rows = facts(target / name, other), service.registry.audit_log.rows(TENANT, 0, 99)
    with pytest.raises(InvalidRequestError, match=f"{name} exists.: choose a new or empty dir"):
        adapters.export_adapter(service.registry, str(service.root), TENANT, artifact, target)
    assert facts(target / name, other) == before
    assert names_in(target) == [name]
    assert service.registry.audit_log.rows(TENANT, 0, 99) == rows


def test_an_exported_adapter_is_closed_to_others(service: Service, tmp_path: Path) -> None:
    artifact, target = service.publish(), tmp_path / "new" / "out"
    adapters.export_adapter(service.registry, str(service.root), TENANT, artifact, target)
    assert {mode(path) for path in (target.parent, target)} == {0o700}
    assert {mode(path) for path in target.iterdir()} == {0o600}
    assert len([*target.iterdir()]) == 2


@pytest.mark.parametrize("there", THERE)
def test_an_exported_log_is_a_new_file(tmp_path: Path, there: Kind) -> None:
    path, other = tmp_path / "log.jsonl", tmp_path / "other"
    there(path, other)
    before = facts(path, other)
    with pytest.raises(
        InvalidRequestError, match=r"File exists\): name a file that does not exist"
    ):
        write_export(path, [], empty(TENANT))
    assert facts(path, other) == before
    write_export(tmp_path / "new.jsonl", [], empty(TENANT))
    assert mode(tmp_path / "new.jsonl") == 0o600


def test_a_plot_replaces_a_file_and_follows_no_link(tmp_path: Path) -> None:
    path, other = tmp_path / "loss.png", tmp_path / "other"
    a_link(path, other)
    plot_training([(1, 3.0)], 4.0, 2.0, path)
    assert other.read_bytes() == OLD
    assert mode(path) == 0o600


OWN_WAYS = {
    "actors/engine/model_files.py": "copies in a temporary folder",
    "actors/registry/backup.py": "a database, made with O_EXCL and linked to its name",
    "actors/storage/home.py": "the database, in a home of mode 0700",
    "actors/storage/objects.py": "sealed files in a store",
    "actors/training/warm_process.py": "a lock",
    "tg_tinker/cluster/connection.py": "nowhere",
    "tg_tinker/cluster/interrupts.py": "nowhere",
    "tg_tinker/cluster/node.py": "address and log of a node, in a home of mode 0700",
    "tg_tinker/data/text.py": "copies in a temporary folder",
    "tg_tinker/records/files.py": "a lock",
    "tg_tinker/storage/files.py": "the function itself",
}
"""The files that write in another way, and what they write there."""


def writes(node: ast.AST) -> bool:
    """Returns whether this is a call that writes a file by its path."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    given = [*node.args, *(one.value for one in node.keywords)]
    if name == "open":
        texts = [one.value for one in given if isinstance(one, ast.Constant)]
        by_flags = ast.unparse(node.func) == "os.open" and "O_RDONLY" not in ast.unparse(node)
        return by_flags or any(isinstance(text, str) and {*text} & {*"wxa+"} for text in texts)
    if name == "savefig":
        return ast.unparse(node.args[0]) != "file"
    return name in {"write_text", "write_bytes", "touch", "copy", "copyfile", "copy2", "move"} and (
        name not in {"copy", "move"} or ast.unparse(node.func).startswith("shutil.")
    )


def test_everything_else_of_the_product_is_written_by_this_function() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for top in ("tg_tinker", "actors", "serve_app")
        for path in (ROOT / top).rglob("*.py")
        if any(map(writes, ast.walk(ast.parse(path.read_text()))))
    }
    assert found == OWN_WAYS.keys()


@pytest.mark.parametrize(
    "code",
    ["p.write_text(x)", "p.open('w')", "open(p, mode='ab')", "os.open(p, os.O_CREAT)",
     "shutil.copy(a, b)", "figure.savefig(path)", "p.touch()"],
)  # fmt: skip
def test_other_ways_to_write_are_found(code: str) -> None:
    assert any(map(writes, ast.walk(ast.parse(code))))
    assert not any(map(writes, ast.walk(ast.parse("p.open('rb'); d.copy(); figure.savefig(file)"))))
