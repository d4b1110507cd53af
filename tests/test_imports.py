"""Tests which file may import which, and through which file a heavy library is imported.

Every rule is a plain function from source text to findings, so tests also show that each rule finds
what it forbids.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import tg_tinker
import tg_tinker.data
import tg_tinker.demo
from tg_tinker import backend

ROOT = Path(__file__).parents[1]
LINE = ("tg_tinker", "actors", "serve_app")
"""Lowest first: a package imports those before it in this line, never those after."""

FLOORS = {
    # The values, which everything may name; `backend.py` declares what is above, and finds it.
    "tg_tinker": (),
    "tg_tinker/storage": ("tg_tinker",),
    "tg_tinker/data": ("tg_tinker/storage",),
    "tg_tinker/records": ("tg_tinker/storage",),
    "tg_tinker/backend.py": ("tg_tinker/records",),
    "tg_tinker/cluster": ("tg_tinker/backend.py",),
    "tg_tinker/client": ("tg_tinker/data", "tg_tinker/records", "tg_tinker/cluster"),
    "tg_tinker/demo": ("tg_tinker/client",),
    "tg_tinker/cli": ("tg_tinker/demo",),
    "tg_tinker/cli/main.py": ("tg_tinker/cli",),
    # Servers stand on the SDK's lower floors, never on its client, demo or commands.
    "actors/process.py": ("tg_tinker/cluster",),
    "actors/engine": ("tg_tinker/data",),
    "actors/storage": ("tg_tinker/records",),
    "actors/sampling": ("actors/engine", "tg_tinker/cluster"),
    "actors/registry/migrations": (),
    "actors/registry": ("actors/process.py", "actors/storage", "actors/registry/migrations"),
    "actors/privacy": ("actors/engine", "actors/registry"),
    "actors/artifacts": ("actors/registry",),
    "actors/artifacts/adapters.py": ("actors/artifacts", "actors/engine"),
    "actors/training": ("actors/sampling", "actors/privacy", "actors/artifacts/adapters.py"),
    "actors/operations": ("actors/sampling", "actors/privacy", "actors/artifacts/adapters.py"),
    "actors/backend.py": ("actors/training", "actors/operations"),
    "serve_app/replica": ("actors/sampling", "actors/artifacts"),
    "serve_app/http": ("serve_app/replica",),
    "serve_app/application.py": ("serve_app/http",),
    "serve_app/deploy.py": ("serve_app/application.py",),
    "serve_app/backend.py": ("serve_app/deploy.py",),
}
"""Room -> what it stands on, and on all that those stand on. Lowest first: a room names only those
before it, so no file can import what imports it. A room is a folder without its folders, or one
file of it that stands higher than the others."""

DOORS = {
    "ray": {
        "actors/operations/doctor_nodes.py",
        "actors/registry/actor.py",
        "actors/training/actor.py",
        "actors/training/storage_actor.py",
        "actors/training/warm_process.py",
        "serve_app/application.py",
        "serve_app/deploy.py",
        "serve_app/http/listening.py",
        "serve_app/http/routes.py",
        "serve_app/replica/metrics.py",
        "tg_tinker/cluster/ray_calls.py",
    },
    "transformers": {
        "actors/engine/loading.py",
        "actors/engine/lora.py",
        "actors/engine/model.py",
        "actors/engine/recompute.py",
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
        "actors/registry/book.py",
        "actors/registry/catalogue.py",
        "actors/registry/data_keys.py",
        "actors/registry/database.py",
        "actors/registry/draws.py",
        "actors/registry/grants.py",
        "actors/registry/key_names.py",
        "actors/registry/ledgers.py",
        "actors/registry/lookups.py",
        "actors/registry/migrations/r0001_first_release.py",
        "actors/registry/migrations/r0003_api_key_macs.py",
        "actors/registry/migrations/r0004_unit_sums.py",
        "actors/registry/orphans.py",
        "actors/registry/postgres.py",
        "actors/registry/refusals.py",
        "actors/registry/revisions.py",
        "actors/registry/runs.py",
        "actors/registry/schema.py",
        "actors/registry/uses.py",
    },
    "alembic": {
        "actors/registry/migrations/r0001_first_release.py",
        "actors/registry/migrations/r0002_fencing_token.py",
        "actors/registry/migrations/r0003_api_key_macs.py",
        "actors/registry/migrations/r0004_unit_sums.py",
        "actors/registry/revisions.py",
    },
    "opacus": {
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
    "llguidance": {
        "actors/sampling/grammar.py",
    },
}
"""Library -> the only files that may import it when they run."""

URL_OPENERS = {
    "aiohttp", "boto3", "botocore", "fsspec", "ftplib", "grpc", "http.client", "httpx", "httpx2",
    "huggingface_hub", "openai", "ray.job_submission", "requests", "smtplib", "urllib.request",
    "urllib3", "websockets", "xmlrpc",
}  # fmt: skip
"""Libraries that send requests. Most of them trust the environment, which may name a proxy."""

URL_DOORS = {
    # The one HTTP client. It decides which requests the environment's proxies may see.
    "tg_tinker/cli/http_client.py": {"httpx2"},
    # Asks a cluster, without its token, whether it requires it; the environment's proxies are off.
    "tg_tinker/cluster/authentication.py": {"grpc"},
    # Downloads public models, with the hub's own settings.
    "actors/engine/loading.py": {"huggingface_hub"},
    # Asks a server of this cluster for its health, by host and port; this library takes no proxy.
    "serve_app/http/sealed.py": {"http.client"},
}
"""The only files that may import one of `URL_OPENERS`."""

DOORS_FOR_TYPES = {"ray": {"tg_tinker/client/future.py", "tg_tinker/client/actor_link.py"}}
"""The same for imports under `if TYPE_CHECKING`."""

FILES = sorted(path for package in LINE for path in (ROOT / package).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def top(name: str) -> str:
    return name.partition("/")[0]


# --- the rules -------------------------------------------------------------------------------


class Import(NamedTuple):
    """An imported name: `from source import name as bound`."""

    source: str
    name: str | None
    bound: str
    for_types: bool

    @property
    def package(self) -> str:
        return self.source.split(".")[0]

    @property
    def module(self) -> str:
        """The module that is loaded: `from actors import engine` loads `actors.engine`."""
        inner = f"{self.source}.{self.name}"
        return inner if self.name and where(inner) else self.source


def where(module: str) -> Path | None:
    """The file of a module of ours; for a package, its `__init__`."""
    path = ROOT / module.replace(".", "/")
    found = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((one for one in found if one.exists()), None)


def imports(module: ast.Module, package: str = "") -> Iterator[Import]:
    """Returns every import of a file, at any depth of its code."""
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
            parts = package.split(".")
            start = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (start, node.module)))
            for alias in node.names:
                bound = alias.asname or alias.name
                yield Import(source, alias.name, bound, id(node) in for_types)


def ours(name: str, module: ast.Module) -> Iterator[Import]:
    """Returns the imports of a file that lead to packages of ours."""
    package = name.rpartition("/")[0].replace("/", ".")
    return (one for one in imports(module, package) if one.package in LINE)


def room(path: str) -> str | None:
    """Returns the room of a file or a folder: the nearest of `FLOORS`, never one floor further
    out."""
    return next((one for one in (path, path.rpartition("/")[0]) if one in FLOORS), None)


def room_of(module: str) -> str | None:
    path = module.replace(".", "/")
    return room(path if path in FLOORS else f"{path}.py")


def stands_on(rooms: Iterable[str]) -> set[str]:
    """Returns these rooms and all below them."""
    return {below for one in rooms for below in {one} | stands_on(FLOORS[one])}


def may_import(name: str) -> set[str]:
    """Returns the rooms whose modules a file may import.

    An `__init__` may also import those of its folders.
    """
    folder, _, file = name.rpartition("/")
    if file == "__init__.py":
        return stands_on(one for one in FLOORS if f"{one}/".startswith(f"{folder}/"))
    home = room(name)
    return stands_on([home] if home else [])


def upward_imports(name: str, module: ast.Module) -> list[str]:
    """Returns modules of ours that are on no floor that the file stands on."""
    allowed = may_import(name)
    return [one.module for one in ours(name, module) if room_of(one.module) not in allowed]


def names_through_init(name: str, module: ast.Module) -> list[str]:
    """Returns imports of packages themselves: their `__init__` is for users, and we name
    modules."""
    return [
        f"{one.source}: {one.name or 'all'}"
        for one in ours(name, module)
        if (where(one.module) or Path()).name == "__init__.py"
    ]


def imported_by(files: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Returns for each file the files of ours that it imports, including lazy imports and
    imports for types."""
    return {
        name: {name_of(found) for one in ours(name, module) if (found := where(one.module))}
        for name, module in files.items()
    }


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns files each of which imports the next, and the last the first; empty if there are
    none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def foreign_private_names(name: str, module: ast.Module) -> list[str]:
    """Returns underscore names of another module of ours that are imported, or reached through
    an import."""
    foreign = list(ours(name, module))
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
    """Returns how the library is imported: {False} when running, {True} for types only."""
    return {one.for_types for one in imports(module) if one.package == library}


