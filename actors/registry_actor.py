"""The Ray shell of the registry: one detached actor per namespace.

It also makes the transport key, under which everything travels between clients and actors. The
key lives in this process alone and is handed out by small inline calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from actors.process import harden, reply_of
from actors.registry import Registry
from tg_tinker.cluster import REGISTRY_NAME
from tg_tinker.envelope import new_key, open_payload, seal_payload
from tg_tinker.errors import InvalidRequestError
from tg_tinker.keyrings import place_of


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class RegistryActor:
    """Answers one sealed call at a time."""

    def __init__(self, database: str, keyring: str, audit_keys: str) -> None:
        harden()
        self._key = new_key()
        self._places = (database, keyring, Path(audit_keys))
        self._registry: Registry | None = None

    def serves(self, database: str, keyring: str) -> bool:
        return (database, place_of(keyring)) == (self._places[0], place_of(self._places[1]))

    def transport_key(self) -> bytes:
        return self._key

    def call(self, sealed: bytes) -> bytes:
        """Calls a public method of `Registry`: (name, arguments) in, a `Reply` out."""
        name, arguments = open_payload(self._key, sealed)
        return seal_payload(self._key, reply_of(lambda: self._method(name)(*arguments)))

    def _method(self, name: str) -> Any:
        if self._registry is None:  # here, so that a mended keyring or disk is seen
            self._registry = Registry(*self._places)
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._registry, name)


def start(namespace: str, database: str, keyring: str, audit_keys: str) -> Any:
    """The registry actor of a namespace: the running one, or a new one on this database.

    Args:
        keyring: a path or ``env:NAME``, never a key: Ray keeps arguments in clear.
        audit_keys: folder of the keys that sign heads of audit logs.

    Raises:
        InvalidRequestError: the running one has another database or keyring.
    """
    actor = RegistryActor.options(  # type: ignore[attr-defined]
        name=REGISTRY_NAME, namespace=namespace, lifetime="detached", get_if_exists=True
    ).remote(database, keyring, audit_keys)
    if not ray.get(actor.serves.remote(database, keyring)):
        raise InvalidRequestError(
            f"the service in namespace {namespace!r} runs on another database or keyring: leave out"
            " `database` and `keyring` (and TG_TINKER_HOME) as it was started, or choose another"
            " namespace"
        )
    return actor
