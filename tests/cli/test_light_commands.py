"""Tests that commands for artifacts and keys do not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.registry.upgrade import upgrade
from actors.storage.home import DATABASE
from support.old_homes import EXPECTED, old_home

ARTIFACT = EXPECTED["tenants"]["default"]["artifacts"]["labelled"]["id"]
PROGRAM = """
import sys
from pathlib import Path
from support.audit import LocalService
from tg_tinker.cli.main import main
home, *words = sys.argv[1:]
service = LocalService(Path(home), "default")
if "retire" in words:
    assert all(not problem for _, problem in service.rewrap_keys())
main(words, obj=lambda: service, standalone_mode=False)
print("loaded:", sorted({"torch", "transformers", "peft", "ray"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (f"artifacts delete {ARTIFACT} --yes", ""),
        (f"artifacts shred {ARTIFACT} --yes", "Backups"),
        ("keys rotate", "k3"),
        ("keys retire k1 --yes", ""),
        ("artifacts export {ARTIFACT} adapter", None),
    ],
)
def test_these_commands_load_no_torch(tmp_path: Path, words: str, says: str | None) -> None:
    """The last command writes tensors and so shows that the test would detect torch."""
    home = old_home(tmp_path / "home")
    upgrade(f"sqlite:///{home / DATABASE}", tmp_path / "before.db")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(home), *words.format(ARTIFACT=ARTIFACT).split()],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1]
    assert loaded == "loaded: []" if says is not None else "torch" in loaded
    assert (says or "") in done.stdout
