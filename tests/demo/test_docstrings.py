"""Tests that the demo's text is large, clean, public and always the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from tg_tinker.demo.docstrings import MAX_CHARS, MIN_CHARS, docstring_rows
from tg_tinker.errors import NotFoundError

Rows = list[dict[str, str]]
DIGEST = (
    "from hashlib import sha256; from tg_tinker.demo.docstrings import docstring_rows;"
    "print(sha256(repr(docstring_rows()).encode()).hexdigest())"
)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return docstring_rows()


def test_there_are_about_four_thousand_pairs(rows: Rows) -> None:
    assert 3000 <= len(rows) <= 5000


def test_a_well_known_function_is_among_them(rows: Rows) -> None:
    answers = {row["prompt"]: row["completion"] for row in rows}
    answer = answers["What does `shutil.copyfile` do in Python?"]
    assert answer == "Copy data from src to dst in the most efficient way possible."


def test_sources_under_private_names_get_their_public_ones(rows: Rows) -> None:
    prompts = {row["prompt"] for row in rows}
    assert "What does `decimal.Context.copy_abs` do in Python?" in prompts
    assert not any("_pydecimal" in prompt for prompt in prompts)


def test_every_name_is_public_and_no_test(rows: Rows) -> None:
    names = [re.fullmatch(r"What does `([\w.]+)` do in Python\?", r["prompt"]) for r in rows]
    parts = {part for name in names if name for part in name[1].split(".")}
    assert all(names)
    assert not any(part.startswith("_") for part in parts)
    assert parts.isdisjoint({"tests", "idlelib", "lib2to3", "tkinter", "distutils"})


def test_answers_are_one_clean_line_within_bounds(rows: Rows) -> None:
    for row in rows:
        answer = row["completion"]
        assert MIN_CHARS <= len(answer) <= MAX_CHARS
        assert answer == " ".join(answer.split())


def test_no_prompt_and_no_answer_comes_twice(rows: Rows) -> None:
    assert len({row["completion"] for row in rows}) == len(rows)
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_another_process_finds_the_same_rows_in_the_same_order(rows: Rows) -> None:
    found = subprocess.run(
        [sys.executable, "-c", DIGEST],
        capture_output=True,
        check=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert found.stdout.strip() == sha256(repr(rows).encode()).hexdigest()


def test_no_module_of_the_library_is_imported() -> None:
    code = (
        "import sys, tg_tinker.demo.docstrings as d; before = set(sys.modules); d.docstring_rows();"
        "print(sorted(set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "[]"


def test_a_python_without_sources_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="--data"):
        docstring_rows(tmp_path)


def test_only_the_first_paragraph_of_public_definitions_is_taken(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(
        '"""Module docstring, which is no definition."""\n'
        "if True:\n"
        "    def load():\n"
        '        """Loads a thing\n        from a file.\n\n        More."""\n'
        "        def inner():\n"
        '            """Not reachable from outside."""\n'
        "else:\n"
        "    def load():\n"
        '        """The same under another condition."""\n'
        "class Codec:\n"
        '    """Turns a into b and back."""\n'
        "    def _private(self):\n"
        '        """Nobody should call this."""\n'
        "    async def encode(self):\n"
        '        """Loads a thing from a file."""\n'
        "    def short(self):\n"
        '        """Too short."""\n'
    )
    assert docstring_rows(tmp_path) == [
        {
            "prompt": "What does `json.load` do in Python?",
            "completion": "Loads a thing from a file.",
        },
        {
            "prompt": "What does `json.Codec` do in Python?",
            "completion": "Turns a into b and back.",
        },
    ]


def test_modules_come_in_order_and_tests_not_at_all(tmp_path: Path) -> None:
    names = [f"json.m{i:02d}" for i in range(30)]
    for name in [*reversed(names), "json.test.a", "json.tests.b", "json._private", "idlelib.c"]:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'def f():\n    """Does the work of module {name}."""\n')
    found = [row["prompt"] for row in docstring_rows(tmp_path)]
    assert found == [f"What does `{name}.f` do in Python?" for name in names]
