"""Tests ten thousand calls of one client, queued as fast as possible: run in order, and not kept
for ever."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from actors.training.call_journal import KEPT_REPLIES, CallJournal
from tg_tinker import QueueFullError, ServiceClient, TrainingConfig
from tg_tinker.client.actor_link import TrainingLink
from tg_tinker.client.calls import MAX_QUEUED, OrderedCalls
from tg_tinker.client.recovery import Reached
from tg_tinker.client.training import TrainingClient
from tg_tinker.cluster.messages import Request
from tg_tinker.errors import ActorLostError
from tg_tinker.storage.envelope import new_key, open_payload, seal_payload
from tg_tinker.types import ModelInfo

pytestmark = pytest.mark.slow

CALLS = 10_000
ROW = [*range(1_000)]
"""Ids and labels: 16 KB a call, 160 MB in all."""


def mock(key: bytes) -> Any:
    """Returns an actor.

    It is defined here so that it travels by value: its process cannot import this file.
    """

    @ray.remote(num_cpus=0)
    class Mock:
        """An actor whose engine counts its calls."""

        def __init__(self, key: bytes) -> None:
            self._key, self._calls, self._run = key, CallJournal(1), 0

        def call(self, sealed: bytes) -> bytes:
            request = open_payload(self._key, sealed)
            return seal_payload(self._key, self._calls.run(request, self._count))

        def _count(self, request: Request, check_cancelled: Any) -> int:
            self._run += 1
            return self._run

        def held(self) -> tuple[int, int]:
            """Returns the number of replies kept, and the most memory of this process so far."""
            return len(self._calls._replies), 1024 * resource.getrusage(
                resource.RUSAGE_SELF
            ).ru_maxrss

    return Mock.remote(key)  # type: ignore[attr-defined]


@pytest.fixture
def queued(embedded: None) -> Iterator[tuple[TrainingClient, TrainingLink]]:
    with ServiceClient("local"):
        key = new_key()
        link = TrainingLink(mock(key), key, lambda error, seen: error)  # type: ignore[arg-type]
        model = ModelInfo(
            vocab_size=len(ROW), context_length=len(ROW), num_trainable=1, base_digest="",
            dtype="float32", device="cpu", flat_stream=True, sampling="slots", num_threads=1,
        )  # fmt: skip
        nobody: Any = ActorLostError
        config = TrainingConfig(model_ref="mock")
        calls = OrderedCalls(
            "tc-mock", Reached(1, link, model), "manual", *[nobody] * 3, park_after_minutes=None
        )
        yield TrainingClient("tc-mock", config, calls, *[nobody] * 3), link


def test_ten_thousand_queued_calls_keep_their_order_and_no_memory(
    queued: tuple[TrainingClient, TrainingLink],
) -> None:
    client, link = queued
    waiting: deque[Any] = deque()
    found, early = [], 0
    for number in range(CALLS):
        while True:
            try:
                waiting.append(client.forward_backward({"input_ids": [ROW]}))
                break
            except QueueFullError:
                found.append(waiting.popleft().result(60))
        assert link.unanswered < 2 * MAX_QUEUED
        if number == CALLS // 4:
            early = ray.get(link.actor.held.remote())[1]
    found += [handle.result(60) for handle in waiting]
    assert found == [*range(1, CALLS + 1)]
    kept, actor = ray.get(link.actor.held.remote())
    assert kept == KEPT_REPLIES
    assert actor - early < 64 * 2**20  # the calls since then are 90 MB; at most 38 were seen
