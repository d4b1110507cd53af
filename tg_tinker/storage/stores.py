"""Parses the location of a store: a local folder, or a URI that contains no secret."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from tg_tinker.errors import InvalidRequestError
from tg_tinker.storage.paths import absolute_path

FORMS = {
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "abfss": "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX",
    "hdfs": "hdfs://HOST:PORT/PREFIX",
    "file": "file:///FOLDER",
}

_AUTHORITIES = {
    "s3": r"(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{0,254})",
    "gs": r"(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{0,254})",
    "abfss": r"(?P<bucket>[a-z0-9$-]+)@(?P<host>[a-z0-9]+\.dfs(?:\.[a-z0-9-]+)+)",
    "hdfs": r"(?P<host>[A-Za-z0-9._-]*)(?::(?P<port>[0-9]{1,5}))?",
}

_COMPONENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Location:
    """The location of a store outside this machine.

    Attributes:
        scheme: `s3`, `gs`, `abfss` or `hdfs`.
        bucket: the bucket or container; empty for `hdfs`.
        host: the host of the Azure account or of the HDFS name node. Empty for `s3` and `gs`, and
            for the default name node.
        port: the port of the name node; 0 for the default port.
        prefix: the path that all names of the store are below, components joined by `/`. May be
            empty.
    """

    scheme: str
    bucket: str
    host: str
    port: int
    prefix: str

    @property
    def root(self) -> str:
        """The store's root as a pyarrow path.

        On `hdfs` the path is absolute, because HDFS resolves a relative path against the user's
        home.
        """
        return f"{self.bucket}/{self.prefix}".rstrip("/") or "/"


def parse(root: str) -> Path | Location:
    """Returns the location that `store=` names.

    Text without a colon before its first slash is a local folder. A relative folder is resolved
    against the working directory; `~` is expanded.

    Raises:
        InvalidRequestError: the text has none of `FORMS`, or see `absolute_path`. The message does
            not repeat the text, which may hold a secret.
    """
    name, colon, rest = root.partition("/")[0].partition(":")
    if not colon or len(name) < 2:  # a single letter is no scheme: C:/ is a folder
        if (folder := local_path(root)) is None:
            raise _refused("file")
        return folder
    rest = root.removeprefix(f"{name}:")
    if name == "file":
        return _folder(root)
    authority, _, prefix = rest.removeprefix("//").partition("/")
    known = re.fullmatch(_AUTHORITIES.get(name, r"(?!)"), authority)
    if not known or not rest.startswith("//"):
        raise _refused(name)
    prefix = prefix.rstrip("/")
    if prefix and not all(map(_COMPONENT.fullmatch, prefix.split("/"))):
        raise _refused(name)
    found = known.groupdict()
    port = int(found.get("port") or 0)
    return Location(name, found.get("bucket", ""), found.get("host", ""), port, prefix)


def as_text(root: str) -> str:
    """Returns the location as text that means the same in every process.

    A local folder becomes an absolute path.

    Raises:
        InvalidRequestError: see `parse`.
    """
    place = parse(root)
    return str(place) if isinstance(place, Path) else root


def local_path(text: str) -> Path | None:
    """Returns the text as an absolute path, with `~` expanded.

    Returns None if the text holds control characters, or starts or ends with a blank.

    Raises:
        InvalidRequestError: see `absolute_path`.
    """
    if not text.isprintable() or text != text.strip():
        return None
    return absolute_path(Path(text))


def check_name(name: str) -> str:
    """Returns the name of an object, or of a folder of objects, unchanged.

    Raises:
        InvalidRequestError: a component of the name is invalid, see `check_component`.
    """
    for component in name.split("/"):
        check_component(component)
    return name


def shown(name: str) -> str:
    """Returns a name in a form that is safe to print on a terminal.

    A stranger may have chosen the name. A name with characters that do not print is escaped; any
    other name, so every name that `check_name` accepts, is returned unchanged.
    """
    return name if name.isprintable() else ascii(name)[1:-1]


def shown_lines(text: str) -> str:
    """Returns a text of several lines in a form that is safe to print on a terminal."""
    return "\n".join(map(shown, text.split("\n")))


def check_component(name: str) -> str:
    """Returns a name without a slash, unchanged.

    The rule keeps every name inside the store and away from the hidden files of a local folder.

    Raises:
        InvalidRequestError: the name is empty, begins with a dot, is longer than 200 characters,
            or holds other characters than ASCII letters, digits, dots, dashes and underscores.
    """
    if not is_component(name):
        raise InvalidRequestError(
            f"{name[:80]!r} is not a valid name in a store: use 1 to 200 letters, digits, dots,"
            " dashes and underscores, and do not begin with a dot"
        )
    return name


def is_component(name: str) -> bool:
    """Returns whether `check_component` accepts the name."""
    return _COMPONENT.fullmatch(name) is not None


def _folder(uri: str) -> Path:
    parts = urlsplit(uri)
    folder = os.fsdecode(unquote_to_bytes(parts.path))
    # Before it is taken apart: `urlsplit` drops line breaks, and what is left is another folder.
    local = uri.isprintable() and uri.startswith("file://") and parts.netloc in ("", "localhost")
    found = local_path(folder) if folder.startswith("/") else None
    if not local or found is None or parts.query or parts.fragment:
        raise _refused("file")
    return found


def _refused(scheme: str) -> InvalidRequestError:
    forms = FORMS.get(scheme) or ", ".join(FORMS.values())
    return InvalidRequestError(
        f"a store is a local folder or has the form {forms}. Pass it as text, without user,"
        " password, query, special characters or blanks at its ends: credentials come from the"
        " environment of the process. Begin a folder with a colon in its name with ./ or /"
    )
