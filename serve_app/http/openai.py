"""The shapes of HTTP: OpenAI's completions and chat, and one of our own.

A field that is not here is refused by name: a parameter that is accepted and ignored would answer
another question than the one that was asked. Reference: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tg_tinker.errors import InvalidRequestError
from tg_tinker.sampling import SamplingParams
from tg_tinker.types import StreamChunk

Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Stops = str | list[str] | None

MOST_STOPS = 16
MOST_COMPLETIONS = 128
"""Of one request, over all its prompts."""

MOST_MESSAGES = 1024
_CHAT_TOKENS = 256


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """null is what was left out, as in OpenAI's description of its fields."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(_Body):
    include_usage: bool = False


class _Common(_Body):
    """Fields of both OpenAI endpoints, and of ours that OpenAI does not have (top_k, ...)."""

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Stops = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # no part in the answer, as documented there
    top_k: int | None = None
    repetition_penalty: float = 1.0
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] = Field(default_factory=list)

    def _params(self, max_tokens: int, top_logprobs: int) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: needs stream=true")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS:
            raise InvalidRequestError(f"stop: at most {MOST_STOPS} sequences, got {len(stops)}")
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p,
            top_k=self.top_k if self.top_k is None or self.top_k > 0 else None,
            stop_sequences=tuple(stops), num_completions=self.n,
            repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids), top_logprobs=top_logprobs,
        )  # fmt: skip


class CompletionBody(_Common):
    """POST /v1/completions"""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    max_tokens: int = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    def params(self) -> SamplingParams:
        if self.echo and self.logprobs is not None:
            raise InvalidRequestError(
                "echo: with logprobs is not supported here: /v1/sample scores prompts"
                " (prompt_logprobs)"
            )
        return self._params(self.max_tokens, self.logprobs or 0)

    def prompts(self) -> list[str | Ids]:
        """One or more texts, or token ids."""
        given: Any = self.prompt
        one = isinstance(given, str) or (given and isinstance(given[0], int))
        listed: list[str | Ids] = [given] if one else list(given)
        if not listed:
            raise InvalidRequestError("prompt: an empty list asks for nothing")
        return listed


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(_Common):
    """POST /v1/chat/completions"""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def params(self, room: int) -> SamplingParams:
        """`room` is how many tokens the context has left."""
        stated = [n for n in (self.max_completion_tokens, self.max_tokens) if n is not None]
        limit = stated[0] if stated else max(1, min(_CHAT_TOKENS, room))
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs: needs logprobs=true")
        return self._params(limit, self.top_logprobs or 0)


class SampleBody(_Body):
    """POST /v1/sample: `SamplingParams` as they are; the answer is a `SampleResult`."""

    model: str
    prompts: str | Texts
    stream: bool = False
    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
    num_completions: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def params(self) -> SamplingParams:
        given = self.model_dump(exclude={"model", "prompts", "stream"})
        given |= {k: tuple(given[k]) for k in ("stop_sequences", "stop_token_ids")}
        return SamplingParams(**given)


class Answer:
    """Builds OpenAI's answers to one request, whole or event by event."""

    def __init__(
        self, body: CompletionBody | ChatBody, tokenizer: Any, echoes: list[str], version: str
    ) -> None:
        self._chat = isinstance(body, ChatBody)
        kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind, "created": int(time.time()), "model": body.model,
            "system_fingerprint": version,
        }  # fmt: skip
        self._scored = bool(body.logprobs) if self._chat else body.logprobs is not None
        self._tokenizer = tokenizer
        self._echoes, self._n = echoes, body.n  # what each prompt's completions begin with
        self._begun: set[int] = set()

    def event(self, chunk: StreamChunk) -> dict[str, Any]:
        """One `data:` of a stream."""
        choice = self._choice(chunk.index, self._text(chunk), chunk.finish_reason, [chunk], "delta")
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": [choice]}

    def usage_event(self, usage: dict[str, int]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": [], "usage": usage}

    def whole(self, parts: list[list[StreamChunk]], usage: dict[str, int]) -> dict[str, Any]:
        """The answer without streaming; `parts` are the chunks of each completion."""
        choices = [
            self._choice(
                index, "".join(map(self._text, chunks)), chunks[-1].finish_reason, chunks, "message"
            )
            for index, chunks in enumerate(parts)
        ]
        return self._head | {"choices": choices, "usage": usage}

    # --- inside ------------------------------------------------------------------------------

    def _text(self, chunk: StreamChunk) -> str:
        if self._chat or chunk.index in self._begun:
            return chunk.text
        self._begun.add(chunk.index)
        return self._echoes[chunk.index // self._n] + chunk.text

    def _choice(
        self, index: int, text: str, reason: str | None, chunks: list[StreamChunk], where: str
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index, "finish_reason": {"eos": "stop"}.get(reason or "", reason),
            "logprobs": self._logprobs(chunks) if self._scored else None,
        }  # fmt: skip
        if not self._chat:
            return choice | {"text": text}
        message: dict[str, Any] = {"content": text}
        if where == "message" or index not in self._begun:
            self._begun.add(index)
            message = {"role": "assistant", "content": text}
        return choice | {where: message}

    def _logprobs(self, chunks: list[StreamChunk]) -> dict[str, Any]:
        rows = [
            (token, logprob, chunk.top_logprobs[i] if chunk.top_logprobs else ())
            for chunk in chunks
            for i, (token, logprob) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True))
        ]
        if self._chat:
            return {
                "content": [
                    self._named(token, logprob)
                    | {"top_logprobs": [self._named(*other) for other in top]}
                    for token, logprob, top in rows
                ]
            }
        return {
            "tokens": [self._token(token) for token, _, _ in rows],
            "token_logprobs": [finite(logprob) for _, logprob, _ in rows],
            "top_logprobs": [
                {self._token(other): finite(value) for other, value in top} for _, _, top in rows
            ],
            "text_offset": [],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        return {"token": text, "logprob": finite(logprob), "bytes": [*text.encode()]}

    def _token(self, token: int) -> str:
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sample_event(chunk: StreamChunk) -> dict[str, Any]:
    """One `data:` of a stream of ours."""
    scored = chunk.prompt_logprobs
    return asdict(chunk) | {
        "logprobs": [*map(finite, chunk.logprobs)],
        "prompt_logprobs": None if scored is None else [None, *map(finite, scored[1:])],
    }


def finite(value: float) -> float:
    """JSON has no infinity: OpenAI writes the least likely as -9999."""
    return value if math.isfinite(value) else -9999.0
