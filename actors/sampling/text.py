"""Text over tokens: prompts in, `StreamChunk`s and `Sample`s out, on the `SlotEngine`."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from actors.sampling.engine import SLOTS
from actors.sampling.requests import Token, TokenRequest
from tg_tinker.data.text import TextStream, encode_prompt
from tg_tinker.sampling import SamplingParams
from tg_tinker.types import Sample, StreamChunk


class Completions:
    """All completions of one call, prompt by prompt, between the engine and the reader.

    Args:
        version: of the weights, for the chunks.
        adapter: which the engine knows by this name; None for its own weights.
        owner: whose turns the call shares, see `TokenRequest`.
        notify: called when there is something to `take`, in the engine's thread.

    Attributes:
        version: of the weights.
        requests: for the engine. Tokens may arrive in its thread while the reader takes.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        version: str = "",
        adapter: str | None = None,
        owner: str = "",
        notify: Callable[[], object] = lambda: None,
    ) -> None:
        count = params.num_completions
        texts = [TextStream(tokenizer, params.stop_sequences) for _ in range(count * len(prompts))]
        self._texts: list[TextStream | None] = [*texts]  # None once its completion has ended
        self._held: list[list[Token]] = [[] for _ in texts]  # arrived, their text is not certain
        self._arrived: deque[tuple[TokenRequest, int, Token]] = deque()
        self._stopped: list[tuple[TokenRequest, int]] = []
        self.version, self._adapter, self._notify = version, adapter, notify
        self._owner = owner
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        self.requests = [
            self._request(ids, params, number, first)
            for number, ids in enumerate(self._encoded(tokenizer, prompts))
            for first in range(0, count, SLOTS)  # no request needs more slots than there are
        ]

    def _encoded(self, tokenizer: Any, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        return [encode_prompt(tokenizer, p) if isinstance(p, str) else p for p in prompts]

    @property
    def count(self) -> int:
        """Completions of all prompts together."""
        return len(self._texts)

    @property
    def open(self) -> bool:
        """Whether more will come."""
        return any(text is not None for text in self._texts)

    def stopped(self) -> list[tuple[TokenRequest, int]]:
        """Completions that a stop sequence ended since the last time: the engine knows no text,
        and has to be told."""
        found, self._stopped = self._stopped, []
        return found

    def take(self) -> Iterator[StreamChunk]:
        """Chunks of what has arrived since the last time.

        A chunk carries text that is certain: whole characters, and nothing that may still turn
        out to be part of a stop sequence. The last of a completion has a `finish_reason`.
        """
        while self._arrived:
            request, index, token = self._arrived.popleft()
            if token.error is not None:
                raise token.error
            if chunk := self._chunk(request, index, token):
                yield chunk

    def _request(
        self, ids: list[int], params: SamplingParams, number: int, first: int
    ) -> TokenRequest:
        count = min(SLOTS, params.num_completions - first)
        request = TokenRequest(
            ids, replace(params, num_completions=count), lambda token: None, number, first,
            self._adapter, self._owner,
        )  # fmt: skip
        request.deliver = partial(self._deliver, request, number * params.num_completions + first)
        return request

    def _deliver(self, request: TokenRequest, offset: int, token: Token) -> None:
        self._arrived.append((request, offset + token.index, token))
        self._notify()

    def _chunk(self, request: TokenRequest, index: int, token: Token) -> StreamChunk | None:
        stream = self._texts[index]
        if stream is None:
            return None  # drawn before the engine heard of the stop
        text, reason = stream.push(token.token_id), token.finish_reason
        if reason is not None:
            text += stream.flush()
        if stream.stopped:
            reason = "stop"
            self._stopped.append((request, token.index))
        held = self._held[index]
        held.append(token)
        if not text and reason is None:
            return None
        self._held[index] = []
        if reason is not None:
            self._texts[index] = None
        return StreamChunk(
            text=text,
            index=index,
            token_ids=[token.token_id for token in held],
            logprobs=[token.logprob for token in held],
            finish_reason=reason,
            weights_version=self.version,
            top_logprobs=[token.top for token in held if token.top],
            prompt_logprobs=held[0].prompt,
        )


def by_completion(chunks: Sequence[StreamChunk], count: int) -> list[list[StreamChunk]]:
    """The chunks of each of `count` completions, in the order they came."""
    parts: list[list[StreamChunk]] = [[] for _ in range(count)]
    for chunk in chunks:
        parts[chunk.index].append(chunk)
    return parts


def join(
    prompts: Sequence[str], num_completions: int, timed: Sequence[tuple[StreamChunk, float]]
) -> list[Sample]:
    """Whole completions in the order of the prompts, from chunks and when each came (ms)."""
    parts = by_completion([chunk for chunk, _ in timed], len(prompts) * num_completions)
    latency = {chunk.index: milliseconds for chunk, milliseconds in timed}  # of the last one
    return [
        _joined(prompts[i // num_completions], chunks, latency[i]) for i, chunks in enumerate(parts)
    ]


def _joined(prompt: str, parts: list[StreamChunk], latency_ms: float) -> Sample:
    token_ids = [token for part in parts for token in part.token_ids]
    return Sample(
        prompt=prompt,
        completion="".join(part.text for part in parts),
        num_tokens=len(token_ids),
        finish_reason=parts[-1].finish_reason or "length",
        latency_ms=latency_ms,
        token_ids=token_ids,
        logprobs=[logprob for part in parts for logprob in part.logprobs],
    )
