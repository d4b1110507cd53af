"""What `tg-tinker doctor` finds, a line each."""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, PROBLEM = "ok", "warning", "problem"

OF_NODES = ("versions", "clocks", "machines", "shared store")
"""Checks that need a running cluster; each is told of, also where none runs."""


class Finding(NamedTuple):
    check: str
    status: str  # OK, WARNING or PROBLEM
    message: str  # what was found, and what to do about it