def url_openers(module: ast.Module) -> set[str]:
    """Returns the libraries of `URL_OPENERS` that are imported, whole or in part."""
    names = [f"{one.source}.{one.name or ''}." for one in imports(module)]
    return {one for one in URL_OPENERS if any(name.startswith(f"{one}.") for name in names)}


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
    def test_has_a_room_in_the_table(self, path: Path) -> None:
        assert path.name == "__init__.py" or room(name_of(path))

    def test_imports_only_what_its_room_stands_on(self, path: Path) -> None:
        assert upward_imports(name_of(path), tree(path)) == []

    def test_names_modules_of_ours_and_not_what_an_init_hands_on(self, path: Path) -> None:
        assert names_through_init(name_of(path), tree(path)) == []

    def test_names_no_private_name_of_another_module(self, path: Path) -> None:
        assert foreign_private_names(name_of(path), tree(path)) == []

    def test_enters_heavy_libraries_through_their_doors(self, path: Path) -> None:
        module, name = tree(path), name_of(path)
        for library, doors in DOORS.items():
            for_types = {True} if name in DOORS_FOR_TYPES.get(library, ()) else set()
            allowed = {True, False} if name in doors else for_types
            assert doors_used(module, library) <= allowed, library

    def test_opens_urls_only_where_it_is_decided_what_a_proxy_may_see(self, path: Path) -> None:
        assert url_openers(tree(path)) == URL_DOORS.get(name_of(path), set())

    def test_has_no_assert_that_python_could_strip(self, path: Path) -> None:
        assert asserts(tree(path)) == []

    def test_imports_nothing_dynamically_but_the_entry_points(self, path: Path) -> None:
        allowed = ["entry_points"] if name_of(path) == "tg_tinker/backend.py" else []
        assert dynamic_imports(tree(path)) == allowed


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=name_of)
def test_an_example_opens_no_url(path: Path) -> None:
    assert url_openers(tree(path)) == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(imported_by({name_of(path): tree(path) for path in FILES})) == []


