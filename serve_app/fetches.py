"""Weights on their way into a replica's engines."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from serve_app.engines import Engines
from serve_app.sources import Source

AT_ONCE = 4
"""Weights that are fetched at once for each tenant: each takes the memory of a copy meanwhile."""


class Fetches:
    """Of one replica; belongs to its event loop."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        # By tenant: one that waits, for a frozen run say, fills no other's places.
        self._threads = defaultdict[str, ThreadPoolExecutor](
            partial(ThreadPoolExecutor, AT_ONCE, thread_name_prefix="fetch")
        )
        self._coming: dict[str | None, asyncio.Future[Future[None]]] = {}

    async def ahead(self, source: Source, tenant: str) -> Future[None] | None:
        """Sees that weights are in their engine, ahead of whatever is sent to it from now on; None
        where they are there. They are fetched once, however many ask for them."""
        if self._engines.has(source.name, source.shared):
            return None
        coming = self._coming.get(source.name)
        if coming is None:
            loop = asyncio.get_running_loop()
            coming = loop.run_in_executor(self._threads[tenant], self._add, source)
            coming.add_done_callback(lambda _: self._coming.pop(source.name))
            self._coming[source.name] = coming
        return await asyncio.shield(coming)  # whoever leaves does not take it from the others

    def _add(self, source: Source) -> Future[None]:
        return self._engines.add(source.fetch())
