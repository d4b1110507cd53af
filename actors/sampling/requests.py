"""Defines the input and output of the sampling engine: requests, tokens and load; queues requests.

These are plain values without a model. The engine runs requests. `text` makes requests from
prompts, and text from tokens.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field

from actors.sampling.grammar import Grammar
from tg_tinker.errors import TGTinkerError
from tg_tinker.sampling import SamplingParams

Top = tuple[tuple[int, float], ...]
"""The most probable tokens at a place, best first, as (token, logprob)."""

SLOTS = 8
"""The default number of sequences that run at a time."""


@dataclass(frozen=True, repr=False)
class Token:
    """One more token of a completion, or the end of its request.

    Attributes:
        index: the number of the completion within the request.
        token_id: the id; -1 where a request scores its prompt and draws nothing.
        logprob: the log-probability of the token in nats, under the model's own distribution,
            before penalties and temperature.
        top: the most probable tokens at this position.
        prompt: the log-probability of each prompt token given the tokens before it; NaN for the
            first. It is set only with the first token of a completion, if `prompt_logprobs` is
            requested.
        prompt_top: the most probable tokens at each position of the prompt, none at the first. It
            is set with `prompt`, if `top_logprobs` is requested too.
        finish_reason: `length`, `eos`, `stop` (a stop token), or None while the completion grows.
        error: why the whole request ended. Then no other field is set.
    """

    index: int = 0
    token_id: int = -1
    logprob: float = 0.0
    top: Top = ()
    prompt: tuple[float, ...] | None = None
    prompt_top: tuple[Top, ...] | None = None
    finish_reason: str | None = None
    error: TGTinkerError | None = None


@dataclass(repr=False, eq=False)
class TokenRequest:
    """A request for `params.num_completions` completions of one prompt.

    Attributes:
        deliver: the function that the engine's thread calls with each `Token`; it must be quick.
        adapter: the name of a resident LoRA adapter, or None for the base model.
        number: the index of the prompt in its call.
        first: the index of the first completion of this request among those of the prompt. Seed,
            `number` and `first` determine all draws.
        owner: the name under which the request is scheduled. Owners get slots in turn, whatever
            the number of their requests.
        grammar: the empty text that every completion begins with, if `params` has a schema.
        seed: the seed of all draws of the request; random if `params` has none.
        waited_s: the seconds from `submit` to a slot; the engine sets it.
    """

    prompt: list[int]
    params: SamplingParams
    deliver: Callable[[Token], None]
    number: int = 0
    first: int = 0
    adapter: str | None = None
    owner: str = ""
    grammar: Grammar | None = None
    seed: int = field(init=False)
    waited_s: float = field(init=False, default=0.0)
    submitted_at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        given = self.params.seed
        self.seed = secrets.randbits(63) if given is None else given


@dataclass(frozen=True)
class Load:
    """The load of an engine: used and free slots, waiting requests, resident adapters."""

    running: int
    free: int
    waiting: int
    adapters: int
    adapter_bytes: int

    def __add__(self, other: Load) -> Load:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Load(*(mine + theirs for mine, theirs in pairs))


@dataclass(repr=False, eq=False)
class RunningSequence:
    """A completion in its slot. While the prompt is read, it represents all completions."""

    request: TokenRequest
    index: int
    slot: int
    read: int = 0  # prompt tokens in the slot
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[Top] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)  # slots of the other completions
    grammar: Grammar | None = field(init=False)

    def __post_init__(self) -> None:
        self.grammar = self.request.grammar and self.request.grammar.copy()

    @property
    def reading(self) -> bool:
        return self.read < len(self.request.prompt)

    @property
    def stored(self) -> int:
        """The number of tokens whose keys and values are in the slot."""
        return self.read + max(0, len(self.generated) - 1)


class Turns:
    """A queue of waiting requests: first in, first out for each owner; the owners take turns."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[TokenRequest]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[TokenRequest]:
        return (request for waiting in self._of.values() for request in waiting)

    @property
    def next(self) -> TokenRequest:
        return next(iter(self._of.values()))[0]

    def append(self, request: TokenRequest) -> None:
        self._of.setdefault(request.owner, deque()).append(request)

    def take(self) -> TokenRequest:
        """Removes and returns the next request, and moves its owner to the end."""
        request = self.next
        self.remove(request)
        if request.owner in self._of:
            self._of.move_to_end(request.owner)
        return request

    def remove(self, request: TokenRequest) -> bool:
        """Removes a request. Returns False if the request is not waiting."""
        waiting = self._of.get(request.owner, ())
        if request not in waiting:
            return False
        self._of[request.owner].remove(request)
        if not self._of[request.owner]:
            del self._of[request.owner]
        return True
