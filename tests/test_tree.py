"""Tests that files are where the README's tree and the lists of the packages say.

Every module and file that a text names must exist. The rules are plain functions from text to
findings, so tests also show that each rule finds what is wrong.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("tg_tinker", "actors", "serve_app")
LISTED = sorted(
    path.parent for folder in (*TOPS, "tests") for path in (ROOT / folder).rglob("__init__.py")
)
"""Packages whose first lines list their files."""

NAMES = {"tg_tinker.backends", "tg_tinker.registry", "tg_tinker.key", "tg_tinker.sealed"}
"""Of entry points, an actor, what a message over HTTP carries: they only look like modules."""

MADE_UP = {"tests/system/test_names.py", "tests/test_imports.py", "tests/test_tree.py"}
"""They name modules that are not there, to show that these are found."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- the rules -------------------------------------------------------------------------------


def files_of(package: Path) -> set[str]:
    """Returns the modules and folders of a package: `rows.py`, `http/`."""
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    return modules | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}


def files_named(docstring: str) -> set[str]:
    modules = re.findall(r"(?<![\w./])\w+\.py\b", docstring)
    return {*modules, *re.findall(r"(?<![\w./])\w+/(?![\w.])", docstring)}


def tree_of(page: str) -> list[str]:
    """Returns the lines of the tree in the section "Where things are"."""
    return page.partition("## Where things are")[2].split("```")[1].strip("\n").splitlines()


def paths_of(tree: list[str]) -> Iterator[str]:
    """Returns the paths of each line; an indented path is in the folder above it."""
    folder = ""
    for line in tree:
        names = re.split(r"\s{3,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
            yield from names
        else:
            yield from (folder + name for name in names)


def lost_modules(text: str) -> list[str]:
    """Returns dotted names of ours that lead to no module, and to no name in a module."""
    tops = "|".join(TOPS)
    found = re.findall(rf"(?<![\w./-])(?:{tops})(?:\.[A-Za-z_]\w*)+", text)
    return [name for name in found if name not in NAMES and not leads_somewhere(name)]


def leads_somewhere(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module.exists():
            return set(parts[count : count + 1]) <= names_in(module)
    return False


@cache
def names_in(module: Path) -> set[str]:
    """Returns the names that a module defines, assigns or imports."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def lost_files(text: str) -> list[str]:
    """Returns paths of this project at which there is no file."""
    tops = "|".join((*TOPS, "tests", "examples", "docs"))
    found = re.findall(rf"(?<![\w./-])(?:{tops})/[\w./-]*\.(?:py|md|json|yaml)\b", text)
    return [name for name in found if not (ROOT / name).exists()]


# --- the rules hold --------------------------------------------------------------------------


@pytest.mark.parametrize("package", LISTED, ids=name_of)
def test_a_package_lists_its_files_and_no_other(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert files_named(docstring or "") == files_of(package)


def test_the_readme_shows_all_packages_and_rooms_on_one_screen() -> None:
    tree = tree_of((ROOT / "README.md").read_text())
    assert len(tree) <= 35
    named = list(paths_of(tree))
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert len(set(named)) == len(named)
    # A folder within a room is listed by the room.
    rooms = {f"{name_of(path)}/" for path in LISTED if name_of(path).count("/") < 2}
    rooms |= {f"{name_of(path.parent)}/" for path in (ROOT / "tests").glob("*/test_*.py")}
    assert rooms <= set(named)


TEXTS = sorted(
    path
    for folder in (*TOPS, "tests", "examples", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".json", ".yaml") and "vectors" not in path.parts
)
TEXTS += [ROOT / name for name in ("README.md", "Makefile", "cluster.yaml", "pyproject.toml")]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_what_a_text_names_is_there(path: Path) -> None:
    if name_of(path) not in MADE_UP:
        text = path.read_text()
        assert lost_modules(text) + lost_files(text) == []


# --- the rules find what they forbid ---------------------------------------------------------


def test_files_and_folders_of_a_docstring_are_found() -> None:
    docstring = "In words.\n\n- rows.py, text.py: both\n- http/: a folder, `actors.engine` none."
    assert files_named(docstring) == {"rows.py", "text.py", "http/"}
    assert files_named('model_ref="path/or/hub-id", see serve_app/replica/engines.py') == set()


def test_paths_of_a_tree_are_found() -> None:
    page = (
        "## Where things are\n\n```\nMakefile .ci/run    a\ntests/    b\n  data/ demo/    c\n```\n"
    )
    found = ["Makefile", ".ci/run", "tests/", "tests/data/", "tests/demo/"]
    assert list(paths_of(tree_of(page))) == found


@pytest.mark.parametrize(
    "text",
    [
        "see `tg_tinker.service`",
        "from tg_tinker.data.chats import to_batch",
        "tg_tinker.data.no_such_name",
        '"actors.upkeep:rotate"',
        "serve_app.sealed_http:middlewares",
        "actors.registry.registry.NoSuchRegistry",
    ],
)
def test_a_module_that_is_not_there_is_found(text: str) -> None:
    assert lost_modules(text)


def test_a_module_that_is_there_is_fine() -> None:
    text = "tg_tinker.data.to_batch, actors.privacy.accountants. serve_app.http.sealed:middlewares"
    assert lost_modules(f"{text} tg_tinker.data.rows.make_batches my.actors.lost") == []


@pytest.mark.parametrize("text", ["actors/sampler.py", "(tests/test_no.py)", "docs/no-page.md"])
def test_a_file_that_is_not_there_is_found(text: str) -> None:
    assert lost_files(text)
    assert lost_files("actors/process.py, `docs/storage.md`; /elsewhere/actors/sampler.py") == []
