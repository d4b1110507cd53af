"""Labels of artifacts: a few short names with values, such as ``stage=prod``.

They are for finding artifacts again. The registry keeps them in clear: they are no place for what
only the holder of the keys may read, which `save_state(metadata=...)` is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tg_tinker.errors import InvalidRequestError

AUTOMATIC = {"saved": "automatically"}
"""Of an artifact that a run saved by itself; whoever labels it anew keeps it."""

MOST_LABELS = 16
"""Of one artifact."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}")
_VALUE = re.compile(r"[A-Za-z0-9._/@:+-]{0,63}")


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises InvalidRequestError for too many labels, or a name or value of another form."""
    if not isinstance(labels, Mapping):
        raise InvalidRequestError(
            "labels are a dict of names and values, such as {'stage': 'prod'}; {} removes them all"
        )
    if len(labels) > MOST_LABELS:
        raise InvalidRequestError(
            f"{len(labels)} labels are too many: an artifact has {MOST_LABELS} at most"
        )
    for name, value in labels.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise InvalidRequestError(
                f"label {name!r:.80}: a name has 1 to 63 lower-case letters, digits and . _ / -, a"
                " letter or digit first"
            )
        if not (isinstance(value, str) and _VALUE.fullmatch(value)):
            raise InvalidRequestError(
                f"the value of label {name!r} must have at most 63 letters, digits and"
                " . _ / @ : + -; longer notes go into save_state(metadata=...)"
            )


def parse_label(text: str) -> tuple[str, str]:
    """``name=value`` as (name, value).

    Raises:
        InvalidRequestError: it is not, or see `check_labels`.
    """
    name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals:
        raise InvalidRequestError(f"label {text!r:.80}: write name=value, such as stage=prod")
    check_labels({name: value})
    return name, value


def parse_labels(texts: Iterable[str]) -> dict[str, str]:
    """The same of several.

    Raises:
        InvalidRequestError: one of them, or a name that is there twice.
    """
    found: dict[str, str] = {}
    for name, value in map(parse_label, texts):
        if name in found:
            raise InvalidRequestError(f"label {name!r} is given twice: a name has one value")
        found[name] = value
    check_labels(found)
    return found
