"""Tests that an installation from a wheel is whole: each package, the command, and nothing
beside them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import tg_tinker

ROOT = Path(__file__).parents[1]
TOPS = ("tg_tinker", "actors", "serve_app")
BESIDE = ("tests", "examples", "docs")
"""They lie beside the packages when the wheel is built, and stay out of it."""

MODULES = sorted(
    path.relative_to(ROOT).as_posix() for top in TOPS for path in (ROOT / top).rglob("*.py")
)

IMPORTS = """
import importlib, json, sys
found = {}
for name in json.load(sys.stdin):
    found[name] = importlib.import_module(name).__file__
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a wheel that is built from a copy: the leftovers of a build would get into the
    next build."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*TOPS, *BESIDE):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source)
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", target, wheel)
    return target


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    first, *others = map(str, arguments)
    done = subprocess.run(
        [*command, first, "--no-index", *others], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(installed: Path, cwd: Path, *arguments: object, given: str = "") -> str:
    """Returns Python's output with the installed packages first, then the libraries, and our
    clone nowhere.

    Without `site` no `.pth` is read, so an editable install of the clone is not found either.
    """
    libraries = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    path = os.pathsep.join(map(str, (installed, *libraries)))
    done = subprocess.run(
        [sys.executable, "-S", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "TG_TINKER_HOME": str(cwd / "home")},
        cwd=cwd,
        input=given,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_has_every_module_and_no_file_of_other_folders(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == set(MODULES)
    about = f"tg_tinker-{tg_tinker.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {*TOPS, about}
    assert {f"{top}/py.typed" for top in TOPS} <= set(names)


def test_the_installed_command_tells_its_version(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, installed / "bin/tg-tinker", "version")
    assert shown == f"tg-tinker {tg_tinker.__version__}\n"


@pytest.mark.program
def test_every_installed_module_is_imported_from_where_it_was_installed(
    installed: Path, tmp_path: Path
) -> None:
    names = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in MODULES
    ]
    found = json.loads(run(installed, tmp_path, "-c", IMPORTS, given=json.dumps(names)))
    wanted = [str(installed / name) for name in MODULES]
    assert [found[name] for name in names] == wanted


def test_without_what_was_installed_nothing_of_ours_is_found(tmp_path: Path) -> None:
    """This gives the tests above their meaning: the clone cannot replace a lost folder."""
    program = f"import importlib.util as u; print([u.find_spec(name) for name in {TOPS}])"
    assert run(tmp_path, tmp_path, "-c", program) == "[None, None, None]\n"
