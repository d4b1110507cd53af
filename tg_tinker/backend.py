"""What the upper packages offer to this one, which may not import them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, cast

from tg_tinker.errors import ClusterUnavailableError

GROUP = "tg_tinker.cluster"


def provided(name: str) -> Callable[..., Any]:
    """What an upper package offers under an entry point of this name."""
    for entry in entry_points(group=GROUP, name=name):
        return cast("Callable[..., Any]", entry.load())
    raise ClusterUnavailableError(
        f"no installed package offers {name!r}: reinstall tg-tinker (pip install -e . in a clone)"
    )
