"""Calls the registry from other processes: with sealed payloads, in an actor that may restart."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from tg_tinker import backend
from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.ray_calls import ask, ask_again, check_process, restarting
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    FutureTimeoutError,
    TGTinkerError,
)
from tg_tinker.storage.envelope import open_payload, seal_payload
from tg_tinker.texts import check_texts

ONCE = frozenset({
    "api_keys.create", "api_keys.revoke", "artifacts.delete", "data_keys.retire",
    "data_keys.rotate", "heads.accept", "heads.book_missing", "home_keys.retire_secret",
    "home_keys.rotate_secret", "home_keys.rotate_signing_key", "runs.create",
})  # fmt: skip
"""The methods that a registry must not run twice. All other methods may be called again."""


_ANSWER_S = 300.0
"""The time limit of an answer in seconds: databases wait for locks, some calls wrap many keys."""


_SETTLE_S = 5.0
"""The time limit of `settle` in seconds: a program that ends waits no longer for the registry."""


class _Part:
    """One part of the registry; each method call runs in the actor of the registry."""

    def __init__(self, registry: RemoteRegistry, name: str) -> None:
        self._registry, self._name = registry, name

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):  # `copy` and `pickle` look up such names on any object
            raise AttributeError(method)
        return partial(self._registry.call, f"{self._name}.{method}")


class RemoteRegistry:
    """The parts of `actors.registry.registry.Registry`, called in its actor with sealed payloads.

    A killed registry restarts with its database and its transport key, and interrupted calls are
    repeated. An interrupted call of `ONCE` is not repeated: it fails with an error that says that
    its outcome is unknown.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        reply: Reply = ask_again(actor.transport_key, timeout=_ANSWER_S)
        self.key: bytes = reply.unwrap()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self.runs: backend.Runs = _Part(self, "runs")
        self.catalogue: backend.Catalogue = _Part(self, "catalogue")
        self.ledgers: backend.Ledgers = _Part(self, "ledgers")
        self.audit_log: backend.AuditLog = _Part(self, "audit_log")
        self.api_keys: backend.ApiKeys = _Part(self, "api_keys")
        self.data_keys: backend.DataKeys = _Part(self, "data_keys")
        # Only the upper packages call these parts; they know the class.
        self.artifacts, self.heads, self.home_keys, self.orphans = (
            _Part(self, name) for name in ("artifacts", "heads", "home_keys", "orphans")
        )

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls ``PART.METHOD`` and returns its value.

        Raises:
            ClusterUnavailableError: the registry does not answer, or its actor is gone.
            InvalidRequestError: a text among the arguments is no valid text.
            TGTinkerError: the error of the method, see its docstring.
        """
        check_texts(arguments, f"an argument of {name}")
        try:
            sealed = self._asked(name, self.sealed((name, arguments)))
        except FutureTimeoutError:
            raise ClusterUnavailableError(
                f"the registry has not answered {name} for {_ANSWER_S:g} s and may still run it."
                " Check whether its machine and its database answer (tg-tinker doctor)"
            ) from None
        except ActorLostError:
            raise ClusterUnavailableError(
                "the registry's actor is gone: close this ServiceClient and open a new client;"
                " runs and artifacts are in its database, not in the actor"
            ) from None
        return open_payload(self.key, sealed).unwrap()

    def settle(self, whole: bool) -> None:
        """Has the registry write the audit rows that wait, before this program leaves the cluster.

        Args:
            whole: whether the registry ends with this program.
        """
        with suppress(TGTinkerError):
            ask(self.actor.call, self.sealed(("audit_log.settle", (whole,))), timeout=_SETTLE_S)

    def notify(self, name: str, *arguments: Any) -> Future[Any]:
        """Calls in the background, in the order of these calls; returns a future of the value."""
        check_process()  # The thread of `_sender` stays in the process that started it.
        return self._sender.submit(self.call, name, *arguments)

    def sealed(self, value: Any) -> bytes:
        """Returns a value sealed with the transport key."""
        return seal_payload(self.key, value)

    def _asked(self, name: str, sealed: bytes) -> Any:
        if name not in ONCE:
            return ask_again(self.actor.call, sealed, timeout=_ANSWER_S)
        # First make sure that the registry answers: a lost call of `ONCE` cannot be repeated.
        ask_again(self.actor.transport_key, timeout=_ANSWER_S)
        try:
            return ask(self.actor.call, sealed, timeout=_ANSWER_S)
        except ClusterUnavailableError as error:
            if not restarting(error):
                raise
            raise ClusterUnavailableError(
                f"the registry was lost during {name} and restarts; it is not known whether the"
                " call was done. Check first, and repeat the call if it was not done"
            ) from None
