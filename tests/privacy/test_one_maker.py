"""Tests that one function makes private gradients, and that the engine that applies them knows
no privacy.

The tests read the source, so they hold for every path, including the untested ones.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [
    path for room in ("tg_tinker", "actors", "serve_app") for path in (ROOT / room).rglob("*.py")
]
MADE = "PrivateGradient"


def makers(source: str) -> Iterator[str]:
    """Returns the functions that call the type of private gradients, under whatever name a file
    has for it.

    The innermost function counts each time; "" is a call outside of any function.
    """
    module = ast.parse(source)
    names = {
        alias.asname or alias.name
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == MADE
    } | {MADE}

    def within(node: ast.AST, function: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names:
            yield function
        for child in ast.iter_child_nodes(node):
            yield from within(child, function)

    yield from within(module, "")


def first_party(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("tg_tinker", "actors", "serve_app")}


def test_privatize_alone_makes_a_private_gradient() -> None:
    found = {(path.relative_to(ROOT).as_posix(), by)
             for path in FILES for by in makers(path.read_text())}  # fmt: skip
    assert found == {("actors/privacy/clipping.py", "privatize")}


def test_another_maker_would_be_found() -> None:
    assert list(makers("def f():\n    return PrivateGradient({}, 0.0)")) == ["f"]
    assert list(makers("from a import PrivateGradient as P\nP({}, 1.0)")) == [""]
    assert list(makers("class A:\n    def g(self):\n        gradients.PrivateGradient(x)")) == ["g"]
    assert list(makers("def f(g: PrivateGradient) -> None: ...")) == []


def test_the_engine_stands_on_the_sdk_alone() -> None:
    for path in (ROOT / "actors/engine").glob("*.py"):
        found = first_party(path.read_text())
        assert [n for n in found if not n.startswith(("tg_tinker.", "actors.engine."))] == []
