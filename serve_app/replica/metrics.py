"""Exports counts and times of a replica at Ray's Prometheus endpoint: numbers, no text, no names.

Every series also has Serve's own labels (application, deployment, replica) and, in Prometheus, the
prefix `ray_`. `docs/grafana-sampling.json` is a dashboard for these series.
"""

from __future__ import annotations

import time
from functools import cache

from ray.serve import metrics

from actors.sampling.requests import Load
from actors.sampling.text import Completions
from tg_tinker.types import StreamChunk

_SECONDS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60]
_STEPS = [0.5, 1.5, 2.5, 5, 10, 20, 50, 100]


class Meters:
    """The metric series of this process."""

    def __init__(self) -> None:
        self.first_token = _histogram("first_token_seconds", "Arrival to first token", _SECONDS)
        self.gap = _histogram("token_gap_seconds", "Between tokens of a completion", _SECONDS)
        self.queue = _histogram("queue_seconds", "Arrival at the engine to a slot", _SECONDS)
        self.lag = _histogram(
            "version_lag_steps", "Steps between the weights that answer and the newest seen", _STEPS
        )
        self.prompt_tokens = metrics.Counter("tg_tinker_prompt_tokens", "Tokens of prompts")
        self.new_tokens = metrics.Counter("tg_tinker_new_tokens", "Tokens drawn and delivered")
        self.refused = metrics.Counter(
            "tg_tinker_refused", "Requests that ended with an error", tag_keys=("reason",)
        )
        self.slots = metrics.Gauge("tg_tinker_slots", "Slots of all engines", tag_keys=("state",))
        self.waiting = metrics.Gauge("tg_tinker_waiting", "Requests that wait for slots")
        self.adapters = metrics.Gauge("tg_tinker_adapters", "Resident LoRA adapters")
        self.adapter_bytes = metrics.Gauge("tg_tinker_adapter_bytes", "Bytes of resident adapters")

    def load(self, load: Load) -> None:
        self.slots.set(load.running, {"state": "running"})
        self.slots.set(load.free, {"state": "free"})
        self.waiting.set(load.waiting)
        self.adapters.set(load.adapters)
        self.adapter_bytes.set(load.adapter_bytes)


@cache
def meters() -> Meters:
    """Returns the series of this process.

    They are made at the first use, in the replica, because other processes import this module too.
    """
    return Meters()


class Watch:
    """A stopwatch for one call, from its arrival."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._last: dict[int, float] = {}

    def queued(self, prompt_tokens: int, lag: int | None) -> None:
        meters().prompt_tokens.inc(prompt_tokens)
        if lag is not None:
            meters().lag.observe(lag)

    def delivered(self, call: Completions, chunk: StreamChunk) -> None:
        now = time.perf_counter()
        if not self._last:
            meters().first_token.observe(now - self._begun)
            meters().queue.observe(call.requests[0].waited_s)
        elif chunk.index in self._last:
            per_token = (now - self._last[chunk.index]) / len(chunk.token_ids)
            meters().gap.observe(per_token)
        self._last[chunk.index] = now
        if chunk.token_ids:  # A counter of Ray refuses to count nothing.
            meters().new_tokens.inc(len(chunk.token_ids))


def count_refusal(reason: str) -> None:
    """Counts a request that ended with an error; `reason` is the `code` of the error."""
    meters().refused.inc(tags={"reason": reason})


def _histogram(name: str, description: str, boundaries: list[float]) -> metrics.Histogram:
    return metrics.Histogram(f"tg_tinker_{name}", description, boundaries)
