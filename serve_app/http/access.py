"""Who may ask over HTTP, and how much at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from actors.registry.audit_log import ANYONE
from actors.registry.registry import Registry
from actors.registry.rollback import meet
from actors.storage.store import ArtifactStore
from tg_tinker.errors import AccessDeniedError, InvalidRequestError, QueueFullError
from tg_tinker.types import ApiKeyInfo

OPEN = "open"
"""Id of the key that nobody needs."""

_KNOWN_S = 5.0
"""How long a checked key is trusted: a revoked one opens nothing after that."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class HttpOptions:
    """What the server allows.

    Attributes:
        tenant: of everyone, when `open`.
        open: whoever reaches the port may sample, until the tenant has a key; on a loopback
            address only.
        most_tokens: `max_tokens` of a request, times its completions.
        most_at_once: requests of one key.
        deadline_s: of a request, streaming included.
    """

    tenant: str = "default"
    open: bool = False
    most_tokens: int = 16_384
    most_at_once: int = 32
    deadline_s: float = 300.0


@dataclass(frozen=True)
class Caller:
    """Who asks, and which models the key is for (all when empty)."""

    tenant: str
    key_id: str
    models: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """In the audit log."""
        return ANYONE if self.key_id == OPEN else f"api-key {self.key_id}"


def _refuse_rebinding(host: str) -> None:
    """A page that makes its own name mean 127.0.0.1 has a browser ask in the user's place; the
    name it asks for is still its own (DNS rebinding)."""
    name = host.rsplit(":", 1)[0].strip("[]").lower()
    if name not in ("localhost", "127.0.0.1", "::1") and not name.startswith("127."):
        raise AccessDeniedError(
            "without API keys this server answers at 127.0.0.1 and localhost only:"
            " `tg-tinker api-keys create` makes a key"
        )


class Access:
    """The keys of all tenants, as one server sees them.

    Args:
        store: root of the artifact store, whose heads tell whether the registry is an older copy:
            there a key that was revoked since would live again.
    """

    def __init__(self, registry: Registry, options: HttpOptions, store: str) -> None:
        self._registry, self._options, self._store = registry, options, ArtifactStore(store)
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="access")  # waits for nothing else
        self._known: dict[str, tuple[float, Caller]] = {}
        self._at_once: Counter[str] = Counter()
        self._keys_exist, self._keys_known_until = False, 0.0

    async def caller(self, request: Request) -> Caller:
        """Who sent it.

        Raises:
            AccessDeniedError: no key, or one that opens nothing.
            RollbackError, StorageError: see `rollback.meet`.
        """
        if self._options.open and not await self._has_keys():
            _refuse_rebinding(request.headers.get("host", ""))
            return Caller(self._options.tenant, OPEN)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AccessDeniedError(
                "this server wants an API key (Authorization: Bearer ...):"
                " `tg-tinker api-keys create` makes one"
            )
        until, caller = self._known.get(token, (0.0, None))
        if caller is None or until < time.monotonic():
            self._known.pop(token, None)
            tenant, info = await self._in_thread(self._checked, token)
            caller = Caller(tenant, info.key_id, info.models)
            self._known[token] = time.monotonic() + _KNOWN_S, caller
        return caller

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    @contextmanager
    def arriving(self, caller: Caller) -> Iterator[None]:
        """While a request is read and understood: it counts as one of its key already, which else
        could fill all places of a server with bodies that do not end.

        Raises:
            QueueFullError: as `enter`.
        """
        self._take(caller)
        try:
            yield
        finally:
            self.leave(caller)

    def enter(self, caller: Caller, max_tokens: int) -> None:
        """Before a request of this many tokens in all begins; `leave` when it has ended.

        Raises:
            InvalidRequestError: more tokens than this server draws.
            QueueFullError: too many requests of this key run already.
        """
        if max_tokens > self._options.most_tokens:
            raise InvalidRequestError(
                f"max_tokens times completions is {max_tokens}, more than the"
                f" {self._options.most_tokens} tokens that this server draws for a request"
            )
        self._take(caller)

    def _take(self, caller: Caller) -> None:
        if self._at_once[caller.key_id] >= self._options.most_at_once:
            raise QueueFullError(
                f"{self._options.most_at_once} requests of this key are answered already: wait for"
                " one to end"
            )
        self._at_once[caller.key_id] += 1

    def leave(self, caller: Caller) -> None:
        self._at_once[caller.key_id] -= 1

    def _checked(self, token: str) -> tuple[str, ApiKeyInfo]:
        tenant, info = self._registry.api_keys.check(token, self._options.tenant)
        meet(self._registry, self._store, tenant, f"api-key {info.key_id}")
        return tenant, info

    def _key_made(self) -> bool:
        meet(self._registry, self._store, self._options.tenant, ANYONE)
        return self._registry.api_keys.wanted(self._options.tenant)

    async def _has_keys(self) -> bool:
        """Whether the tenant has made a key since the server started open."""
        if self._keys_known_until < time.monotonic():
            self._keys_exist = await self._in_thread(self._key_made)
            self._keys_known_until = time.monotonic() + _KNOWN_S
        return self._keys_exist
