"""Lists the messages that an operator can meet, as the code has them, and writes them into a page.

    PYTHONPATH=.:tests python -m support.messages       writes the tables of docs/troubleshooting.md

The text around the tables is written by hand. What stands for a value is an ellipsis.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from actors.registry.refusals import REFUSALS
from actors.storage.answers import CAUSES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"

CLASSES = {
    "StorageError", "ClusterUnavailableError", "PlacementError", "IntegrityError", "RollbackError",
    "LedgerMismatchError",
}  # fmt: skip
"""Errors about machines and their state. Those about a request are for its caller; docs/errors.md
has them."""

SETTINGS = (
    "tg_tinker/cluster/", "tg_tinker/storage/", "actors/storage/", "actors/registry/actor.py",
)  # fmt: skip
"""Where an `InvalidRequestError` is about a setting that an operator has made."""

SECTIONS = {
    "clusters": ("tg_tinker/backend.py", "tg_tinker/cluster/", "tg_tinker/cli/cluster.py"),
    "runs": (
        "tg_tinker/client/lost_calls.py", "tg_tinker/client/runs.py", "actors/training/",
        "actors/engine/", "tg_tinker/data/", "tg_tinker/demo/",
    ),
    "homes": (
        "tg_tinker/client/", "tg_tinker/storage/home.py", "tg_tinker/storage/keyrings.py",
        "tg_tinker/storage/paths.py", "tg_tinker/storage/files.py", "actors/storage/home.py",
        "actors/storage/key", "actors/storage/secrets.py", "actors/storage/signing.py",
        "actors/operations/keys.py", "actors/registry/actor.py", "actors/registry/data_keys.py",
        "actors/registry/key_names.py",
    ),
    "databases": (
        "tg_tinker/storage/databases.py", "tg_tinker/storage/sqlite_files.py",
        "actors/registry/database.py", "actors/registry/postgres.py",
        "actors/registry/revisions.py", "actors/registry/backup.py",
        "actors/registry/group_commit.py", "actors/registry/migrations/",
    ),
    "evidence": (
        "tg_tinker/records/", "tg_tinker/storage/envelope.py", "tg_tinker/storage/segments.py",
    ),
    "stores": (
        "tg_tinker/storage/stores.py", "actors/storage/", "actors/artifacts/",
        "actors/operations/", "actors/registry/",
    ),
    "servers": ("serve_app/", "tg_tinker/cli/"),
}  # fmt: skip
"""Section of the page -> the files whose messages it lists. The first that fits decides."""


class Message(NamedTuple):
    section: str
    error: str
    says: str
    next_step: str  # Empty if the text has none of its own.


def messages() -> list[Message]:
    """Returns the messages in the code that an operator can meet."""
    found = set()
    for top in ("tg_tinker", "actors", "serve_app"):
        for path in (ROOT / top).rglob("*.py"):
            file = path.relative_to(ROOT).as_posix()
            for error, text in raised_in(ast.parse(path.read_text())):
                if error in CLASSES or file.startswith(SETTINGS):
                    found.add(Message(section_of(file), error, *parted(text)))
    return sorted(found)


def section_of(file: str) -> str:
    return next(name for name, parts in SECTIONS.items() if file.startswith(parts))


def raised_in(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields class and text of each error that a module makes; none whose text is all values."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            text = text_of(node.args[0])
            if node.func.id in CLASSES | {"InvalidRequestError"} and re.search(r"\w", text):
                yield node.func.id, text


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return re.sub("…[…. ]*…", "…", "".join(map(text_of, node.values)))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def parted(text: str) -> tuple[str, str]:
    """Returns what a message says, and the next step after its first colon outside parentheses or,
    without a colon, after its first sentence."""
    for mark in (r": ", r"\. "):
        for found in re.finditer(mark, text):
            before, after = text[: found.start()], text[found.end() :]
            if before.count("(") == before.count(")") and re.search(r"[a-z]{3}", after):
                return before, after
    return re.sub(": …$", "", text), ""


# --- the page -------------------------------------------------------------------------------


def tables() -> dict[str, list[str]]:
    """Returns the rows of each table of the page."""
    listed: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for message in messages():
        step = message.next_step or "see above"
        listed[message.section].append(row(message.says, f"`{message.error}`", step))
    answers = [
        row(f"`{one.reason}`", one.text, one.remedy.removesuffix(", and"), "yes" * one.may_pass)
        for one in sorted(CAUSES)
    ]
    refusals = [row(one.text, one.remedy) for one in REFUSALS]
    return listed | {"answers": answers, "refusals": refusals}


def row(*cells: str) -> str:
    """Returns a row of a table. No page names a web address, so the form of one is cut short."""
    text = " | ".join(cell.replace("|", "/") for cell in cells)
    return f"| {text.replace('https://', 'https:')} |"


def written(page: str) -> str:
    """Returns the page with the rows of its tables as the code has them."""
    for name, rows in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = page.partition(begin)
        header, _, tail = rest.partition(end)
        kept = header.splitlines()[:2]  # the names of the columns
        page = head + begin + "\n".join([*kept, *rows]) + "\n" + end + tail
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
