"""Parameters of text generation, checked before a prompt leaves the client."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError

NOT_SAMPLED = (
    "this architecture can be trained, not sampled: its attention cannot be told which tokens"
    " belong together. Export the adapter and generate with transformers"
)
"""Said by the client before anything is sent, and by the engine."""


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. Order: penalties, temperature, top-k, top-p.

    Attributes:
        max_tokens: tokens to generate at most, >= 1.
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1]; the smallest set of tokens with at least this probability.
        top_k: None or >= 1; the k most probable tokens.
        stop_sequences: texts that end a completion; they are not part of it. They are matched in
            the visible text, which special tokens are not part of.
        num_completions: completions per prompt, >= 1.
        repetition_penalty: in [0.01, 100]; divides positive and multiplies negative logits of
            tokens in prompt or completion (CTRL, arXiv:1909.05858).
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted from the logits of tokens
            generated so far, once, or once per occurrence (OpenAI's definition).
        seed: in [0, 2^63); makes the draws those of any other call with the same prompts, weights
            and seed, whatever runs beside it. None draws a new one.
        stop_token_ids: tokens that end a completion; they are its last.
        top_logprobs: in [0, 20]; alternatives to report at each token.
        prompt_logprobs: whether to score the prompt too.
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

    def __post_init__(self) -> None:
        top_k = 1 if self.top_k is None else self.top_k
        seed = 0 if self.seed is None else self.seed
        whole = (("max_tokens", self.max_tokens), ("top_k", top_k), ("seed", seed),
                 ("num_completions", self.num_completions), ("top_logprobs", self.top_logprobs),
                 *(("stop_token_ids", token) for token in self.stop_token_ids))  # fmt: skip
        for name, number in whole:
            if not isinstance(number, int) or abs(number) >= 2**63:
                raise InvalidRequestError(f"{name} must be a whole number of 64 bits")
        for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int | float) or abs(value) > 1e300:
                raise InvalidRequestError(f"{name} must be a number")
        bounds = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, ">= 1"),
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
        )  # fmt: skip
        for name, value, holds, bound in bounds:
            if not (holds and math.isfinite(value)):
                raise InvalidRequestError(
                    f"{name}={value} is out of range: it must be {bound}",
                    details={"parameter": name},
                )
        if any(not stop for stop in self.stop_sequences):
            raise InvalidRequestError("stop_sequences holds an empty string: leave it out")


def as_stops(stop_sequences: list[str] | None) -> tuple[str, ...]:
    """Stop sequences as `SamplingParams` holds them; a bare string is not a list of letters."""
    stops = () if stop_sequences is None else stop_sequences
    if not isinstance(stops, list | tuple) or any(not isinstance(stop, str) for stop in stops):
        raise InvalidRequestError("stop_sequences must be a list of strings")
    return tuple(stops)


def check_prompts(prompts: str | list[str]) -> list[str]:
    """The prompts as a list; refuses anything that is not text."""
    listed = [prompts] if isinstance(prompts, str) else prompts
    if (
        not isinstance(listed, list | tuple)
        or not listed
        or any(not isinstance(prompt, str) for prompt in listed)
    ):
        raise InvalidRequestError("prompts must be a string or a non-empty list of strings")
    try:
        "".join(listed).encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("a prompt has a lone surrogate: it is no text") from None
    return list(listed)
