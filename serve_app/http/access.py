"""Checks API keys of HTTP requests, and limits the requests of each key and of each tenant."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from actors.registry.audit_log import ANYONE
from actors.registry.registry import Registry
from actors.registry.rollback import meet
from actors.storage.store import ArtifactStore
from tg_tinker.errors import AccessDeniedError, InvalidRequestError, QueueFullError
from tg_tinker.hosts import is_loopback

OPEN = "open"
"""The key id of callers without a key, on a server that is open."""

_KNOWN_S = 3.0
"""Seconds that a checked key is trusted. Nothing goes on for a revoked key after five seconds: what
is silent is looked at each second, and the check itself takes time."""

KEYS_WORTH, MOST_OF_TENANT = 4, 256
"""A tenant may have as many requests as so many keys, and at most this many: half of a replica."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z.-]+)(?::[0-9]{1,5})?")
_OWN_PAGES = {"same-origin", "none"}

_T = TypeVar("_T")


@dataclass(frozen=True)
class HttpOptions:
    """The limits of the server.

    Attributes:
        tenant: the tenant of all callers without a key, if the server is `open`.
        open: whether anyone who reaches the port may sample, until the tenant has a key. This is
            allowed on a loopback address only.
        most_tokens: the maximum of `max_tokens` times completions, for one request.
        most_at_once: the maximum number of concurrent requests of one key. All keys of a tenant
            together have `KEYS_WORTH` times as many, and at most `MOST_OF_TENANT`.
        deadline_s: the maximum time of a request in seconds, including streaming.
    """

    tenant: str = "default"
    open: bool = False
    most_tokens: int = 16_384
    most_at_once: int = 32
    deadline_s: float = 300.0


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        models: the models that the key may use; empty means all models.
        token: the key itself, to check it again; empty for callers without a key.
    """

    tenant: str
    key_id: str
    models: tuple[str, ...] = ()
    token: str = field(default="", repr=False)

    @property
    def who(self) -> str:
        """The name of the caller in the audit log."""
        return ANYONE if self.key_id == OPEN else f"api-key {self.key_id}"


def _refuse_pages(request: Request) -> None:
    """Refuses what a page of another origin may make a browser on this machine send.

    A page that resolves its own name to 127.0.0.1 (DNS rebinding) has its name in the host. A page
    elsewhere that sends a request here has its origin in it, or the browser says that the request
    crosses sites. Programs send neither.

    Raises:
        AccessDeniedError: the request may be such a one.
    """
    hosts = request.headers.getlist("host")
    named = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if named is None or not is_loopback(named[1]):
        raise AccessDeniedError(
            "without API keys this server answers at 127.0.0.1 and localhost only: make a key with"
            " `tg-tinker api-keys create`"
        )
    own = {f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")}
    if not (
        own.issuperset(request.headers.getlist("origin"))
        and _OWN_PAGES.issuperset(request.headers.getlist("sec-fetch-site"))
    ):
        raise AccessDeniedError(
            "without API keys this server answers no web page of another origin: make a key with"
            " `tg-tinker api-keys create`, and let the page's own server ask"
        )


class Access:
    """The API keys of all tenants, and their concurrent requests, in one server.

    Args:
        store: the root of the artifact store. Its heads show whether the registry is an older copy,
            in which a key that was revoked since would be valid again.
    """

    def __init__(self, registry: Registry, options: HttpOptions, store: str) -> None:
        self._registry, self._options, self._store = registry, options, ArtifactStore(store)
        # A pool of its own, so that checks of keys wait for no other work.
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="access")
        self._known: dict[str, tuple[float, asyncio.Future[Caller]]] = {}
        self._at_once: Counter[str] = Counter()
        self._of_tenant: Counter[str] = Counter()
        self._keys_exist, self._keys_known_until = False, 0.0

    async def caller(self, request: Request) -> Caller:
        """Returns the sender of a request.

        Raises:
            AccessDeniedError: the request has no key, or an invalid key, or needs none here but may
                be that of a web page.
            RollbackError, StorageError: see `rollback.meet`.
        """
        if self._options.open and not await self._has_keys():
            _refuse_pages(request)
            return Caller(self._options.tenant, OPEN)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AccessDeniedError(
                "this server requires an API key (Authorization: Bearer ...): make one with"
                " `tg-tinker api-keys create`"
            )
        return await self._holder(token)

    async def still(self, caller: Caller) -> None:
        """Returns if a caller whose request is running may still send one.

        Raises:
            AccessDeniedError: the key was revoked or has expired, or the tenant of an open server
                has made a key.
            RollbackError, StorageError: see `rollback.meet`.
        """
        if caller.key_id != OPEN:
            await self._holder(caller.token)
        elif await self._has_keys():
            raise AccessDeniedError("this server requires an API key by now: send one")

    async def _holder(self, token: str) -> Caller:
        """Returns the caller with a key. All requests with the key share a check."""
        until, found = self._known.get(token, (0.0, None))
        if found is None or until < time.monotonic():
            found = asyncio.ensure_future(self._in_thread(self._checked, token))
            self._known[token] = time.monotonic() + _KNOWN_S, found
            found.add_done_callback(partial(self._forget_refused, token))
        return await asyncio.shield(found)

    def _forget_refused(self, token: str, check: asyncio.Future[Caller]) -> None:
        refused = check.cancelled() or check.exception() is not None
        if refused and self._known.get(token, (0.0, None))[1] is check:
            del self._known[token]

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    @contextmanager
    def arriving(self, caller: Caller) -> Iterator[None]:
        """Counts a request of the caller's key while its body is read and parsed.

        Otherwise one key could occupy the whole server with bodies that never end.

        Raises:
            QueueFullError: see `enter`.
        """
        self._take(caller)
        try:
            yield
        finally:
            self.leave(caller)

    def enter(self, caller: Caller, max_tokens: int) -> None:
        """Counts a request before it begins; the caller calls `leave` after it has ended.

        Args:
            max_tokens: the tokens of all completions together.

        Raises:
            InvalidRequestError: `max_tokens` exceeds what this server draws for a request.
            QueueFullError: too many requests of this key, or of its tenant, are running.
        """
        if max_tokens > self._options.most_tokens:
            raise InvalidRequestError(
                f"max_tokens times completions is {max_tokens}, more than the"
                f" {self._options.most_tokens} tokens that this server draws for a request: ask for"
                " fewer"
            )
        self._take(caller)

    def _take(self, caller: Caller) -> None:
        of_key = self._options.most_at_once
        of_tenant = min(KEYS_WORTH * of_key, MOST_OF_TENANT)
        if self._at_once[caller.key_id] >= of_key:
            raise QueueFullError(
                f"{of_key} requests of this key are running already: wait until one ends"
            )
        if self._of_tenant[caller.tenant] >= of_tenant:
            raise QueueFullError(
                f"{of_tenant} requests of all keys of this tenant are running already: wait until"
                " one ends"
            )
        self._at_once[caller.key_id] += 1
        self._of_tenant[caller.tenant] += 1

    def leave(self, caller: Caller) -> None:
        """Ends a request that `enter` has counted."""
        self._at_once[caller.key_id] -= 1
        self._of_tenant[caller.tenant] -= 1

    def _checked(self, token: str) -> Caller:
        tenant, info = self._registry.api_keys.check(token, self._options.tenant)
        meet(self._registry, self._store, tenant, f"api-key {info.key_id}")
        return Caller(tenant, info.key_id, info.models, token)

    def _key_made(self) -> bool:
        meet(self._registry, self._store, self._options.tenant, ANYONE)
        return self._registry.api_keys.wanted(self._options.tenant)

    async def _has_keys(self) -> bool:
        """Returns whether the tenant of an open server has made a key since."""
        if self._keys_known_until < time.monotonic():
            self._keys_exist = await self._in_thread(self._key_made)
            self._keys_known_until = time.monotonic() + _KNOWN_S
        return self._keys_exist
