"""The Ray actor of the registry: one detached actor per namespace, on the head node.

Ray restarts the actor if it is killed, and the actor finds all its state in the database. The actor
also creates the transport key, which seals everything that travels between clients and actors, and
hands it out in small inline calls. The key is derived from two values: the secret `transport`,
which is on disk, and a random value, which is not. Ray keeps the random value among the arguments
for a restart, and the version of the secret among its keys and values. Therefore the key is the
same after a restart and a rotation, ends with the cluster, and cannot be derived from one of the
two values alone.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.experimental import internal_kv

from actors.process import harden, reply_of, settle_heap
from actors.registry.group_commit import GroupCommit
from actors.registry.registry import Registry
from actors.storage.secrets import TRANSPORT, Secrets
from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.named_actors import REGISTRY_NAME
from tg_tinker.cluster.ray_calls import ask_again
from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError, StorageError
from tg_tinker.records.entries import VERSION
from tg_tinker.storage.databases import REVISION, check_database
from tg_tinker.storage.envelope import open_payload, seal_payload
from tg_tinker.storage.keyrings import place_of

RELEASE = f"{metadata.version('tg-tinker')}, database revision {REVISION}, ledger version {VERSION}"
"""What must be the same in a program and in the registry that it finds running."""

MOST_WAITING = 64
"""The number of calls that the actor accepts at a time. Further calls wait in Ray."""

HEAD_NODE = {"node:__internal_head__": 0.001}
"""The resource that pins the actor to the head node. The database file, the keyring and the
environment with the database password are there."""


@ray.remote(  # type: ignore[call-overload]
    num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=MOST_WAITING
)
class RegistryActor:
    """An actor that answers sealed calls; see `GroupCommit`."""

    def __init__(self, database: str, keyring: str, audit_keys: str, life: str, sole: bool) -> None:
        harden()
        self._places = (database, keyring, Path(audit_keys))
        self._life = life
        self._known_key = b""
        self._calls = GroupCommit(lambda: Registry(*self._places, sole=sole))
        settle_heap()

    def serves(self, database: str, keyring: str) -> bool:
        return (database, place_of(keyring)) == (self._places[0], place_of(self._places[1]))

    def release(self) -> str:
        return RELEASE

    def transport_key(self) -> Reply:
        return reply_of(self._key)

    def call(self, sealed: bytes) -> bytes:
        """Calls a method of a part of `Registry`. Takes the sealed pair (`PART.METHOD`, arguments),
        and returns a sealed `Reply`."""
        reply = self._calls.take(open_payload(self._key(), sealed))
        return seal_payload(self._key(), reply)

    def _key(self) -> bytes:
        # Not in the constructor, so that a damaged file of keys is a typed error.
        if not self._known_key:
            purpose = _purpose(self._life)
            keys = Secrets(self._places[2]).keys(TRANSPORT, purpose)
            self._known_key = _of_cluster(keys, purpose)
        return self._known_key


def _purpose(life: str) -> bytes:
    return f"tg-tinker transport v1\n{life}".encode()


def _of_cluster(keys: Mapping[int, bytes], purpose: bytes) -> bytes:
    """Returns the key of the version that this cluster began with: clients and actors that run have
    its key. The control store of the cluster, which ends with it, remembers the version.

    Raises:
        StorageError: The version was retired.
    """
    name = b"tg-tinker transport version " + hashlib.sha256(purpose).hexdigest().encode()
    internal_kv._internal_kv_put(name, str(next(iter(keys))).encode(), overwrite=False)
    version = int(internal_kv._internal_kv_get(name))
    if version not in keys:
        raise StorageError(
            f"version {version} of the secret {TRANSPORT!r}, which this cluster began with, was"
            " retired: end the cluster and its programs, and start it again"
        )
    return keys[version]


def start(namespace: str, database: str, keyring: str, audit_keys: str, sole: bool) -> Any:
    """Returns the registry actor of a namespace: the running one, or a new one on this database.

    Args:
        database: A URL without a password; see `check_database`.
        keyring: A path or ``env:NAME``, never a key: Ray keeps arguments in clear.
        audit_keys: The folder of the keys that sign heads.
        sole: See `Registry`.

    Raises:
        ClusterUnavailableError: The running actor is of another release of TG-Tinker.
        InvalidRequestError: The running actor has another database or keyring.
    """
    actor = RegistryActor.options(  # type: ignore[attr-defined]
        name=REGISTRY_NAME, namespace=namespace, lifetime="detached", get_if_exists=True,
        resources=HEAD_NODE,
    ).remote(
        check_database(database), keyring, audit_keys, secrets.token_hex(32), sole
    )  # fmt: skip
    _refuse_another_release(actor)
    if not ask_again(actor.serves, database, keyring):
        raise InvalidRequestError(
            f"the service in namespace {namespace!r} runs on another database or keyring: pass"
            " the `database` and `keyring` that it was started with (or set TG_TINKER_DATABASE,"
            " TG_TINKER_KEYRING and TG_TINKER_HOME as then), or choose another namespace"
        )
    return actor


def _refuse_another_release(actor: Any) -> None:
    """Refuses an actor that was started before TG-Tinker was upgraded: it has the old code in
    memory, and would call or answer by other rules."""
    # Releases before the first one with this check have no such method.
    theirs = ask_again(actor.release) if hasattr(actor, "release") else "an earlier release"
    if theirs != RELEASE:
        raise ClusterUnavailableError(
            f"the registry of this cluster runs TG-Tinker {theirs}, and this program {RELEASE}: end"
            " the cluster with `tg-tinker down` and start it again, or use the version that it was"
            " started with"
        )