def test_the_table_goes_upwards() -> None:
    rooms = list(FLOORS)
    for at, (one, below) in enumerate(FLOORS.items()):
        assert set(below) <= set(rooms[:at]), one
        assert all(LINE.index(top(other)) <= LINE.index(top(one)) for other in below), one


def test_every_room_of_the_table_is_there() -> None:
    assert {one for one in FLOORS if not (ROOT / one).exists()} == set()
    folders = {name_of(path.parent) for path in FILES} - {"actors", "serve_app"}
    assert folders == {one for one in FLOORS if not one.endswith(".py")}


@pytest.mark.parametrize(
    ("one", "never"),
    [
        ("actors/engine", "tg_tinker/cluster"),
        ("actors/engine", "actors/registry"),
        ("actors/engine", "actors/storage"),
        ("actors/artifacts", "actors/engine"),
        ("actors/operations", "actors/training"),
        ("actors/training", "actors/operations"),
        ("serve_app/backend.py", "actors/training"),
        ("serve_app/backend.py", "tg_tinker/client"),
        ("actors/backend.py", "tg_tinker/client"),
        ("tg_tinker/backend.py", "tg_tinker/cluster"),
    ],
)
def test_the_table_keeps_apart(one: str, never: str) -> None:
    assert never in FLOORS
    assert never not in stands_on([one])


