"""Reads JSON bodies of bounded size and shape, whatever their senders put into them.

One byte of JSON can become a hundred bytes of objects. So the objects, lists and fields are counted
in the text, before any of them is built. Values that are none of these need little memory.
"""

from __future__ import annotations

import re
from typing import Any

from fastapi import Request
from pydantic_core import from_json

from tg_tinker.errors import InvalidRequestError

MOST_PARTS = 2**15
"""The maximum number of objects, lists and fields in a body, at all levels together."""

WRONG_TYPE = "wrong_content_type"
"""The code of the error for a body that is not sent as JSON."""

# Each match takes all text up to the next part. A text is skipped as a whole, also one without an
# end. All quantifiers are possessive, else a body could make them try again and again.
_UP_TO_NEXT_PART = re.compile(rb'(?:[^"\[{:]++|"(?:[^"\\]++|\\.)*+"?)*+[\[{:]', re.DOTALL)


def value_of(content: bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        InvalidRequestError: the text is not JSON, or has too many parts. It is not repeated.
    """
    parts, at = 0, 0
    while found := _UP_TO_NEXT_PART.match(content, at):
        parts, at = parts + 1, found.end()
        if parts > MOST_PARTS:
            raise InvalidRequestError(
                f"the body has more than {MOST_PARTS:,} objects, lists and fields in all: send less"
                " at a time"
            )
    try:
        # Without the cache, which would keep short texts of requests in memory.
        return from_json(content, cache_strings="none")
    except ValueError as error:
        place = str(error)  # It says what is wrong and where, and quotes nothing.
    raise InvalidRequestError(f"the body is not valid JSON: {place}")


def check_type(request: Request) -> None:
    """Refuses a body that is not declared as JSON.

    A browser sends JSON to another site only after it has asked that site, and this server says no.
    Any page may send the types of forms and plain text unasked.

    Raises:
        InvalidRequestError: the request does not declare JSON.
    """
    kinds = [
        kind.partition(";")[0].strip().lower() for kind in request.headers.getlist("content-type")
    ]
    if kinds != ["application/json"]:
        raise InvalidRequestError(
            "a body here is JSON: send it with the header Content-Type: application/json",
            WRONG_TYPE,
        )
