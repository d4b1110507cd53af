"""Finds the home directory, which holds all lasting state unless a setting moves a part of it."""

from __future__ import annotations

import os
from pathlib import Path


def home_directory() -> Path:
    """Returns the path in `TG_TINKER_HOME`, or `~/.tg-tinker` if the variable is not set.

    The directory holds the registry, the store, the keyring and converted models.
    """
    return Path(os.environ.get("TG_TINKER_HOME") or "~/.tg-tinker").expanduser().absolute()
