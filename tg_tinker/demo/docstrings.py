"""Makes the demo's text: question/answer pairs from the docstrings of Python's standard library.

    >>> from tg_tinker.demo.docstrings import docstring_rows
    >>> docstring_rows()[0].keys()
    dict_keys(['prompt', 'completion'])

There are about 4,000 pairs, the same on every machine with the same Python version. The sources are
parsed and never imported, so none of their code runs. The text leaves out packages that
distributors split off (such as tkinter), tests, private names, and every answer that an earlier
pair already gives.
"""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tg_tinker.errors import NotFoundError

MIN_CHARS, MAX_CHARS = 20, 400
"""The bounds of an answer's length. Longer answers take a demo more time than they teach."""

_SPLIT_OFF = {
    "distutils", "ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo",
    "venv",
}  # fmt: skip
_PUBLIC_NAMES = {"_pydecimal": "decimal", "_pyio": "io", "_collections_abc": "collections.abc"}
"""The public names of modules whose sources have a private name."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def docstring_rows(library: Path | None = None) -> list[dict[str, str]]:
    """Returns ``{"prompt", "completion"}`` rows, ordered by module name and position in the source.

    Args:
        library: the folder with the sources; None means the library of the running Python.

    Raises:
        NotFoundError: this Python has no sources of its library.
    """
    root = library or Path(sysconfig.get_path("stdlib"))
    names: dict[str, str] = {}
    answers: set[str] = set()
    for module, path in _modules(root):
        for qualified, answer in _documented(path):
            if f"{module}.{qualified}" not in names and answer not in answers:
                names[f"{module}.{qualified}"] = answer
                answers.add(answer)
    if not names:
        raise NotFoundError(
            "this Python has no library sources, from which the demo makes its text: pass your own"
            " file with --data"
        )
    return [_row(name, answer) for name, answer in names.items()]


def _row(name: str, answer: str) -> dict[str, str]:
    return {"prompt": f"What does `{name}` do in Python?", "completion": answer}


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields (dotted public name, source file) of each module, in order."""
    for top in sorted(sys.stdlib_module_names - _SPLIT_OFF):
        files = [root / f"{top}.py", *sorted((root / top).rglob("*.py"))]
        for path in files:
            name = _dotted_name(path.relative_to(root))
            if name is not None and path.is_file():
                yield name, path


def _dotted_name(path: Path) -> str | None:
    """Returns the dotted name of a module: `xml/dom/__init__.py` is `xml.dom`.

    Returns None for private modules and tests.
    """
    parts = [_PUBLIC_NAMES.get(part, part) for part in path.with_suffix("").parts]
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    hidden = any(part.startswith("_") or part in ("test", "tests") for part in parts)
    return None if hidden else ".".join(parts)


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (qualified name, answer) of each public definition with a fitting docstring."""
    for name, node in _definitions(ast.parse(path.read_bytes()), ""):
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
        answer = " ".join(inspect.cleandoc(paragraph).split())
        if MIN_CHARS <= len(answer) <= MAX_CHARS:
            yield name, answer


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Yields public classes, functions and methods in order, also those under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Definition):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from _definitions(child, prefix)
        elif not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{prefix}{child.name}.")