@pytest.mark.parametrize("library", DOORS)
def test_every_door_is_in_use(library: str) -> None:
    """A door that no import uses any more must be removed from the list."""
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
        "from serve_app.http import routes",
        "def f():\n    from actors.engine.model import Base",
        "if TYPE_CHECKING:\n    from actors.engine.model import Base",
        "class A:\n    def f(self):\n        try:\n            import actors.engine.session\n"
        "        except ImportError:\n            pass",
    ],
)
def test_an_import_up_the_line_is_found(source: str) -> None:
    for name in ("tg_tinker/config.py", "tg_tinker/client/service.py", "tg_tinker/__init__.py"):
        assert upward_imports(name, ast.parse(source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tg_tinker/config.py", "from tg_tinker.storage.files import read"),
        ("tg_tinker/storage/files.py", "from tg_tinker.data import batch"),
        ("tg_tinker/storage/files.py", "from tg_tinker.backend import provided"),
        ("tg_tinker/data/rows.py", "from tg_tinker.records.ledger import Ledger"),
        ("tg_tinker/cluster/node.py", "if TYPE_CHECKING:\n    import tg_tinker.client.service"),
        ("tg_tinker/backend.py", "from tg_tinker.cluster.messages import Reply"),
        ("tg_tinker/client/service.py", "def f():\n    from tg_tinker.cli import main"),
        ("tg_tinker/demo/run.py", "from ..cli.shared import connector"),
        ("tg_tinker/cli/shared.py", "def f():\n    from tg_tinker.cli.main import main"),
        ("tg_tinker/storage/__init__.py", "from tg_tinker.client.service import ServiceClient"),
        ("actors/process.py", "from actors.registry.registry import Registry"),
        ("actors/engine/model.py", "from tg_tinker.cluster import ray_calls"),
        ("actors/engine/model.py", "from ..storage.store import ArtifactStore"),
        ("actors/registry/registry.py", "from actors.engine.lineage import Lineage"),
        ("actors/artifacts/publish.py", "from actors.engine.checkpoint import Checkpoint"),
        ("actors/artifacts/publish.py", "from actors.artifacts.adapters import imported"),
        ("actors/operations/sweep.py", "import actors.training.worker"),
        ("actors/training/worker.py", "import actors.backend"),
        ("actors/training/worker.py", "from tg_tinker.client.home import home_directory"),
        ("serve_app/replica/sources.py", "from serve_app.http.access import HttpOptions"),
        ("serve_app/http/routes.py", "from serve_app.application import bound"),
        ("actors/nowhere.py", "from tg_tinker.errors import StorageError"),
        ("actors/training/worker.py", "from actors.nowhere import f"),
        ("actors/training/worker.py", "from actors.training.deep.down import f"),
    ],
)
def test_an_import_up_the_floors_is_found(name: str, source: str) -> None:
    assert upward_imports(name, ast.parse(source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("serve_app/http/routes.py", "from tg_tinker.data.batch import Example\nimport actorsque"),
        ("serve_app/http/routes.py", "from serve_app.replica import engines"),
        ("actors/training/worker.py", "from actors.artifacts.adapters import imported"),
        ("actors/artifacts/adapters.py", "from actors.engine.checkpoint import Checkpoint"),
        ("actors/backend.py", "def f():\n    from actors.operations.doctor import examine"),
        ("actors/engine/model.py", "from . import loading\nfrom .lora import Parameters"),
        ("tg_tinker/backend.py", "from tg_tinker.types import Orphan"),
        ("tg_tinker/cli/main.py", "from tg_tinker.cli import privacy"),
        ("tg_tinker/__init__.py", "from tg_tinker.client.service import ServiceClient"),
        ("tg_tinker/data/__init__.py", "from tg_tinker.data.chat import to_batch"),
    ],
)
def test_an_import_down_the_floors_is_fine(name: str, source: str) -> None:
    assert upward_imports(name, ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import tg_tinker",
        "import tg_tinker.data",
        "from tg_tinker import ServiceClient",
        "from tg_tinker.data import to_batch",
        "def f():\n    from tg_tinker import data",
        "from .. import data",
    ],
)
def test_a_name_that_comes_through_an_init_is_found(source: str) -> None:
    assert names_through_init("tg_tinker/client/service.py", ast.parse(source))


def test_a_name_that_comes_out_of_its_module_is_fine() -> None:
    source = "from tg_tinker.data import chat\nimport tg_tinker.data.rows\nfrom . import runs"
    assert names_through_init("tg_tinker/client/service.py", ast.parse(source)) == []


