"""Tests that modules of a user with the names of our packages are told before anything starts."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from tg_tinker import ClusterUnavailableError, InvalidRequestError
from tg_tinker.backend import PACKAGES, check_packages
from tg_tinker.cluster.ray_calls import ask

ROOT = Path(__file__).parents[2]

TRAIN = """
from tg_tinker import InvalidRequestError, ServiceClient
try:
    ServiceClient(address="local")
except InvalidRequestError as error:
    print(error)
import sys
assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
"""

KINDS = {
    "file": "{}.py",
    "package": "{}/__init__.py",
}


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TG_TINKER_HOME": str(folder / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["actors", "serve_app"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [["train.py"], ["-m", "train"]], ids=["script", "module"])
def test_a_name_that_is_taken_beside_the_program_is_told_with_its_file(
    name: str, kind: str, words: list[str], tmp_path: Path
) -> None:
    taken = tmp_path / KINDS[kind].format(name)
    taken.parent.mkdir(exist_ok=True)
    taken.write_text("MINE = 1")
    (tmp_path / "train.py").write_text(TRAIN)
    found = taken if kind == "file" else taken.parent
    assert f"the module {name} is {found}, which hides a package" in run(tmp_path, *words)
    assert not (tmp_path / "home").exists()


def test_a_module_that_the_program_has_imported_already_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "serve_app.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "serve_app"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("serve_app")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    try:
        with pytest.raises(InvalidRequestError, match="rename this file"):
            check_packages()
    finally:
        del sys.modules["serve_app"]
    check_packages()


def test_the_module_of_another_distribution_is_told_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    about = site / "theatre-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "actors.py").write_text("")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theatre\nVersion: 1.0\n")
    (about / "RECORD").write_text("actors.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    for name in [name for name in sys.modules if name.partition(".")[0] == "actors"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InvalidRequestError, match="it belongs to theatre, so use an environment"):
        check_packages()


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_working_directory_of_a_job_is_looked_at_too(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers look there, and `python sub/train.py` does not."""
    taken = tmp_path / KINDS[kind].format(name)
    taken.parent.mkdir(exist_ok=True)
    taken.write_text("")
    monkeypatch.chdir(tmp_path)
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}}
    with pytest.raises(InvalidRequestError, match=f"the module {name} is {tmp_path}"):
        check_packages({"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)})
    for other in ({}, {"runtime_env": {}}, {"runtime_env": {"pip": ["x"]}}):
        check_packages({"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(other)})
    check_packages({})
    check_packages({"RAY_JOB_CONFIG_JSON_ENV_VAR": "no json"})
    monkeypatch.chdir(ROOT)  # A clone of ours has them all.
    check_packages({"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)})


@pytest.mark.usefixtures("embedded")
def test_a_worker_that_cannot_import_the_class_of_an_actor_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("class Actor:\n    def ask(self): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    actor = ray.remote(importlib.import_module("only_here").Actor).remote()
    with pytest.raises(ClusterUnavailableError, match=r"cannot import TG-Tinker: rename .*actors"):
        ask(actor.ask)
    ray.kill(actor)
