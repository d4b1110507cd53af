"""Capabilities: what a client shows the registry to be given a data key.

A capability names one client: the training actor of a run in one epoch, or a reader. The registry
signs it with a key of its own and keeps no list, so it outlives a restart. Whoever shows it is
who the audit log names. It says nothing of tenant keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass, field

from tg_tinker.storage.envelope import derive_key

RUN, READER, KEEPER = "run", "reader", "keeper"


@dataclass(frozen=True)
class Capability:
    """What one client may do.

    Attributes:
        kind: `RUN` makes artifacts of its run and reads those of its tenant; `READER` reads;
            `KEEPER` reads, copies and seals anew.
        tenant: whose artifacts.
        who: ``RUN@EPOCH``, or a reader as the audit log names it.
        tag: HMAC-SHA256 of the rest. A secret: who knows it can act as this client.
    """

    kind: str
    tenant: str
    who: str
    tag: bytes = field(repr=False)


class Issuer:
    """Makes capabilities, and knows its own again.

    Args:
        secret: of the registry alone, and lasting. Not a tenant key: one may be retired while an
            actor that was started under it still trains.
    """

    def __init__(self, secret: bytes) -> None:
        self._key = derive_key(secret, b"tg-tinker capabilities v1")

    def issue(self, kind: str, tenant: str, who: str) -> Capability:
        return Capability(kind, tenant, who, self._tag(kind, tenant, who))

    def genuine(self, shown: Capability) -> bool:
        """Whether it was issued here, and nothing of it was changed."""
        return hmac.compare_digest(self._tag(shown.kind, shown.tenant, shown.who), shown.tag)

    def _tag(self, kind: str, tenant: str, who: str) -> bytes:
        # JSON, so that no two triples are one text.
        return hmac.digest(self._key, json.dumps([kind, tenant, who]).encode(), hashlib.sha256)
