"""Where a store is: a local folder, or a place that a URI names without any secret in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tg_tinker.errors import InvalidRequestError

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
    """A place outside this machine.

    Attributes:
        scheme: `s3`, `gs`, `abfss` or `hdfs`.
        bucket: bucket or container; empty for `hdfs`.
        host: of the Azure account or the name node; empty otherwise, or for the default one.
        port: of the name node; 0 for the default one.
        prefix: components joined by `/`, or empty: all names of the store are below it.
    """

    scheme: str
    bucket: str
    host: str
    port: int
    prefix: str

    @property
    def root(self) -> str:
        """The prefix as a path of pyarrow; on hdfs absolute, others are below a user's home."""
        return f"{self.bucket}/{self.prefix}".rstrip("/") or "/"


def parse(root: str) -> Path | Location:
    """What `store=` names: text without a colon before its first slash is a local folder, from here
    or from `~`.

    Raises:
        InvalidRequestError: not one of `FORMS`. The text is not repeated: it may hold a secret.
    """
    name, colon, rest = root.partition("/")[0].partition(":")
    if not colon or len(name) < 2:  # C:/ is a folder
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
    """The same in a form that means the same in every process: a local folder as a whole path.

    Raises:
        InvalidRequestError: see `parse`.
    """
    place = parse(root)
    return str(place) if isinstance(place, Path) else root


def local_path(text: str) -> Path | None:
    """A path from the root, from here or from `~`; None with control characters in it, with blanks
    at its ends, or of an unknown user."""
    if not text.isprintable() or text != text.strip():
        return None
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        return None


def check_name(name: str) -> str:
    """The name of an object, or of a folder of objects, itself.

    Raises:
        InvalidRequestError: a component is none.
    """
    for component in name.split("/"):
        check_component(component)
    return name


def shown(name: str) -> str:
    """A name that a stranger may have given, for a terminal: what does not print is escaped. One
    that `check_name` takes is itself, and what is escaped here it refuses."""
    return name if name.isprintable() else ascii(name)[1:-1]


def shown_lines(text: str) -> str:
    """The same of a text that may have several lines."""
    return "\n".join(map(shown, text.split("\n")))


def check_component(name: str) -> str:
    """A name without a slash, itself.

    Raises:
        InvalidRequestError: it is empty, begins with a dot, is longer than 200 characters or has
            other than ASCII letters, digits, dots, dashes and underscores. So no name leaves the
            store, and none meets the hidden files of a local folder.
    """
    if not is_component(name):
        raise InvalidRequestError(
            f"{name[:80]!r} is no name in a store: use letters, digits, dots, dashes and"
            " underscores, 1 to 200 of them and no dot in front"
        )
    return name


def is_component(name: str) -> bool:
    """Whether `check_component` takes it."""
    return _COMPONENT.fullmatch(name) is not None


def _folder(uri: str) -> Path:
    parts = urlsplit(uri)
    folder = unquote(parts.path)
    local = uri.startswith("file://") and parts.netloc in ("", "localhost")
    printable = folder.isprintable()  # a terminal or a log would obey others
    if not local or not folder.startswith("/") or not printable or parts.query or parts.fragment:
        raise _refused("file")
    return Path(folder)


def _refused(scheme: str) -> InvalidRequestError:
    forms = FORMS.get(scheme) or ", ".join(FORMS.values())
    return InvalidRequestError(
        f"a store is a local folder or has the form {forms}, as text, without user, password,"
        " query, special characters or blanks at its ends: credentials come from the environment"
        " of the process. A folder with a colon in its name begins with ./ or /"
    )
