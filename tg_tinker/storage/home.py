"""Where the home directory is: all lasting state lies there unless it is pointed elsewhere."""

from __future__ import annotations

import os
from pathlib import Path


def home_directory() -> Path:
    """`TG_TINKER_HOME`, or `~/.tg-tinker`: registry, store, keyring and converted models."""
    return Path(os.environ.get("TG_TINKER_HOME") or "~/.tg-tinker").expanduser().absolute()
