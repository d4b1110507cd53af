"""Makes completions JSON texts that match a schema: says which tokens may come next.

`llguidance` follows the schema, byte by byte. Its log-probabilities stay those of the model. The
texts have at most one space, or a new line and its indentation, between two parts, so that no
completion consists of spaces alone.

A schema comes from strangers. Its size and depth are bounded (`tg_tinker.sampling`); here the work
on it is bounded too: in the library by its limits, and in the engine's thread by a budget of time.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tg_tinker.data.decoding import token_bytes
from tg_tinker.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

START_S, TOKEN_S = 0.25, 0.005
"""The time of the engine's thread that a request may take for its schema, in seconds: at once, and
for each token of its completions. An ordinary schema takes a hundredth of it."""

_OPTIONS = {"lenient": False, "whitespace_pattern": r"( |\n {0,16})?"}

_LIMITS = {
    "max_items_in_row": 500, "initial_lexer_fuel": 200_000, "step_lexer_fuel": 50_000,
    "step_max_items": 5_000, "max_lexer_states": 30_000, "max_grammar_size": 50_000,
    "verbose_errors": False,
}  # fmt: skip

_MULTIPLES = (0.0001, 0.001, 0.01, 0.1, 1, 10, 100, 1000)
"""The values of `multipleOf` that are followed: the library has a state for each remainder of the
others, without a bound if several meet."""

_KEYWORDS = (
    "allOf", "anyOf", "contains", "dependentRequired", "dependentSchemas", "else", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "format", "if", "items", "maxContains", "maxItems",
    "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "not", "oneOf", "pattern", "patternProperties",
    "prefixItems", "properties", "propertyNames", "required", "then", "type", "uniqueItems",
)  # fmt: skip
"""The keywords that an error may name. Other words of an error could be words of the schema."""

_MISSING = (
    "this server cannot hold answers to a JSON schema: its operator can install"
    " 'tg-tinker[structured]' where it runs, and start it again"
)
_TOO_MUCH = "this schema takes too much work for each token: simplify its patterns and alternatives"


@dataclass
class _Spent:
    """The time of the engine's thread that all completions of a request have taken."""

    seconds: float = 0.0
    tokens: int = 0


class Grammar:
    """A JSON text that grows token by token, and the schema that it must match.

    Attributes:
        complete: whether the text is complete, and nothing may follow.
        error: why the schema cannot be followed any further; None while it can.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._spent = _Spent()
        self.complete = False
        self.error: InvalidRequestError | None = None

    def copy(self) -> Grammar:
        """Returns the same text, which then grows on its own. Both use up one budget of time."""
        other = Grammar(self._matcher.deep_copy())
        other._spent = self._spent
        return other

    def allowed(self, vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Returns for each token whether it may come next; None if `error` is set."""
        started = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._spent.seconds += time.thread_time() - started
        self._spent.tokens += 1
        found = np.zeros(vocab_size, dtype=np.bool_)
        known = np.unpackbits(bits, bitorder="little")[:vocab_size]
        found[: len(known)] = known
        if self._matcher.is_error() or not known.any():
            self.error = _refusal(self._matcher.get_error())
        elif self._spent.seconds > START_S + TOKEN_S * self._spent.tokens:
            self.error = InvalidRequestError(_TOO_MUCH, details={"parameter": "json_schema"})
        return None if self.error else found

    def push(self, token_id: int) -> None:
        """Appends a token that was allowed."""
        started = time.thread_time()
        self._matcher.consume_token(token_id)
        self._spent.seconds += time.thread_time() - started
        self.complete = self._matcher.is_stopped() and not self._matcher.is_error()


class Grammars:
    """The schemas of one model, whose tokenizer they share. Threads may compile at once.

    Args:
        vocab_size: the number of the model's logits.
        eos_ids: the tokens with which the model ends a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._known: LLTokenizer | None = None
        self._lock = threading.Lock()

    def prepare(self) -> LLTokenizer:
        """Returns the vocabulary for the library; makes it at the first call, in a second or more.

        Raises:
            InvalidRequestError: the library is not installed.
        """
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise InvalidRequestError(_MISSING, details={"parameter": "json_schema"}) from None
        with self._lock:
            if self._known is None:
                tokens = _Tokens(self._tokenizer, self._vocab_size, self._eos_ids)
                self._known = LLTokenizer(
                    TokenizerWrapper(tokens), n_vocab=self._vocab_size, eos_token=tokens.eos_ids
                )
            return self._known

    def compiled(self, schema: Mapping[str, Any]) -> Grammar:
        """Returns the empty text of a schema. It may take seconds.

        Raises:
            InvalidRequestError: the schema is wrong, cannot be followed, or takes too much work; or
                the library is not installed. The error repeats nothing of the schema.
        """
        vocabulary = self.prepare()
        from llguidance import LLMatcher, LLParserLimits

        if "x-guidance" in schema:  # It would override the options below.
            raise InvalidRequestError(
                "the schema has the key x-guidance, which this server does not follow: remove it",
                details={"parameter": "json_schema"},
            )
        _check_multiples(schema)
        limits = LLParserLimits(**_LIMITS)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
        except ValueError as error:
            raise _refusal(str(error)) from None
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        begun = Grammar(matcher.deep_copy())
        begun.allowed(self._vocab_size)
        if begun.error is not None:
            raise begun.error
        return Grammar(matcher)


class _Tokens:
    """A vocabulary in the form that the library reads."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [token_bytes(tokenizer, token_id) for token_id in range(vocab_size)]
        self.eos_ids = sorted(eos_ids) or [tokenizer.eos_token_id]
        self.eos_token_id, self.bos_token_id = self.eos_ids[0], tokenizer.bos_token_id
        added = tokenizer.added_tokens_decoder.items()
        # A token that ends the text is never a part of it, whatever it looks like.
        special = {token_id for token_id, token in added if token.special} | {*self.eos_ids}
        self.special_token_ids = sorted(special)
        self._ids = {
            data: token_id
            for token_id, data in enumerate(self.tokens)
            if data and token_id not in special
        }
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        """Returns the tokens of a text that must come: as the model would have written it."""
        ids = self._tokenizer(text.decode(errors="replace"), add_special_tokens=False)["input_ids"]
        if b"".join(self.tokens[token_id] for token_id in ids) == text:
            return list(ids)
        return self._greedily(text)  # Some tokenizers put a space before every text.

    def _greedily(self, text: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((n for n in sizes if text[at : at + n] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids


def _check_multiples(schema: Any) -> None:
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            step = one.get("multipleOf", 1)
            if isinstance(step, int | float) and step not in _MULTIPLES:
                raise InvalidRequestError(
                    "the schema has a multipleOf that cannot be followed: it must be a power of ten"
                    " from 0.0001 to 1000",
                    details={"parameter": "json_schema"},
                )
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one


def _refusal(problem: str) -> InvalidRequestError:
    """Returns the error for a schema that the library refuses, without the library's words."""
    words = {*re.findall(r"\w+", problem)}
    named = [keyword for keyword in _KEYWORDS if keyword in words]
    if re.search(r"regex|lexer", problem):
        named.append("pattern")
    about = f" ({', '.join(dict.fromkeys(named))})" if named else ""
    return InvalidRequestError(
        f"the schema is wrong or cannot be followed{about}: simplify it, and check the rest of the"
        " answer yourself",
        details={"parameter": "json_schema"},
    )
