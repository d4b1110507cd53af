"""Holds the findings of `tg-tinker doctor`, one line each."""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, PROBLEM = "ok", "warning", "problem"

OF_NODES = ("versions", "clocks", "machines", "shared store")
"""The checks that need a running cluster. Each is reported even where no cluster runs."""


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        check: the name of the check.
        status: `OK`, `WARNING` or `PROBLEM`.
        message: what was found, and what to do about it.
    """

    check: str
    status: str
    message: str
