"""Who may import whom, and through which file a heavy library comes in.

Every rule is a plain function from source text to findings, so each is also shown to find what
it forbids.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import tg_tinker

ROOT = Path(__file__).parents[1]
LINE = ("tg_tinker", "actors", "serve_app")
"""Lowest first: a package imports those before it in this line, never those after."""

DOORS = {
    "ray": {
        "actors/operations/doctor_nodes.py",
        "actors/registry/actor.py",
        "actors/training/actor.py",
        "actors/training/storage_actor.py",
        "actors/training/warm_process.py",
        "serve_app/application.py",
        "serve_app/deploy.py",
        "serve_app/http/routes.py",
        "serve_app/replica/metrics.py",
        "tg_tinker/cluster/ray_calls.py",
    },
    "transformers": {
        "actors/engine/loading.py",
        "actors/engine/lora.py",
        "actors/engine/model.py",
        "tg_tinker/data/text.py",
    },
    "peft": {
        "actors/engine/lora.py",
    },
    "sqlalchemy": {
        "actors/registry/api_keys.py",
        "actors/registry/artifacts.py",
        "actors/registry/audit_log.py",
        "actors/registry/backup.py",
        "actors/registry/database.py",
        "actors/registry/key_names.py",
        "actors/registry/ledgers.py",
        "actors/registry/orphans.py",
        "actors/registry/postgres.py",
        "actors/registry/registry.py",
    },
    "opacus": {
        "actors/privacy/accountants.py",
        "actors/privacy/layers.py",
    },
    "cryptography": {
        "actors/operations/doctor_cluster.py",
        "tg_tinker/storage/envelope.py",
        "tg_tinker/storage/segments.py",
    },
    "pyarrow": {
        "actors/storage/filesystems.py",
        "tg_tinker/data/rows.py",
    },
    "tenacity": {
        "actors/storage/bucket.py",
    },
    "matplotlib": {
        "tg_tinker/demo/plots.py",
    },
}
"""Library -> the only files that may import it when they run."""

DOORS_FOR_TYPES = {"ray": {"tg_tinker/client/future.py", "tg_tinker/client/actor_link.py"}}
"""The same for imports under `if TYPE_CHECKING`."""

FILES = sorted(path for package in LINE for path in (ROOT / package).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- the rules -------------------------------------------------------------------------------


class Import(NamedTuple):
    """One imported thing: `from source import name as bound`."""

    source: str
    name: str | None
    bound: str
    for_types: bool

    @property
    def package(self) -> str:
        return self.source.split(".")[0]


def imports(module: ast.Module, package: str = "") -> Iterator[Import]:
    """Every import of a file, at any depth of its code."""
    for_types = {
        id(inner)
        for node in ast.walk(module)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for branch in node.body
        for inner in ast.walk(branch)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                yield Import(alias.name, None, bound, id(node) in for_types)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays in its package: it has one level of folders only.
            source = ".".join(filter(None, (package if node.level else "", node.module)))
            for alias in node.names:
                bound = alias.asname or alias.name
                yield Import(source, alias.name, bound, id(node) in for_types)


def upward_imports(package: str, module: ast.Module) -> list[str]:
    above = LINE[LINE.index(package) + 1 :]
    return [found.source for found in imports(module, package) if found.package in above]


def foreign_private_names(package: str, module: ast.Module) -> list[str]:
    """Underscore names of another first-party package: imported, or reached through one."""
    foreign = [
        one for one in imports(module, package) if one.package in LINE and one.package != package
    ]
    bound = {one.bound for one in foreign}
    imported = [part for one in foreign for part in f"{one.source}.{one.name}".split(".")]
    reached = [
        node.attr
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] in bound
    ]
    return [name for name in imported + reached if is_private(name)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def doors_used(module: ast.Module, library: str) -> set[bool]:
    """Whether the library is imported: {False} when running, {True} for types only."""
    return {one.for_types for one in imports(module) if one.package == library}


def dynamic_imports(module: ast.Module) -> list[str]:
    calls = [ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)]
    # As bare names only: `model.eval()` is torch's.
    builtins = [call for call in calls if call in ("__import__", "exec", "eval")]
    last = [call.rpartition(".")[2] for call in calls]
    return builtins + [call for call in last if call in ("import_module", "entry_points")]


def asserts(module: ast.Module) -> list[int]:
    return [node.lineno for node in ast.walk(module) if isinstance(node, ast.Assert)]


# --- the rules hold --------------------------------------------------------------------------


def test_all_three_packages_are_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LINE)
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=name_of)
class TestEveryFile:
    def test_imports_follow_the_line(self, path: Path) -> None:
        assert upward_imports(path.relative_to(ROOT).parts[0], tree(path)) == []

    def test_names_no_private_name_of_another_package(self, path: Path) -> None:
        assert foreign_private_names(path.relative_to(ROOT).parts[0], tree(path)) == []

    def test_enters_heavy_libraries_through_their_doors(self, path: Path) -> None:
        module, name = tree(path), name_of(path)
        for library, doors in DOORS.items():
            for_types = {True} if name in DOORS_FOR_TYPES.get(library, ()) else set()
            allowed = {True, False} if name in doors else for_types
            assert doors_used(module, library) <= allowed, library

    def test_has_no_assert_that_python_could_strip(self, path: Path) -> None:
        assert asserts(tree(path)) == []

    def test_imports_nothing_dynamically_but_the_entry_points(self, path: Path) -> None:
        allowed = ["entry_points"] if name_of(path) == "tg_tinker/backend.py" else []
        assert dynamic_imports(tree(path)) == allowed


@pytest.mark.parametrize("library", DOORS)
def test_every_door_is_in_use(library: str) -> None:
    """A door that nothing goes through any more is taken off the list."""
    for door in DOORS[library]:
        assert doors_used(tree(ROOT / door), library), door
    for door in DOORS_FOR_TYPES.get(library, ()):
        assert doors_used(tree(ROOT / door), library) == {True}, door


# --- the rules find what they forbid ---------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "import actors",
        "import actors.engine.model as m",
        "from serve_app import app",
        "def f():\n    from actors.engine.model import Base",
        "if TYPE_CHECKING:\n    from actors.engine.model import Base",
        "class A:\n    def f(self):\n        try:\n            import actors.engine.session\n"
        "        except ImportError:\n            pass",
    ],
)
def test_an_import_up_the_line_is_found(source: str) -> None:
    assert upward_imports("tg_tinker", ast.parse(source))


def test_an_import_down_the_line_is_fine() -> None:
    source = "from tg_tinker.data.batch import Example\nfrom actors import engine\nimport actorsque"
    assert upward_imports("serve_app", ast.parse(source)) == []
    assert upward_imports("actors", ast.parse("from . import engine")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from tg_tinker.cluster.connection import _answers",
        "from tg_tinker import _private",
        "import tg_tinker._private",
        "def f():\n    from tg_tinker._private import anything",
        "from tg_tinker import connection\nconnection._answers()",
        "import tg_tinker.cluster.connection\ntg_tinker.connection._answers()",
        "from tg_tinker.cluster.cluster import Cluster\nCluster._embedded_users",
        "import tg_tinker.cluster.connection as c\nc._answers()",
    ],
)
def test_a_private_name_of_another_package_is_found(source: str) -> None:
    assert foreign_private_names("actors", ast.parse(source))
    assert foreign_private_names("tg_tinker", ast.parse(source)) == []


def test_a_heavy_import_is_found_in_a_function_and_under_type_checking() -> None:
    inside = "def f():\n    import ray.util"
    typed = "if typing.TYPE_CHECKING:\n    import ray"
    assert doors_used(ast.parse(inside), "ray") == {False}
    assert doors_used(ast.parse(typed), "ray") == {True}
    assert doors_used(ast.parse(f"{typed}\n{inside}"), "ray") == {True, False}
    assert doors_used(ast.parse("import rayon\nfrom tg_tinker import ray"), "ray") == set()


@pytest.mark.parametrize(
    "source",
    [
        "importlib.import_module('a')",
        "import_module('a')",
        "__import__('a')",
        "eval('a')",
        "exec('a')",
    ],
)
def test_a_dynamic_import_is_found(source: str) -> None:
    assert dynamic_imports(ast.parse(source))


def test_an_assert_is_found() -> None:
    assert asserts(ast.parse("def f(x):\n    assert x")) == [2]


# --- what the packages offer -----------------------------------------------------------------


@pytest.mark.parametrize("package", ["tg_tinker", "tg_tinker.cluster", "tg_tinker.data.text"])
def test_importing_the_sdk_loads_no_heavy_library(package: str) -> None:
    heavy = {"torch", "ray", "transformers", "peft", "pyarrow", "sqlalchemy", "matplotlib"}
    program = f"import sys, {package}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_listed_once_and_exist() -> None:
    """`__all__` is exactly what the package imports for its users, sorted."""
    module = tree(ROOT / "tg_tinker/__init__.py")
    imported = [one.name or one.source for one in imports(module)]
    assert sorted(imported) == sorted(tg_tinker.__all__)
    assert len(set(tg_tinker.__all__)) == len(tg_tinker.__all__)
    for name in tg_tinker.__all__:
        assert hasattr(tg_tinker, name), name


def offered() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points: dict[str, str] = project["entry-points"]["tg_tinker.cluster"]
    return points


@pytest.mark.parametrize("name", offered())
def test_an_entry_point_resolves_to_a_callable(name: str) -> None:
    module, _, attribute = offered()[name].partition(":")
    assert callable(getattr(import_module(module), attribute))


def test_what_the_sdk_asks_for_is_offered_and_nothing_else() -> None:
    asked = {
        node.args[0].value
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "provided"
        and isinstance(node.args[0], ast.Constant)
    }
    assert asked == set(offered())
