"""Defines system calls that fail on demand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Calls:
    """A counter of the system calls that a save makes, which spoils some of them."""

    POINTS = (
        (Path, "open"), (Path, "mkdir"), (Path, "replace"), (os, "fsync"), (os, "open"),
    )  # fmt: skip

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int], None]) -> None:
        self.made = 0
        self._spoil = spoil
        for owner, name in self.POINTS:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        opened = Path.open

        def open_(path: Path, mode: str = "r", **options: Any) -> Any:
            file = opened(path, mode, **options)
            return Counted(file, self) if mode == "xb" else file

        monkeypatch.setattr(Path, "open", open_)

    def count(self) -> None:
        self.made += 1
        self._spoil(self.made)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count()
            return call(*arguments, **options)

        return counted


class Counted:
    """A file whose writes count too; a spoiled write has written half."""

    def __init__(self, file: Any, calls: Calls) -> None:
        self._file, self._calls = file, calls

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: bytes) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._calls.count()
        return half + int(self._file.write(content[half:]))
