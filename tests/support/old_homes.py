"""Opens homes of earlier releases, each with the program that made it: see the README beside
them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).parents[1] / "vectors" / "home_22e0997"
EXPECTED: dict[str, Any] = json.loads((FIXTURE / "expected.json").read_text())
HUB = {"HF_HUB_CACHE": str(FIXTURE / "hub"), "HF_HUB_OFFLINE": "1"}


def old_home(place: Path) -> Path:
    """Makes a copy of the home of commit 22e0997, with the modes that git does not keep."""
    shutil.copytree(FIXTURE / "home", place)
    place.chmod(0o700)
    for name in ("keyring", "audit.key"):
        (place / name).chmod(0o600)
    return place


def old_program(place: Path) -> Path:
    """Unpacks the program of commit 22e0997 from its wheel."""
    (wheel,) = FIXTURE.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(place)
    return place


def run_old(program: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    """Runs Python with the old program, and without this one."""
    environment = os.environ | {"PYTHONPATH": str(program)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=program, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