@pytest.mark.parametrize("lazily", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_a_circle_of_files_is_found(lazily: str) -> None:
    texts = {
        "tg_tinker/data/rows.py": "from tg_tinker.data import chat",
        "tg_tinker/data/chat.py": "import tg_tinker.data.text",
        "tg_tinker/data/text.py": "import json",
    }
    assert circle(imported_by({name: ast.parse(text) for name, text in texts.items()})) == []
    texts["tg_tinker/data/text.py"] = lazily.format("from tg_tinker.data.rows import Row")
    found = circle(imported_by({name: ast.parse(text) for name, text in texts.items()}))
    assert set(found) == set(texts)


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
def test_a_private_name_of_another_module_is_found(source: str) -> None:
    """It is found for a module beside this one and for one far below."""
    for name in ("actors/process.py", "tg_tinker/cluster/node.py"):
        assert foreign_private_names(name, ast.parse(source))


def test_private_names_of_its_own_and_of_others_libraries_are_fine() -> None:
    source = "import torch\ntorch._C\nself._one\n_two()\nfrom tg_tinker import __version__"
    assert foreign_private_names("actors/process.py", ast.parse(source)) == []


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
        "import urllib.request",
        "import urllib.request as r",
        "from urllib import request",
        "from urllib.request import urlopen",
        "import http.client, json",
        "from http import client",
        "import requests.sessions",
        "from ray import job_submission",
        "from ray.job_submission import JobSubmissionClient",
        "def f():\n    import httpx2",
        "try:\n    from aiohttp import ClientSession\nexcept ImportError:\n    pass",
    ],
)
def test_a_library_that_opens_urls_is_found(source: str) -> None:
    assert len(url_openers(ast.parse(source))) == 1


def test_a_library_that_only_reads_or_serves_urls_is_fine() -> None:
    source = "from urllib.parse import urlsplit\nimport http.server, urllib, requests_of_ours, ray"
    assert url_openers(ast.parse(f"{source}\nfrom http import HTTPStatus")) == set()


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


@pytest.mark.parametrize(
    "package", ["tg_tinker", "tg_tinker.data", "tg_tinker.demo", "tg_tinker.cluster.cluster"]
)
def test_importing_the_sdk_loads_no_heavy_library(package: str) -> None:
    heavy = {"torch", "ray", "transformers", "peft", "pyarrow", "sqlalchemy", "matplotlib"}
    program = f"import sys, {package}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_program_that_samples_or_serves_loads_no_torch() -> None:
    """Only the replicas load it, and the training actors."""
    program = "import sys, serve_app.application, actors.backend, actors.training.actor\n"
    program += "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


HANDING_ON = (tg_tinker, tg_tinker.data, tg_tinker.demo)


@pytest.mark.parametrize("package", HANDING_ON, ids=lambda package: package.__name__)
def test_public_names_are_listed_once_and_exist(package: ModuleType) -> None:
    """`__all__` is exactly what the package imports for its users, sorted."""
    module = tree(Path(str(package.__file__)))
    imported = [one.name or one.source for one in imports(module)]
    assert sorted(imported) == sorted(package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert hasattr(package, name), name


def test_only_these_packages_hand_names_on() -> None:
    """The question where a user finds a name has one answer."""
    found = {path for path in FILES if path.name == "__init__.py" and "__all__" in path.read_text()}
    assert found == {Path(str(package.__file__)) for package in HANDING_ON}
    names = [name for package in HANDING_ON for name in package.__all__]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("actors", backend.ActorsBackend), ("serve_app", backend.ServeBackend)],
)
def test_an_entry_point_is_a_class_that_offers_what_its_protocol_says_and_no_more(
    name: str, protocol: type
) -> None:
    """The type checker compares their arguments with the protocol, see the next test."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points: dict[str, str] = project["entry-points"][backend.GROUP]
    assert set(points) == {"actors", "serve_app"}
    module, _, attribute = points[name].partition(":")
    offered = getattr(import_module(module), attribute)
    assert isinstance(offered(), object)
    assert public(offered) == public(protocol)


def public(of: type) -> set[str]:
    return {name for name in vars(of) if not name.startswith("_")}


@pytest.mark.parametrize("path", ["actors/backend.py", "serve_app/backend.py"])
def test_a_backend_is_assigned_to_its_protocol_for_the_type_checker(path: str) -> None:
    assigned = [
        ast.unparse(node) for node in tree(ROOT / path).body if isinstance(node, ast.AnnAssign)
    ]
    assert any(
        re.fullmatch(r"_: type\[backend\.(Actors|Serve)Backend\] = Backend", line)
        for line in assigned
    )


@pytest.mark.parametrize("path", ["actors/backend.py", "serve_app/backend.py"])
def test_what_a_backend_offers_is_imported_when_it_is_called(path: str) -> None:
    """Otherwise a command that deletes an artifact would load torch."""
    at_once = [node.module for node in tree(ROOT / path).body if isinstance(node, ast.ImportFrom)]
    assert at_once
    assert [one for one in at_once if str(one).split(".")[0] in ("actors", "serve_app")] == []
