"""Tests that every test exists that docs/privacy.md and docs/security.md name for their claims."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("page", ["privacy.md", "security.md"])
def test_every_claim_names_tests_that_exist(page: str) -> None:
    table = (TESTS.parent / "docs" / page).read_text().partition("## Claims and the tests")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    defined = {
        name
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, row
