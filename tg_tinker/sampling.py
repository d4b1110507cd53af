"""Checks the parameters of text generation before a prompt leaves the client."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.texts import check_text

NOT_SAMPLED = (
    "this architecture can be trained but not sampled: token by token, it does not give the logits"
    " that it gives for a whole text. Export the adapter and generate with transformers"
)
"""The warning when a client is created, and the error message of the client, before it sends a
prompt, and of the engine."""

SAMPLED_SLOWLY = (
    "this architecture is sampled slowly: transformers has no cache for it that can be used, so"
    " each token needs a pass over the whole text. Ask for short completions"
)
"""The warning when a client is created."""

MOST_BIASES = 1024
"""The maximum number of tokens in `logit_bias`: the engine applies each of them at every step."""

MOST_STOP_CHARACTERS = 4096
"""The maximum size of all stop sequences together: each new text is compared with all of them."""

MOST_SCHEMA_BYTES, MOST_SCHEMA_LEVELS = 2**15, 64
"""The maximum size of `json_schema` as JSON text, and how deeply its parts may be nested."""


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of sampling.

    They are applied in this order: logit bias, penalties, temperature, top-k, top-p, min-p.

    Attributes:
        max_tokens: the maximum number of tokens to generate, >= 1; with `prompt_logprobs` also 0,
            which scores the prompt and generates nothing.
        temperature: the temperature, >= 0; 0 means greedy.
        top_p: in (0, 1]; keeps the smallest set of tokens with at least this probability. 1 is off.
        top_k: None or >= 1; keeps the k most probable tokens. None is off.
        stop_sequences: the texts that end a completion. A completion does not include its stop
            sequence. Stop sequences are compared with the visible text, without special tokens.
        num_completions: the number of completions per prompt, >= 1.
        repetition_penalty: in [0.01, 100]; divides positive and multiplies negative logits of
            tokens in prompt or completion (CTRL, arXiv:1909.05858). 1 is off.
        presence_penalty: in [-2, 2]; subtracted once from the logit of each token that was
            generated so far (OpenAI's definition). 0 is off.
        frequency_penalty: in [-2, 2]; subtracted from the logit of each token that was generated so
            far, once per occurrence (OpenAI's definition). 0 is off.
        seed: in [0, 2^63). Calls with the same prompts, weights and seed draw the same tokens,
            whatever runs beside them. None draws a new seed.
        stop_token_ids: the tokens that end a completion. A completion includes its stop token.
        top_logprobs: the number of alternatives to report for each generated token, and for each
            token of the prompt if `prompt_logprobs` is set; in [0, 20].
        prompt_logprobs: whether to score the tokens of the prompt too.
        min_p: in [0, 1]; keeps the tokens with at least this fraction of the probability of the
            most probable token. 0 is off.
        logit_bias: token ids and the numbers in [-100, 100] that are added to their logits.
        json_schema: a JSON schema, or None. A completion is then a JSON text that matches it,
            unless `max_tokens` cuts it. Needs `tg-tinker[structured]` where the sampler runs.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_sequences: tuple[str, ...] = ()
    num_completions: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    json_schema: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        top_k = 1 if self.top_k is None else self.top_k
        seed = 0 if self.seed is None else self.seed
        whole = (("max_tokens", self.max_tokens), ("top_k", top_k), ("seed", seed),
                 ("num_completions", self.num_completions), ("top_logprobs", self.top_logprobs),
                 *(("stop_token_ids", token) for token in self.stop_token_ids))  # fmt: skip
        for name, number in whole:
            if not isinstance(number, int) or abs(number) >= 2**63:
                raise InvalidRequestError(f"{name} must be a whole number that fits into 64 bits")
        for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty", "min_p"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int | float) or abs(value) > 1e300:
                raise InvalidRequestError(f"{name} must be a finite number")
        bounds = (
            ("max_tokens", self.max_tokens, self.max_tokens >= (0 if self.prompt_logprobs else 1),
             ">= 1, or 0 with prompt_logprobs to score prompts alone"),
            ("temperature", self.temperature, self.temperature >= 0, ">= 0; 0 is greedy"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]; 1 is off"),
            ("top_k", top_k, top_k >= 1, ">= 1, or None for off"),
            ("num_completions", self.num_completions, self.num_completions >= 1, ">= 1"),
            ("repetition_penalty", self.repetition_penalty,
             0.01 <= self.repetition_penalty <= 100, "in [0.01, 100]; 1 is off"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 2,
             "in [-2, 2]; 0 is off"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 2,
             "in [-2, 2]; 0 is off"),
            ("seed", seed, 0 <= seed < 2**63, "in [0, 2^63), or None for a new one"),
            ("top_logprobs", self.top_logprobs, 0 <= self.top_logprobs <= 20, "in [0, 20]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]; 0 is off"),
        )  # fmt: skip
        for name, value, holds, bound in bounds:
            if not (holds and math.isfinite(value)):
                raise InvalidRequestError(
                    f"{name}={value} is out of range: it must be {bound}",
                    details={"parameter": name},
                )
        if any(not stop for stop in self.stop_sequences):
            raise InvalidRequestError("stop_sequences contains an empty string: leave it out")
        if sum(map(len, self.stop_sequences)) > MOST_STOP_CHARACTERS:
            raise InvalidRequestError(
                f"stop_sequences have more than {MOST_STOP_CHARACTERS} characters in all: shorten"
                " them",
                details={"parameter": "stop_sequences"},
            )
        for stop in self.stop_sequences:
            check_text(stop, "a stop sequence")
        _check_bias(self.logit_bias)
        if self.json_schema is not None:
            _check_schema(self.json_schema)
            if self.stop_sequences or self.stop_token_ids:
                raise InvalidRequestError(
                    "json_schema and response_format end a completion where its JSON ends: leave"
                    " stop sequences and stop tokens out",
                    details={"parameter": "json_schema"},
                )


def _check_bias(bias: Any) -> None:
    """Raises InvalidRequestError if a logit bias is not one. The error repeats no token."""
    if (
        not isinstance(bias, Mapping)
        or len(bias) > MOST_BIASES
        or any(type(token) is not int or not 0 <= token < 2**31 for token in bias)
        or any(type(value) not in (int, float) or not abs(value) <= 100 for value in bias.values())
    ):
        raise InvalidRequestError(
            f"logit_bias must map at most {MOST_BIASES} token ids to numbers in [-100, 100]",
            details={"parameter": "logit_bias"},
        )


def _check_schema(schema: Any) -> None:
    """Raises InvalidRequestError if a JSON schema is none, or is too large. It repeats no text."""
    problem = ""
    try:
        size = len(json.dumps(schema, allow_nan=False))
        if not isinstance(schema, Mapping):
            problem = "must be an object: a JSON schema"
        elif size > MOST_SCHEMA_BYTES:
            problem = f"has {size} bytes, more than {MOST_SCHEMA_BYTES}: shorten it"
        elif _levels(schema) > MOST_SCHEMA_LEVELS:
            problem = f"is nested more than {MOST_SCHEMA_LEVELS} levels deep: use $defs and $ref"
    except (TypeError, ValueError, RecursionError):
        problem = "must consist of JSON values, without NaN and infinity"
    if problem:
        raise InvalidRequestError(f"json_schema {problem}", details={"parameter": "json_schema"})


def _levels(value: Any) -> int:
    """Returns how deeply lists and objects are nested."""
    levels, parts = 0, [value]
    while parts:
        levels += 1
        inner = [one.values() if isinstance(one, Mapping) else one for one in parts]
        parts = [one for some in inner for one in some if isinstance(one, Mapping | list | tuple)]
    return levels


def as_stops(stop_sequences: list[str] | None) -> tuple[str, ...]:
    """Returns stop sequences in the form of `SamplingParams`; empty for None.

    Raises:
        InvalidRequestError: the value is not a list of strings; a single string is not a list.
    """
    stops = () if stop_sequences is None else stop_sequences
    if not isinstance(stops, list | tuple) or any(not isinstance(stop, str) for stop in stops):
        raise InvalidRequestError("stop_sequences must be a list of strings")
    return tuple(stops)


def check_prompts(prompts: str | list[str]) -> list[str]:
    """Returns the prompts as a list.

    Raises:
        InvalidRequestError: a prompt is not text, or there is no prompt. The message counts prompts
            from 0.
    """
    listed = [prompts] if isinstance(prompts, str) else prompts
    if (
        not isinstance(listed, list | tuple)
        or not listed
        or any(not isinstance(prompt, str) for prompt in listed)
    ):
        raise InvalidRequestError("prompts must be a string or a non-empty list of strings")
    one = len(listed) == 1
    return [
        check_text(prompt, "the prompt" if one else f"prompt {i}")
        for i, prompt in enumerate(listed)
    ]
