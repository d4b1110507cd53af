"""The registry as every other process calls it: sealed, in its actor, which may restart."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tg_tinker.cluster.messages import Reply
from tg_tinker.cluster.ray_calls import ask, ask_again, restarting
from tg_tinker.errors import ActorLostError, ClusterUnavailableError, FutureTimeoutError
from tg_tinker.storage.envelope import open_payload, seal_payload

ONCE = frozenset({
    "accept_heads", "book_missing", "create_api_key", "create_run", "delete_artifact", "retire_key",
    "revoke_api_key", "rotate_key",
})  # fmt: skip
"""What a registry must not do twice. All its other methods may be called again."""


_ANSWER_S = 300.0
"""How long it may be silent: databases wait for locks, and keys are wrapped by the thousand."""


class RemoteRegistry:
    """The methods of `actors.registry.registry.Registry`, called in its actor; payloads are sealed.

    A registry that was killed comes back with its database and its transport key. A call that was
    under way is then made again; one of `ONCE` fails and says that nobody knows whether it was
    done.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        reply: Reply = ask_again(actor.transport_key, timeout=_ANSWER_S)
        self.key: bytes = reply.unwrap()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="registry")

    @property
    def typed(self) -> Any:
        """This object where a `Registry` is expected."""
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
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

        return call

    def notify(self, name: str, *arguments: Any) -> Future[Any]:
        """Calls beside the caller, in the order of these calls; the future learns the outcome."""
        return self._sender.submit(getattr(self, name), *arguments)

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
