"""Lists every field of OpenAI's requests, and what the server does with each.

A server that ignores a field would answer another request than the one it received. So a field is
defined in `openai` and has an effect, or is accepted only with values that ask for nothing, or is
refused by name. Many clients always send fields that ask for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What the server does with a field.

    Attributes:
        nothing: the values that ask for nothing and are ignored. A type stands for all its values.
        advice: what to do instead of sending any other value; empty for a field with an effect.
    """

    nothing: tuple[Any, ...] = ()
    advice: str = ""

    @property
    def has_effect(self) -> bool:
        return not self.advice


EFFECT = Rule()
_LABEL = Rule((str,), "send a text, or leave it out")
_NO_TOOLS = "this server calls no tools and functions: describe them in a message, or leave it out"

FIELDS = {
    "model": EFFECT,
    "prompt": EFFECT,
    "messages": EFFECT,
    "messages.role": EFFECT,
    "messages.content": EFFECT,
    "messages.content.type": EFFECT,
    "messages.content.text": EFFECT,
    "max_tokens": EFFECT,
    "max_completion_tokens": EFFECT,
    "n": EFFECT,
    "temperature": EFFECT,
    "top_p": EFFECT,
    "top_k": EFFECT,
    "min_p": EFFECT,
    "stop": EFFECT,
    "stop_token_ids": EFFECT,
    "seed": Rule(nothing=(-1,)),  # Means a random seed, as without the field.
    "presence_penalty": EFFECT,
    "frequency_penalty": EFFECT,
    "repetition_penalty": EFFECT,
    "logprobs": Rule(nothing=(False,)),
    "top_logprobs": EFFECT,
    "echo": EFFECT,
    "stream": EFFECT,
    "stream_options": EFFECT,
    "stream_options.include_usage": EFFECT,
    "stream_options.include_obfuscation": Rule(
        (False,), "events here have no padding: send false, or leave it out"
    ),
    "best_of": Rule(nothing=(1,)),
    "logit_bias": EFFECT,
    "response_format": Rule(nothing=({"type": "text"},)),
    "response_format.type": EFFECT,
    "response_format.json_schema": EFFECT,
    "response_format.json_schema.schema": EFFECT,
    "response_format.json_schema.name": _LABEL,
    "response_format.json_schema.description": _LABEL,
    "response_format.json_schema.strict": Rule((bool,), "send true: a schema is always followed"),
    "suffix": Rule(("",), "write prompt and suffix into the prompt as the model was trained to"),
    "tools": Rule(([],), _NO_TOOLS),
    "tool_choice": Rule(("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": Rule((bool,), "send true or false, or leave it out"),
    "functions": Rule(([],), _NO_TOOLS),
    "function_call": Rule(("none", "auto"), _NO_TOOLS),
    "messages.tool_calls": Rule(([],), _NO_TOOLS),
    "messages.tool_call_id": Rule((), _NO_TOOLS),
    "messages.function_call": Rule((), _NO_TOOLS),
    "modalities": Rule((["text"],), 'answers here are text: send ["text"], or leave it out'),
    "audio": Rule((), "answers here are text: leave it out"),
    "messages.audio": Rule((), "messages here are text: send the words in content"),
    "messages.refusal": Rule(("",), "send the refusal as content"),
    "messages.annotations": Rule(([],), "send [], or leave it out"),
    "messages.type": Rule(("text",), 'send "text", or leave it out'),
    "messages.name": _LABEL,
    "messages.content.prompt_cache_breakpoint": Rule((dict,), "send an object, or leave it out"),
    "user": _LABEL,
    "safety_identifier": _LABEL,
    "metadata": Rule((dict,), "send an object, or leave it out"),
    "store": Rule((bool,), "nothing is stored here: send false, or leave it out"),
    "prompt_cache_key": _LABEL,
    "prompt_cache_retention": _LABEL,
    "prompt_cache_options": Rule((dict,), "send an object, or leave it out"),
    "service_tier": Rule(
        ("auto", "default"), 'requests here have one tier: send "auto", or leave it out'
    ),
    "reasoning_effort": Rule((), "the model's chat template decides whether it reasons"),
    "verbosity": Rule(("medium",), "ask for a short or long answer in a message"),
    "prediction": Rule((), "answers here are not predicted: leave it out"),
    "moderation": Rule((), "this server moderates nothing: leave it out"),
    "web_search_options": Rule((), "this server searches nothing: put what the model needs to know"
                               " into a message"),
}  # fmt: skip
"""The path of a field in a request -> its rule. Both routes share the rules."""


def asks_for_nothing(field: str, value: Any) -> bool:
    """Returns whether a field of this path may be dropped, because its value has no effect."""
    return any(_matches(value, one) for one in FIELDS.get(field, EFFECT).nothing)


def advice(path: tuple[int | str, ...]) -> str:
    """Returns what to do instead of sending a refused field; empty for a field that is not known.

    Args:
        path: the path of the field in a body, with the places of items in lists.
    """
    names = [part for part in path if isinstance(part, str) and part.isidentifier()]
    return FIELDS.get(".".join(names), EFFECT).advice


def _matches(value: Any, one: Any) -> bool:
    """Returns whether a value is this one, or of this type. True is not 1 here."""
    if isinstance(one, type):
        return type(value) is one
    return type(value) is type(one) and bool(value == one)
