"""Adds text to the token-based `SlotEngine`: prompts in, `StreamChunk`s and `Sample`s out."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from actors.sampling.grammar import Grammar
from actors.sampling.requests import SLOTS, Token, TokenRequest
from tg_tinker.data.decoding import TextStream, split_stops
from tg_tinker.data.text import ChatPrompt, encode_prompt, plain_tokens
from tg_tinker.errors import InvalidRequestError
from tg_tinker.sampling import SamplingParams
from tg_tinker.types import Sample, StreamChunk

PIECE = 2**14
"""The number of characters that are encoded at a time, to see whether a long text fits."""

LIGHT = 64
"""The maximum number of tokens and alternatives whose text is found at once outside of the tenant's
threads: to pass them to a thread would cost more."""


def check_length(tokenizer: Any, prompt: str | Sequence[int], context: int) -> None:
    """Refuses a prompt that is clearly longer than the context, before it is encoded as a whole.

    While a text is encoded, it takes hundreds of times its own memory. What is left is refused by
    the engine, which knows the exact length.

    Raises:
        InvalidRequestError: the prompt does not fit.
    """
    tokens, most = len(prompt), context
    if isinstance(prompt, str):
        if len(prompt) <= PIECE:
            return
        # A word at the border of two pieces may become more tokens than it has in the whole text.
        tokens, most = 0, context + context // 8 + 64
        if isinstance(prompt, ChatPrompt):
            tokens = len(prompt.token_ids)  # it is encoded already
        else:
            for at in range(0, len(prompt), PIECE):
                tokens += len(plain_tokens(tokenizer, prompt[at : at + PIECE]))
                if tokens > most:
                    break
    if tokens > most:
        raise InvalidRequestError(
            f"a prompt is longer than the context of {context} tokens: shorten it"
        )


class Completions:
    """All completions of one call, prompt by prompt, between the engine and the reader.

    Args:
        version: the version of the weights, for the chunks.
        adapter: the adapter's name in the engine; None for the base model's weights.
        owner: the name under which the call is scheduled, see `TokenRequest`.
        grammar: what the schema in `params` was compiled to, if it has one.
        notify: the function that the engine's thread calls when there is something to `take`.

    Attributes:
        version: the version of the weights.
        requests: the requests to submit to the engine. Tokens may arrive in the engine's thread
            while the reader calls `take`.
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
        grammar: Grammar | None = None,
    ) -> None:
        count = params.num_completions
        stops, stop_ids = split_stops(tokenizer, params.stop_sequences)
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *stop_ids))
        encoded = [encode_prompt(tokenizer, p) if isinstance(p, str) else p for p in prompts]
        self._texts: list[TextStream | None] = [  # None once its completion has ended
            TextStream(tokenizer, stops, () if isinstance(prompt, ChatPrompt) else ids)
            for prompt, ids in zip(prompts, encoded, strict=True)
            for _ in range(count)
        ]
        self._without_stops = not stops
        self._alternatives = params.top_logprobs
        self._held: list[list[Token]] = [[] for _ in self._texts]  # their text may still change
        self._arrived: deque[tuple[TokenRequest, int, Token]] = deque()
        self._stopped: list[tuple[TokenRequest, int]] = []
        self.version, self._adapter, self._notify = version, adapter, notify
        self._owner, self._grammar = owner, grammar
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        self.requests = [
            self._request(ids, params, number, first)
            for number, ids in enumerate(encoded)
            for first in range(0, count, SLOTS)  # no request needs more slots than there are
        ]

    @property
    def count(self) -> int:
        """The number of completions of all prompts together."""
        return len(self._texts)

    @property
    def open(self) -> bool:
        """Whether more chunks will come."""
        return any(text is not None for text in self._texts)

    @property
    def light(self) -> bool:
        """Whether `take` has little work with the tokens that have arrived, and finds no stops."""
        waiting = len(self._arrived) * (1 + self._alternatives)
        return self._without_stops and waiting <= LIGHT

    def stopped(self) -> list[tuple[TokenRequest, int]]:
        """Returns the completions that a stop sequence has ended since the last call.

        The engine sees tokens and no text, so the caller must cancel these completions.
        """
        found, self._stopped = self._stopped, []
        return found

    def take(self) -> Iterator[StreamChunk]:
        """Yields chunks of the tokens that have arrived since the last call.

        The text of a chunk is final: whole characters, without any part that may still become a
        stop sequence. The last chunk of a completion has a `finish_reason`.

        Raises:
            TGTinkerError: if the engine ended a request with an error.
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
        some = params if count == params.num_completions else replace(params, num_completions=count)
        request = TokenRequest(
            ids, some, lambda token: None, number, first,
            self._adapter, self._owner, self._grammar,
        )  # fmt: skip
        request.deliver = partial(self._deliver, request, number * params.num_completions + first)
        return request

    def _deliver(self, request: TokenRequest, offset: int, token: Token) -> None:
        self._arrived.append((request, offset + token.index, token))
        self._notify()

    def _chunk(self, request: TokenRequest, index: int, token: Token) -> StreamChunk | None:
        stream = self._texts[index]
        if stream is None:
            return None  # drawn before the engine received the cancellation
        reason, shown = token.finish_reason, token.token_id >= 0
        # The token that ends an answer is no text, even if the tokenizer would show it.
        text = stream.push(token.token_id) if shown and reason != "eos" else ""
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
        drawn = [token for token in held if token.token_id >= 0]
        return StreamChunk(
            text=text,
            index=index,
            token_ids=[token.token_id for token in drawn],
            logprobs=[token.logprob for token in drawn],
            finish_reason=reason,
            weights_version=self.version,
            top_logprobs=[token.top for token in held if token.top],
            prompt_logprobs=held[0].prompt,
            prompt_top_logprobs=held[0].prompt_top,
        )


def is_light(chunk: StreamChunk) -> bool:
    """Returns whether a chunk is soon written: it has few tokens, and no scores of its prompt."""
    written = len(chunk.token_ids) + sum(map(len, chunk.top_logprobs))
    return chunk.prompt_logprobs is None and written <= LIGHT


def by_completion(chunks: Sequence[StreamChunk], count: int) -> list[list[StreamChunk]]:
    """Returns the chunks of each of `count` completions, in the order of their arrival."""
    parts: list[list[StreamChunk]] = [[] for _ in range(count)]
    for chunk in chunks:
        parts[chunk.index].append(chunk)
    return parts


def join(
    prompts: Sequence[str], num_completions: int, timed: Sequence[tuple[StreamChunk, float]]
) -> list[Sample]:
    """Returns whole completions in the order of the prompts.

    Args:
        timed: the chunks, each with the milliseconds until its arrival.
    """
    parts = by_completion([chunk for chunk, _ in timed], len(prompts) * num_completions)
    # The last chunk of a completion determines its latency.
    latency = {chunk.index: milliseconds for chunk, milliseconds in timed}
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
