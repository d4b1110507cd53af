"""Capabilities: what a client presents to the registry to receive a data key.

A capability names one client: the training actor of a run in one epoch, a reader, or a keeper. Each
reader and each keeper gets a capability that no other client has. The registry signs a capability
with a key of its own and keeps no list, so a capability stays valid after a restart. The audit log
records the client that the capability names. A capability does not depend on tenant keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass, field

from actors.storage.secrets import CAPABILITIES, Secrets

RUN, READER, KEEPER = "run", "reader", "keeper"
_PURPOSE = b"tg-tinker capabilities v1"


@dataclass(frozen=True)
class Capability:
    """What one client may do.

    Attributes:
        kind: `RUN` makes artifacts of its run and reads its tenant's artifacts; `READER` reads;
            `KEEPER` reads, copies and reseals.
        tenant: The tenant whose artifacts the client may use.
        who: ``RUN@EPOCH``, or the name of a reader in the audit log.
        tag: HMAC-SHA256 of the other fields. It is a secret: whoever knows it can act as this
            client.
        serial: A random text that distinguishes readers and keepers of the same name; empty for a
            run, whose `who` is unique.
    """

    kind: str
    tenant: str
    who: str
    tag: bytes = field(repr=False)
    serial: str = ""


class Issuer:
    """Makes capabilities, and recognizes those that it made.

    Args:
        secrets: The secrets of the registry. An actor that trains for days keeps its capability
            when the secret is rotated, until the older versions are retired.
    """

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    def issue(self, kind: str, tenant: str, who: str) -> Capability:
        serial = "" if kind == RUN else secrets.token_hex(16)
        key = self._secrets.newest(CAPABILITIES, _PURPOSE)
        return Capability(kind, tenant, who, _tag(key, kind, tenant, who, serial), serial)

    def genuine(self, shown: Capability) -> bool:
        """Returns whether a capability was issued here and is unchanged."""
        stated = shown.kind, shown.tenant, shown.who, shown.serial
        keys = self._secrets.keys(CAPABILITIES, _PURPOSE).values()
        return any(hmac.compare_digest(_tag(key, *stated), shown.tag) for key in keys)


def _tag(key: bytes, *stated: str) -> bytes:
    # JSON, so that different fields always give different texts.
    return hmac.digest(key, json.dumps(stated).encode(), hashlib.sha256)
