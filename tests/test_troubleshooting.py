"""Tests that docs/troubleshooting.md has the messages of the code, and no other."""

from __future__ import annotations

import ast

from support.messages import PAGE, SECTIONS, messages, parted, raised_in, tables, written


def test_the_page_has_each_message_of_the_code_and_no_other() -> None:
    page = PAGE.read_text()
    now = "write the page anew: PYTHONPATH=.:tests python -m support.messages"
    assert page == written(page), now


def test_each_table_is_on_the_page_and_has_rows() -> None:
    page = PAGE.read_text()
    for name, rows in tables().items():
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end of {name} -->") == 1
        assert rows, name
    assert len(messages()) > 150
    assert {one.section for one in messages()} == SECTIONS.keys()


def test_a_message_that_the_page_lacks_is_found() -> None:
    page = PAGE.read_text()
    one = next(line for line in page.splitlines() if "has lost its" in line)
    for changed in (page.replace(f"{one}\n", ""), page.replace(one, f"{one}\n{one}")):
        assert written(changed) == page


def test_messages_are_read_from_code_and_parted_before_their_next_step() -> None:
    module = ast.parse(
        'raise StorageError(f"the disk {name!r} (at: {x}) is full: free " "space") from None\n'
        'raise StorageError(wrong)\nraise ValueError("no")\n'
    )
    ((error, text),) = raised_in(module)
    assert (error, *parted(text)) == (
        "StorageError", "the disk … (at: …) is full", "free space",
    )  # fmt: skip
    assert parted("it ended. Start it again") == ("it ended", "Start it again")
    assert parted("cannot write …: …") == ("cannot write …", "")
