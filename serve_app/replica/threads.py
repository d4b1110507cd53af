"""Threads for work that blocks, some for each tenant."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

_T = TypeVar("_T")


class TenantThreads:
    """What one tenant waits for, a frozen run say, fills no other's places."""

    def __init__(self, most: int, name: str) -> None:
        """
        Args:
            most: of each tenant.
            name: what its threads are called.
        """
        self._pools = defaultdict[str, ThreadPoolExecutor](
            partial(ThreadPoolExecutor, most, thread_name_prefix=name)
        )

    def run(self, tenant: str, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """Begins it in one of the tenant's threads, or queues it there; the event loop goes on."""
        return asyncio.get_running_loop().run_in_executor(self._pools[tenant], work)
