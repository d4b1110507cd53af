"""Weights on their way into a replica's engines."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from serve_app.replica.engines import Engines
from serve_app.replica.sources import Source
from serve_app.replica.threads import TenantThreads

AT_ONCE = 4
"""Weights that are fetched at once for each tenant: each takes the memory of a copy meanwhile."""


class Fetches:
    """Of one replica; belongs to its event loop."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._threads = TenantThreads(AT_ONCE, "fetch")
        self._coming: dict[str | None, asyncio.Future[Future[None]]] = {}

    async def ahead(self, source: Source, tenant: str) -> Future[None] | None:
        """Sees that weights are in their engine, ahead of whatever is sent to it from now on; None
        where they are there. They are fetched once, however many ask for them."""
        if self._engines.has(source.name, source.shared):
            return None
        coming = self._coming.get(source.name)
        if coming is None:
            coming = self._threads.run(tenant, lambda: self._engines.add(source.fetch()))
            coming.add_done_callback(lambda _: self._coming.pop(source.name))
            self._coming[source.name] = coming
        return await asyncio.shield(coming)  # whoever leaves does not take it from the others
