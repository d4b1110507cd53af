"""The Ray shell of the registry: one detached actor per namespace, on the head node.

Killed, it comes back by itself: all it knows is in its database. It also makes the transport key,
under which everything travels between clients and actors, and hands it out by small inline calls.
The key is derived from the signing key, which lies on disk, and from a random value among the
arguments that Ray keeps for a restart, which does not: so it is the same after a restart, ends
with the cluster, and follows from neither of the two alone.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import ray

from actors.process import harden, reply_of, settle_heap
from actors.registry.group_commit import GroupCommit
from actors.registry.registry import Registry
from actors.storage import signing
from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.named_actors import REGISTRY_NAME
from tg_tinker.cluster.ray_calls import ask_again
from tg_tinker.errors import InvalidRequestError
from tg_tinker.storage.databases import check_database
from tg_tinker.storage.envelope import derive_key, open_payload, seal_payload
from tg_tinker.storage.keyrings import place_of

MOST_WAITING = 64
"""Calls that the actor has taken; others wait in Ray."""

HEAD_NODE = {"node:__internal_head__": 0.001}
"""There are the database's file, the keyring, and the environment that has its password."""


@ray.remote(  # type: ignore[call-overload]
    num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=MOST_WAITING
)
class RegistryActor:
    """Answers sealed calls, see `GroupCommit`."""

    def __init__(self, database: str, keyring: str, audit_keys: str, life: str, sole: bool) -> None:
        harden()
        self._places = (database, keyring, Path(audit_keys))
        self._life = life
        self._known_key = b""
        self._calls = GroupCommit(lambda: Registry(*self._places, sole=sole))
        settle_heap()

    def serves(self, database: str, keyring: str) -> bool:
        return (database, place_of(keyring)) == (self._places[0], place_of(self._places[1]))

    def transport_key(self) -> Reply:
        return reply_of(self._key)

    def call(self, sealed: bytes) -> bytes:
        """Calls a method of a part of `Registry`: (`PART.METHOD`, arguments) in, a `Reply` out."""
        reply = self._calls.take(open_payload(self._key(), sealed))
        return seal_payload(self._key(), reply)

    def _key(self) -> bytes:
        if not self._known_key:  # here, so that a damaged signing key is a typed error
            purpose = f"tg-tinker transport v1\n{self._life}".encode()
            self._known_key = derive_key(signing.load(self._places[2]), purpose)
        return self._known_key


def start(namespace: str, database: str, keyring: str, audit_keys: str, sole: bool) -> Any:
    """The registry actor of a namespace: the running one, or a new one on this database.

    Args:
        database: a URL without a password, see `check_database`.
        keyring: a path or ``env:NAME``, never a key: Ray keeps arguments in clear.
        audit_keys: folder of the keys that sign heads of audit logs.
        sole: see `Registry`.

    Raises:
        InvalidRequestError: the running one has another database or keyring.
    """
    actor = RegistryActor.options(  # type: ignore[attr-defined]
        name=REGISTRY_NAME, namespace=namespace, lifetime="detached", get_if_exists=True,
        resources=HEAD_NODE,
    ).remote(
        check_database(database), keyring, audit_keys, secrets.token_hex(32), sole
    )  # fmt: skip
    if not ask_again(actor.serves, database, keyring):
        raise InvalidRequestError(
            f"the service in namespace {namespace!r} runs on another database or keyring: give"
            " `database` and `keyring` (or TG_TINKER_DATABASE, _KEYRING and _HOME) as"
            " it was started with, or choose another namespace"
        )
    return actor
