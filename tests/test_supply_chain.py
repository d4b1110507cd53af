"""Tests that what is installed is pinned by hash and audited, and no text installs by name."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCKS = ("demo.txt", "dev.txt", "tools.txt")
OUTSIDE = {"torch", "tg-tinker"}


def lines_of(name: str) -> list[str]:
    """Returns the logical lines of a lock file, without comments."""
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    return [
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]


def locked(name: str) -> list[Requirement]:
    return [Requirement(line.partition("--hash")[0].strip()) for line in lines_of(name)]


def wanted(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    found = [*project["dependencies"], *(one for extra in extras for one in optional[extra])]
    return [Requirement(one) for one in found]


@pytest.mark.parametrize("name", LOCKS)
def test_each_package_is_pinned_by_hash_and_no_index_is_named(name: str) -> None:
    lines = lines_of(name)
    assert len(lines) > 20
    pinned = re.compile(
        r"[a-z0-9][a-z0-9._-]*(\[[a-z,]+\])?==[\w.!+]+( ; [^-]+)?"
        r"(\s+--hash=sha256:[0-9a-f]{64})+\s*"
    )
    assert [line[:60] for line in lines if not pinned.fullmatch(line)] == []
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    assert "index" not in re.sub(r"(?m)^ +#.*$", "", text)


@pytest.mark.parametrize(
    ("name", "extras"), [("demo.txt", ["demo"]), ("dev.txt", ["demo", "dev", "postgres"])]
)
def test_the_lock_is_in_step_with_the_project(name: str, extras: list[str]) -> None:
    found: dict[str, list[Requirement]] = {}
    for one in locked(name):
        found.setdefault(one.name, []).append(one)
    for requirement in wanted(*extras):
        if requirement.name in OUTSIDE:
            continue
        pins = found[requirement.name.lower()]
        for pin in pins:
            (version,) = (one.version for one in pin.specifier)
            assert version in requirement.specifier, f"{requirement}: make lock"
    assert found.keys().isdisjoint(OUTSIDE)
    assert not [one for one in found if one.startswith(("nvidia-", "triton"))]


def test_what_both_locks_have_is_the_same() -> None:
    assert {*lines_of("demo.txt")} < {*lines_of("dev.txt")}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_python_on_linux_gets_one_version_of_each_package(python: str, machine: str) -> None:
    here = {
        "python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
        "platform_machine": machine, "platform_system": "Linux", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip

    def applies(marker: Marker | None) -> bool:
        return marker is None or marker.evaluate(here)

    names = [one.name for one in locked("dev.txt") if applies(one.marker)]
    assert len(names) == len({*names}) > 150


def test_the_makefile_installs_what_is_locked_only() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    installs = [
        line for line in text.splitlines() if re.match(r"\t.*(\$\(PIP\)|pip install)", line)
    ]
    assert len(installs) == 3
    for line in installs:
        torch = line.endswith('"$(TORCH_SPEC)"')
        own = line.endswith("--no-deps --no-build-isolation --editable .")
        assert torch or own or "--require-hashes" in line, line
    assert re.search(r"^LOCKED := .* --no-deps --require-hashes ", text, re.M)
    pinned = re.search(r"^TORCH_SPEC +\?= torch==([\d.]+)$", text, re.M)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    assert pinned
    assert settings["constraint-dependencies"] == [f"torch=={pinned[1]}"]
    assert settings["dependency-metadata"][0]["version"] == pinned[1]


# --- the name on an index -----------------------------------------------------------------------


def by_name(text: str) -> list[str]:
    """Returns the commands of a text that install this project by its bare name."""
    joined = re.sub(r"[\"'`]\s*\n\s*f?[\"'`]", "", text)
    spec = r"(?:--?[\w-]+\s+)*[\"'`]?tg[-_.]tinker(?![\w./-]*(?:\.whl|/))"
    program = r"\b(?:pip|uv|pipx|uvx)\s+(?:pip\s+)?(?:tool\s+)?install"
    return re.findall(rf"{program}\s+{spec}", joined, re.IGNORECASE)


TEXTS = sorted(
    path
    for folder in ("tg_tinker", "actors", "serve_app", "examples", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in ("", ".py", ".md", ".yaml", ".json", ".sh")
)
TEXTS += [ROOT / name for name in ("README.md", "Makefile", "cluster.yaml", "CHANGELOG.md")]


def test_no_text_installs_this_project_by_its_name() -> None:
    assert [path.name for path in TEXTS if by_name(path.read_text())] == []


@pytest.mark.parametrize(
    "text",
    ["pip install tg-tinker", "pip install 'tg-tinker[postgres]'", "uv pip install -U tg_tinker==1",
     'x = "run pip install"\n    " tg-tinker[demo]"', "pipx install tg-tinker"],
)  # fmt: skip
def test_an_install_by_name_is_found(text: str) -> None:
    assert by_name(text)
    assert not by_name("pip install /opt/tg-tinker/tg_tinker-0.1.0-py3-none-any.whl")
    assert not by_name("pip install -e '.[demo]'; pip install './tg_tinker-0.1.0.whl[postgres]'")


# --- the audit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("exit 0", 0, "has no known vulnerability"),
        ('echo "jinja2 1.0 CVE-1" > "${10}"; exit 1', 1, "CVE-1"),
        (
            "echo no route to the service >&2; exit 1",
            0,
            "SKIPPED a.txt, the service gave no",
        ),
    ],
)
def test_an_audit_fails_for_findings_and_skips_visibly_without_an_answer(
    tmp_path: Path, program: str, status: int, said: str
) -> None:
    fake = tmp_path / "pip-audit"
    fake.write_text(f"#!/bin/sh\n{program}\n")
    fake.chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci" / "audit", "--vulnerability-service", "osv", "a.txt"],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout + done.stderr
