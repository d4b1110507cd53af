"""Defines the formats of HTTP requests and responses: those of OpenAI and that of `/v1/sample`.

A field that is not defined here is refused by name, unless `fields` says that its value asks for
nothing. Reference: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from actors.sampling.requests import Top
from serve_app.http import tokens
from serve_app.http.fields import asks_for_nothing
from serve_app.http.tokens import Offsets
from tg_tinker.errors import InvalidRequestError
from tg_tinker.sampling import MOST_BIASES, MOST_STOP_CHARACTERS, SamplingParams
from tg_tinker.types import StreamChunk

MOST_STOPS = 16
MOST_COMPLETIONS = 128
"""The maximum number of completions of one request, over all its prompts."""

MOST_FIELDS = 64
"""The maximum number of fields of an object that a format defines: errors name each wrong one."""

MOST_NAME = 512
"""The maximum number of characters in the name of a model."""

MOST_TEXT, MOST_IDS = 2**20, 2**18
"""The maximum number of characters in a text, and of token ids in a list."""

MOST_SCORES = 2**18
"""The maximum number of log-probabilities of prompt tokens in one answer, with alternatives."""

MOST_MESSAGES = MOST_TEXT_PARTS = 1024
"""The maximum number of messages of a chat, and of parts of a message."""

_CHAT_TOKENS = 256

MOST_KEYWORDS = 256
"""The maximum number of fields of a JSON schema, at its first level."""

# Every list and text has a bound, and a list ends with its first wrong item: see `value_of`.
Name = Annotated[str, Field(max_length=MOST_NAME)]
Text = Annotated[str, Field(max_length=MOST_TEXT)]
Ids = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_IDS, fail_fast=True)
]
Texts = Annotated[list[Text], Field(max_length=MOST_COMPLETIONS, fail_fast=True)]
ListsOfIds = Annotated[list[Ids], Field(max_length=MOST_COMPLETIONS, fail_fast=True)]
Stop = Annotated[str, Field(max_length=MOST_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)]
StopIds = Annotated[list[int], Field(max_length=MOST_STOPS, fail_fast=True)]
Schema = Annotated[dict[str, Any], Field(max_length=MOST_KEYWORDS)]


def _biases(given: Any) -> dict[int, Any]:
    """Returns token ids -> biases. `SamplingParams` checks the values.

    It is written out, because pydantic names each key in its errors, and a key may be any text.
    """
    keys = [*map(str, given)] if isinstance(given, dict) and len(given) <= MOST_BIASES else None
    if keys is None or any(not (k.isascii() and k.isdigit() and len(k) < 11) for k in keys):
        raise PydanticCustomError(
            "biases", "must be an object with at most {most} token ids", {"most": MOST_BIASES}
        )
    return {int(key): value for key, value in given.items()}


Biases = Annotated[dict[int, Any], PlainValidator(_biases)]
BestOf = Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] | None


def _drawn(name: str, kept: int, best_of: int | None, stream: bool) -> int:
    """Returns the number of completions to draw for each prompt, of which `kept` are returned.

    Raises:
        InvalidRequestError: `best_of` is too small, or the answer is a stream, which would have to
            begin before the best completions are known.
    """
    drawn = kept if best_of is None else best_of
    if drawn < kept or (drawn > kept and stream):
        raise InvalidRequestError(
            f"best_of: must be at least {name}, and with stream=true it must be equal to {name}",
            details={"parameter": "best_of"},
        )
    return drawn


class Body(BaseModel):
    """The base of all bodies and their parts. As in OpenAI's API, a null is an absent field.

    Each list, object and text in a body must have a bound (`tests/serving/test_floods.py`).
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _what_asks_for_something(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > MOST_FIELDS:
            raise PydanticCustomError(
                "fields", "must have at most {most} fields", {"most": MOST_FIELDS}
            )
        return {
            name: value
            for name, value in given.items()
            if value is not None and not cls._is_ignored(name, value)
        }

    @classmethod
    def _is_ignored(cls, name: str, value: Any) -> bool:
        return False


class _OpenAIBody(Body):
    """A body, or a part of one, whose fields `fields` lists under this prefix."""

    prefix: ClassVar[str] = ""

    @classmethod
    def _is_ignored(cls, name: str, value: Any) -> bool:
        return asks_for_nothing(cls.prefix + name, value)


class StreamOptions(_OpenAIBody):
    prefix: ClassVar[str] = "stream_options."

    include_usage: bool = False


class JsonSchema(_OpenAIBody):
    prefix: ClassVar[str] = "response_format.json_schema."

    given: Schema = Field(alias="schema")


class ResponseFormat(_OpenAIBody):
    prefix: ClassVar[str] = "response_format."

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_answers(self) -> dict[str, Any] | None:
        """Returns the JSON schema that an answer must match; None if it may be any text."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequestError(
                "response_format.json_schema: must be sent with type json_schema, and only then",
                details={"parameter": "response_format"},
            )
        if self.json_schema is not None:
            return self.json_schema.given
        return {"type": "object"} if self.type == "json_object" else None


class _Common(_OpenAIBody):
    """The fields that both OpenAI endpoints share, and our own fields such as `top_k`."""

    model: Name
    n: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] = 1
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Stop | Stops | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: StopIds = Field(default_factory=list)
    logit_bias: Biases = Field(default_factory=dict)
    best_of: BestOf = None
    response_format: ResponseFormat | None = None

    @property
    def kept(self) -> int:
        """The number of completions to return for each prompt."""
        return self.n

    def _params(
        self, max_tokens: int, top_logprobs: int, prompt_logprobs: bool = False
    ) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: needs stream=true")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        form = self.response_format
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p,
            top_k=self.top_k if self.top_k is None or self.top_k > 0 else None,
            stop_sequences=tuple(stops),
            num_completions=_drawn("n", self.n, self.best_of, self.stream),
            repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids), top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs, min_p=self.min_p, logit_bias=self.logit_bias,
            json_schema=None if form is None else form.schema_of_answers(),
        )  # fmt: skip


class CompletionBody(_Common):
    """The body of POST /v1/completions."""

    prompt: Text | Texts | Ids | ListsOfIds
    max_tokens: int = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    def params(self) -> SamplingParams:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError(
                "max_tokens: 0 asks for nothing: set echo=true, and logprobs for scores of the"
                " prompt, or ask for at least 1",
                details={"parameter": "max_tokens"},
            )
        scored = self.echo and (self.logprobs is not None or self.max_tokens == 0)
        return self._params(self.max_tokens, self.logprobs or 0, scored)

    def prompts(self) -> list[str | Ids]:
        """Returns the prompts: one or more texts, or lists of token ids."""
        given: Any = self.prompt
        one = isinstance(given, str) or (given and isinstance(given[0], int))
        listed: list[str | Ids] = [given] if one else list(given)
        if not listed:
            raise InvalidRequestError("prompt: the list is empty: send at least one prompt")
        return listed


class TextPart(_OpenAIBody):
    prefix: ClassVar[str] = "messages.content."

    type: Literal["text"]
    text: Text


TextParts = Annotated[list[TextPart], Field(max_length=MOST_TEXT_PARTS, fail_fast=True)]


class Message(_OpenAIBody):
    prefix: ClassVar[str] = "messages."

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | TextParts

    def plain(self) -> dict[str, str]:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(_Common):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def plain_messages(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]

    def params(self, room: int) -> SamplingParams:
        """Returns the sampling parameters; `room` is the number of tokens left in the context."""
        stated = [n for n in (self.max_completion_tokens, self.max_tokens) if n is not None]
        limit = stated[0] if stated else max(1, min(_CHAT_TOKENS, room))
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs: needs logprobs=true")
        return self._params(limit, self.top_logprobs or 0)


class SampleBody(Body):
    """The body of POST /v1/sample: the fields of `SamplingParams`, and OpenAI's `best_of`.

    It is answered by a `SampleResult`.
    """

    model: Name
    prompts: Text | Texts
    stream: bool = False
    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_sequences: Stops = Field(default_factory=list)
    num_completions: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: StopIds = Field(default_factory=list)
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    min_p: float = 0.0
    logit_bias: Biases = Field(default_factory=dict)
    json_schema: Schema | None = None
    best_of: BestOf = None

    @property
    def kept(self) -> int:
        """The number of completions to return for each prompt."""
        return self.num_completions

    def params(self) -> SamplingParams:
        given = self.model_dump(exclude={"model", "prompts", "stream", "best_of"})
        given |= {k: tuple(given[k]) for k in ("stop_sequences", "stop_token_ids")}
        given["num_completions"] = _drawn(
            "num_completions", self.num_completions, self.best_of, self.stream
        )
        return SamplingParams(**given)


class _Row(NamedTuple):
    """A token of a choice; `text` is what it adds to the text, None if it is no part of it."""

    token: int
    logprob: float
    top: Top
    text: bytes | None


class Answer:
    """A builder of OpenAI's responses to one request, whole or event by event.

    Args:
        echoes: the text with which the completions of each prompt begin.
        prompts: the tokens of each prompt, for its log-probabilities.
    """

    def __init__(
        self, body: CompletionBody | ChatBody, tokenizer: Any, echoes: list[str], version: str,
        prompts: Sequence[Sequence[int]] = (),
    ) -> None:  # fmt: skip
        self._chat = isinstance(body, ChatBody)
        kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind, "created": int(time.time()), "model": body.model,
            "system_fingerprint": version,
        }  # fmt: skip
        self._scored = bool(body.logprobs) if self._chat else body.logprobs is not None
        self._tokens = tokens.of(tokenizer)
        self._echoes, self._n, self._prompts = echoes, body.n, prompts
        # A prompt that was sent as text has the texts of its special tokens in its echo.
        self._literal = isinstance(body, CompletionBody) and isinstance(body.prompts()[0], str)
        self._begun: set[int] = set()
        self._offsets: dict[int, Offsets] = {}
        self._lengths: Counter[int] = Counter()  # Characters sent of each choice.

    def event(self, chunk: StreamChunk) -> dict[str, Any]:
        """Returns a chunk as one event of a stream."""
        choice = self._choice(chunk.index, [chunk], "delta")
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": [choice]}

    def usage_event(self, usage: dict[str, int]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": [], "usage": usage}

    def whole(self, parts: list[list[StreamChunk]], usage: dict[str, int]) -> dict[str, Any]:
        """Returns the response without streaming; `parts` are the chunks of each completion."""
        choices = [self._choice(index, chunks, "message") for index, chunks in enumerate(parts)]
        return self._head | {"choices": choices, "usage": usage}

    # --- inside ------------------------------------------------------------------------------

    def _choice(self, index: int, chunks: list[StreamChunk], where: str) -> dict[str, Any]:
        first, reason = index not in self._begun, chunks[-1].finish_reason
        self._begun.add(index)
        echo = self._echoes[index // self._n] if first else ""
        text = echo + "".join(chunk.text for chunk in chunks)
        self._lengths[index] += len(text)
        choice: dict[str, Any] = {
            "index": index, "finish_reason": {"eos": "stop"}.get(reason or "", reason),
            "logprobs": self._logprobs(index, chunks, echo) if self._scored else None,
        }  # fmt: skip
        if not self._chat:
            return choice | {"text": text}
        role = {"role": "assistant"} if first else {}
        return choice | {where: {**role, "content": text}}

    def _logprobs(self, index: int, chunks: list[StreamChunk], echo: str) -> dict[str, Any]:
        """Returns the log-probabilities of tokens of a choice; `echo` is for its first chunk."""
        rows = [row for chunk in chunks for row in self._rows(chunk)]
        if self._chat:
            return {
                "content": [
                    self._named(row.token, row.logprob, row.text)
                    | {"top_logprobs": [self._alternative(*other) for other in row.top]}
                    for row in rows
                ]
            }
        offsets = self._offsets.setdefault(index, Offsets(len(echo)))
        places = [offsets.push(row.text or b"") for row in rows]
        if chunks[-1].finish_reason is not None:
            # The tokens of a stop sequence are not in the text.
            places = [min(place, self._lengths[index]) for place in places]
        before = [*self._prompt_rows(index, chunks[0])]
        none = [None] * bool(before)  # Nothing stands before the first token, to predict it.
        scored = before[1:] + rows
        return {
            "tokens": [self._tokens.name_of(row.token) for row in before + rows],
            "token_logprobs": [*none, *(finite(row.logprob) for row in scored)],
            "top_logprobs": [*none, *map(self._by_name, scored)],
            "text_offset": self._places_in(echo, before) + places,
        }

    def _prompt_rows(self, index: int, chunk: StreamChunk) -> Iterator[_Row]:
        """Yields the tokens of the prompt of a choice, if they are scored."""
        if chunk.prompt_logprobs is None or not self._prompts:
            return
        ids = self._prompts[index // self._n]
        tops = chunk.prompt_top_logprobs or [()] * len(ids)
        for token, logprob, top in zip(ids, chunk.prompt_logprobs, tops, strict=True):
            literal = self._tokens.bytes_of(token) if self._literal else None
            yield _Row(token, logprob, top, literal or self._tokens.text_of(token))

    def _places_in(self, echo: str, rows: list[_Row]) -> list[int]:
        """Returns where each token of a prompt begins in its text.

        The end is where both meet: at the beginning the model may have tokens of its own, such as
        its start of a text.
        """
        offsets = Offsets()
        found = [offsets.push(row.text or b"") for row in rows]
        return [max(0, place + len(echo) - offsets.at) for place in found]

    def _rows(self, chunk: StreamChunk) -> Iterator[_Row]:
        ends_at = len(chunk.token_ids) - 1 if chunk.finish_reason == "eos" else None
        for i, (token, logprob) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True)):
            top = chunk.top_logprobs[i] if chunk.top_logprobs else ()
            yield _Row(token, logprob, top, None if i == ends_at else self._tokens.text_of(token))

    def _by_name(self, row: _Row) -> dict[str, float]:
        """Returns the alternatives at a position, and always the token that is there."""
        known = any(row.token == other for other, _ in row.top)
        listed = row.top if known else (*row.top, (row.token, row.logprob))
        return {name: finite(value) for name, value in self._tokens.by_name(listed).items()}

    def _alternative(self, token: int, logprob: float) -> dict[str, Any]:
        return self._named(token, logprob, self._tokens.text_of(token))

    def _named(self, token: int, logprob: float, text: bytes | None) -> dict[str, Any]:
        shown = None if text is None else [*text]
        return {"token": self._tokens.name_of(token), "logprob": finite(logprob), "bytes": shown}


def best(parts: list[list[StreamChunk]], drawn: int, kept: int) -> list[list[StreamChunk]]:
    """Returns the best of `drawn` completions of each prompt by OpenAI's rule, the best one first.

    The rule is the mean log-probability of the tokens. If all completions are kept, their order
    stays.
    """
    if drawn == kept:
        return parts
    groups = [parts[at : at + drawn] for at in range(0, len(parts), drawn)]
    return [part for group in groups for part in sorted(group, key=_mean_logprob)[-kept:][::-1]]


def _mean_logprob(chunks: list[StreamChunk]) -> float:
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    return math.fsum(logprobs) / max(1, len(logprobs))


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def check_count(prompts: int, params: SamplingParams) -> None:
    """Refuses a request for more completions than an answer may have.

    Raises:
        InvalidRequestError: there are too many of them.
    """
    if prompts * params.num_completions > MOST_COMPLETIONS:
        raise InvalidRequestError(
            f"{prompts} prompts with {params.num_completions} completions each exceed the"
            f" {MOST_COMPLETIONS} completions of one request: send fewer at a time"
        )


def check_scores(prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """Refuses a request for more scores of prompt tokens than an answer may have.

    Raises:
        InvalidRequestError: there are too many of them.
    """
    asked = sum(map(len, prompts)) * params.num_completions * (1 + params.top_logprobs)
    if params.prompt_logprobs and asked > MOST_SCORES:
        raise InvalidRequestError(
            f"the log-probabilities of {asked} tokens and alternatives of prompts exceed the"
            f" {MOST_SCORES} of one answer: send fewer prompts, or ask for fewer alternatives"
        )


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """Returns an error in the format of OpenAI's clients."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sample_event(chunk: StreamChunk) -> dict[str, Any]:
    """Returns a chunk as one event of a stream of `/v1/sample`."""
    scored, top = chunk.prompt_logprobs, chunk.prompt_top_logprobs
    return vars(chunk) | {
        "logprobs": [*map(finite, chunk.logprobs)],
        "top_logprobs": [*map(_finite_top, chunk.top_logprobs)],
        "prompt_logprobs": None if scored is None else [None, *map(finite, scored[1:])],
        "prompt_top_logprobs": None if top is None else [None, *map(_finite_top, top[1:])],
    }


def sampled(parts: list[list[StreamChunk]], kept: int) -> list[dict[str, Any]]:
    """Returns the completions of an answer of `/v1/sample`, `kept` of each prompt."""
    found = []
    for index, part in enumerate(parts):
        events = [sample_event(chunk) for chunk in part]
        joined = {
            name: [value for event in events for value in event[name]]
            for name in ("token_ids", "logprobs", "top_logprobs")
        }
        scores = {name: events[0][name] for name in ("prompt_logprobs", "prompt_top_logprobs")}
        found.append(
            {
                "prompt_index": index // kept,
                "completion": "".join(chunk.text for chunk in part),
                **joined,
                **scores,
                "finish_reason": part[-1].finish_reason,
            }
        )
    return found


def _finite_top(top: Top) -> list[tuple[int, float]]:
    return [(token, finite(logprob)) for token, logprob in top]


def finite(value: float) -> float:
    """Returns the value, or -9999 as OpenAI does if it is not finite: JSON has no infinity."""
    return value if math.isfinite(value) else -9999.0
