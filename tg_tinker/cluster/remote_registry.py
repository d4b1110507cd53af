"""The registry as every other process calls it: sealed, in its actor, which may restart."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from tg_tinker import backend
from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.ray_calls import ask, ask_again, restarting
from tg_tinker.errors import ActorLostError, ClusterUnavailableError, FutureTimeoutError
from tg_tinker.storage.envelope import open_payload, seal_payload

ONCE = frozenset({
    "api_keys.create", "api_keys.revoke", "artifacts.delete", "data_keys.retire",
    "data_keys.rotate", "heads.accept", "heads.book_missing", "runs.create",
})  # fmt: skip
"""What a registry must not do twice. All its other methods may be called again."""


_ANSWER_S = 300.0
"""How long it may be silent: databases wait for locks, and keys are wrapped by the thousand."""


class _Part:
    """The methods of one part of the registry, each called in its actor."""

    def __init__(self, registry: RemoteRegistry, name: str) -> None:
        self._registry, self._name = registry, name

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):  # what `copy` and `pickle` ask of any object
            raise AttributeError(method)
        return partial(self._registry.call, f"{self._name}.{method}")


class RemoteRegistry:
    """The parts of `actors.registry.registry.Registry`, called in its actor; payloads are sealed.

    A registry that was killed comes back with its database and its transport key. A call that was
    under way is then made again; one of `ONCE` fails and says that nobody knows whether it was
    done.
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
        # Called by the upper packages alone, which know the class.
        self.artifacts, self.heads, self.orphans = (
            _Part(self, name) for name in ("artifacts", "heads", "orphans")
        )

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls ``PART.METHOD``; see its docstring for what it raises beside these.

        Raises:
            ClusterUnavailableError: no answer; or the actor is gone.
        """
        try:
            sealed = self._asked(name, self.sealed((name, arguments)))
        except FutureTimeoutError:
            raise ClusterUnavailableError(
                f"the registry has not answered {name} for {_ANSWER_S:g} s; it may still do it."
                " Look whether its machine and its database answer (tg-tinker doctor)"
            ) from None
        except ActorLostError:
            raise ClusterUnavailableError(
                "the registry's actor is gone: close this ServiceClient and open a new one;"
                " runs and artifacts are in its database, not in the actor"
            ) from None
        return open_payload(self.key, sealed).unwrap()

    def notify(self, name: str, *arguments: Any) -> Future[Any]:
        """Calls beside the caller, in the order of these calls; the future learns the outcome."""
        return self._sender.submit(self.call, name, *arguments)

    def sealed(self, value: Any) -> bytes:
        """For whoever has the transport key."""
        return seal_payload(self.key, value)

    def _asked(self, name: str, sealed: bytes) -> Any:
        if name not in ONCE:
            return ask_again(self.actor.call, sealed, timeout=_ANSWER_S)
        # It is there: what fails now is rare, and not known.
        ask_again(self.actor.transport_key, timeout=_ANSWER_S)
        try:
            return ask(self.actor.call, sealed, timeout=_ANSWER_S)
        except ClusterUnavailableError as error:
            if not restarting(error):
                raise
            raise ClusterUnavailableError(
                f"the registry was lost during {name} and comes back: whether it was done is not"
                " known. Look first, then repeat the call if it was not"
            ) from None
