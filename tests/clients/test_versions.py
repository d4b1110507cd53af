"""Tests that the page about sampling lists what `make clients` installs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_versions_that_are_tested() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (pinned,) = re.findall(r"^CLIENTS +:=((?:.*\\\n)*.*)", makefile, re.M)
    page = (ROOT / "docs" / "sampling.md").read_text()
    table = page.partition("### Clients that work")[2].partition("```")[0]
    tested = dict(re.findall(r"^\| `(\S+)`.*?\| ([\d.]+) \|", table, re.M))
    lowest = dict(re.findall(r"'(\S+?)>=([\d.]+),<\d[\d.]*'", pinned))
    assert len(lowest) == 5
    assert lowest.keys() == tested.keys()
    assert [name for name in lowest if not tested[name].startswith(lowest[name])] == []
