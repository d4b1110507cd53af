"""What goes in and out of the sampling engine: requests, tokens, its load; and whose turn it is.

Plain values without a model: the engine runs them, `text` makes them of prompts and texts of them.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field

from tg_tinker.errors import TGTinkerError
from tg_tinker.sampling import SamplingParams


@dataclass(frozen=True, repr=False)
class Token:
    """One more token of a completion, or the end of its request.

    Attributes:
        index: which completion of the request.
        logprob: under the model's own distribution, before penalties and temperature.
        top: the most probable tokens there, best first, as (token, logprob).
        prompt: with the first token of each completion and `prompt_logprobs`: the log-probability
            of each prompt token after those before it; NaN for the first.
        finish_reason: `length`, `eos`, `stop` (a stop token) or None while it grows.
        error: why the whole request ended; then nothing else is set.
    """

    index: int = 0
    token_id: int = -1
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    prompt: tuple[float, ...] | None = None
    finish_reason: str | None = None
    error: TGTinkerError | None = None


@dataclass(repr=False, eq=False)
class TokenRequest:
    """`params.num_completions` completions of one prompt.

    Attributes:
        deliver: called in the engine's thread with each `Token`; it must be quick.
        adapter: name of a resident LoRA adapter, or None for the base model.
        number, first: which prompt of its call, and the index of its first completion among those
            of that prompt: with the seed they fix all draws.
        owner: whose turns it shares: owners get slots by turns, whatever each has asked for.
        seed: of all its draws; drawn here when `params` has none.
        waited_s: from `submit` to a slot; set by the engine.
    """

    prompt: list[int]
    params: SamplingParams
    deliver: Callable[[Token], None]
    number: int = 0
    first: int = 0
    adapter: str | None = None
    owner: str = ""
    seed: int = field(init=False)
    waited_s: float = field(init=False, default=0.0)
    submitted_at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        given = self.params.seed
        self.seed = secrets.randbits(63) if given is None else given


@dataclass(frozen=True)
class Load:
    """How full an engine is: slots, requests that wait for some, resident adapters."""

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
    """A completion in its slot; while the prompt is read, the one that stands for all."""

    request: TokenRequest
    index: int
    slot: int
    read: int = 0  # prompt tokens in the slot
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)  # slots of the other completions

    @property
    def reading(self) -> bool:
        return self.read < len(self.request.prompt)

    @property
    def stored(self) -> int:
        """Tokens whose keys and values are in the slot."""
        return self.read + max(0, len(self.generated) - 1)


class Turns:
    """Requests that wait: those of an owner in their order, owners by turns."""

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
        """The next; its owner is the last now."""
        request = self.next
        self.remove(request)
        if request.owner in self._of:
            self._of.move_to_end(request.owner)
        return request

    def remove(self, request: TokenRequest) -> bool:
        """False if it does not wait."""
        waiting = self._of.get(request.owner, ())
        if request not in waiting:
            return False
        self._of[request.owner].remove(request)
        if not self._of[request.owner]:
            del self._of[request.owner]
        return True
