"""Makes a temporary registry in a home of its own, for audits and measurements that leave nothing
behind.

The code that makes the folder also removes it.
"""

from __future__ import annotations

from pathlib import Path

from actors.registry.registry import Registry
from actors.storage import home
from tg_tinker.storage.sqlite_files import sqlite_url


def scratch_registry(place: Path) -> Registry:
    """Returns the registry of a new home at `place`, with a keyring of its own."""
    home.create(place)
    return Registry(sqlite_url(place / home.DATABASE), place / home.KEYRING)
