"""Provides threads for blocking work, separate for each tenant."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

_T = TypeVar("_T")


class TenantThreads:
    """A pool of threads for each tenant.

    So one tenant's blocking work, such as waiting for a frozen run, takes no thread of another one.
    """

    def __init__(self, most: int, name: str) -> None:
        """
        Args:
            most: the maximum number of threads for each tenant.
            name: the prefix of the thread names.
        """
        self._pools = defaultdict[str, ThreadPoolExecutor](
            partial(ThreadPoolExecutor, most, thread_name_prefix=name)
        )

    def run(self, tenant: str, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """Starts or queues `work` in the tenant's threads; returns its future without blocking."""
        return asyncio.get_running_loop().run_in_executor(self._pools[tenant], work)
