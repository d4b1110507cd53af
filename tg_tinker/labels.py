"""Checks and parses the labels of artifacts: short names with values, such as ``stage=prod``.

Labels help to find artifacts. The registry stores labels in clear. Put information that only the
holder of the keys may read into `save_state(metadata=...)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tg_tinker.errors import InvalidRequestError

AUTOMATIC = {"saved": "automatically"}
"""The label of an automatically saved artifact. A run never deletes an artifact without it."""

AVERAGED = "tg-tinker/average"
"""The label of an artifact of averaged weights; its value is the kind of average. A lost run is not
restored from such an artifact."""

MOST_LABELS = 16
"""The maximum number of labels of one artifact."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}")
_VALUE = re.compile(r"[A-Za-z0-9._/@:+-]{0,63}")


def check_labels(labels: Mapping[str, str]) -> None:
    """Checks the number and the form of labels.

    Raises:
        InvalidRequestError: there are too many labels, or a name or value has another form.
    """
    if not isinstance(labels, Mapping):
        raise InvalidRequestError(
            "labels must be a dict of names and values, such as {'stage': 'prod'}; {} removes all"
            " labels"
        )
    if len(labels) > MOST_LABELS:
        raise InvalidRequestError(
            f"{len(labels)} labels are too many: give an artifact at most {MOST_LABELS}"
        )
    for name, value in labels.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise InvalidRequestError(
                f"label {name!r:.80} is invalid: use 1 to 63 lower-case letters, digits and"
                " . _ / -, starting with a letter or digit"
            )
        if not (isinstance(value, str) and _VALUE.fullmatch(value)):
            raise InvalidRequestError(
                f"the value of label {name!r} is invalid: use at most 63 letters, digits and"
                " . _ / @ : + -; put longer notes into save_state(metadata=...)"
            )


def parse_label(text: str) -> tuple[str, str]:
    """Parses ``name=value`` into (name, value).

    Raises:
        InvalidRequestError: the text has another form, or see `check_labels`.
    """
    name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals:
        raise InvalidRequestError(
            f"label {text!r:.80} has no '=': write name=value, such as stage=prod"
        )
    check_labels({name: value})
    return name, value


def parse_labels(texts: Iterable[str]) -> dict[str, str]:
    """Parses several labels of the form ``name=value`` into a dict.

    Raises:
        InvalidRequestError: a label is invalid, a name is given twice, or see `check_labels`.
    """
    found: dict[str, str] = {}
    for name, value in map(parse_label, texts):
        if name in found:
            raise InvalidRequestError(f"label {name!r} is given twice: give each name one value")
        found[name] = value
    check_labels(found)
    return found
