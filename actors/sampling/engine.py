"""The sampling engine: many requests at once on one base model, token in and token out.

    engine = SlotEngine(base)
    engine.submit(TokenRequest(prompt, params, deliver))
    while engine.step():
        pass

A step is one forward over a flat stream that holds one token of each sequence that is being
extended and pieces of the prompts that wait; so nobody waits for a batch to end, and a long
prompt delays the others by a piece at a time. It knows no text and has no lock: one thread calls.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field

import torch

from actors.engine.model import Base, next_token_logits
from actors.engine.slots import Layout, Piece, Slots
from actors.sampling.adapters import AdapterBank
from actors.sampling.drawing import draw, penalised, uniform
from tg_tinker.errors import (
    InternalError,
    InvalidRequestError,
    NonFiniteError,
    QueueFullError,
    TGTinkerError,
)
from tg_tinker.sampling import NOT_SAMPLED, SamplingParams

SLOTS = 8
"""Sequences that run at a time, unless told otherwise."""

PROMPT_TOKENS = 64
"""Prompt tokens of a step beside sequences that run: bounds how long those wait for a token."""

PROMPT_TOKENS_ALONE = 512
"""The same while no sequence runs."""


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
class _Sequence:
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
    """Requests that wait: those of an owner in their order, owners one after the other."""

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


class SlotEngine:
    """See the module."""

    def __init__(self, base: Base, slots: int = SLOTS) -> None:
        if not base.flat:
            raise InvalidRequestError(NOT_SAMPLED)
        self.adapters = AdapterBank(base.model)
        self._base = base
        self._slots = Slots(slots, base.device)
        self._free = list(range(slots))
        self._waiting = Turns()
        self._running: list[_Sequence] = []

    def submit(self, request: TokenRequest) -> None:
        """Queues a request.

        Raises:
            InvalidRequestError: it can never run; nothing was queued.
            NotFoundError: its adapter is not resident.
        """
        prompt, params = request.prompt, request.params
        context, vocab = self._base.context_length, self._base.vocab_size
        if len(prompt) + params.max_tokens > context:
            raise InvalidRequestError(
                f"a prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} exceed the"
                f" context of {context}: use at most {max(0, context - len(prompt))} max_tokens, or"
                " a shorter prompt"
            )
        if not prompt or not all(0 <= token < vocab for token in prompt):
            raise InvalidRequestError(f"a prompt needs tokens, each in [0, {vocab})")
        if params.num_completions > self._slots.count:
            raise InvalidRequestError(
                f"{params.num_completions} completions do not fit into {self._slots.count} slots"
            )
        self.adapters.pin(request.adapter)  # from now on, lest it leave while this waits
        request.submitted_at = time.monotonic()
        self._waiting.append(request)

    def submit_all(self, requests: Sequence[TokenRequest]) -> None:
        """All of them, or none when one is refused."""
        try:
            for request in requests:
                self.submit(request)
        except TGTinkerError:
            for request in requests:
                self.cancel(request)
            raise

    def cancel(self, request: TokenRequest, index: int | None = None) -> None:
        """Ends a request, or a completion of it that has begun, before the next step; nothing
        more is delivered. Safe for one that has ended."""
        if index is None and self._waiting.remove(request):
            self.adapters.release(request.adapter)
        for sequence in [*self._running]:
            chosen = index is None or (index == sequence.index and not sequence.reading)
            if sequence.request is request and chosen:
                self._end(sequence)

    @property
    def idle(self) -> bool:
        return not (self._running or self._waiting)

    @property
    def load(self) -> Load:
        free = len(self._free)
        return Load(self._slots.count - free, free, len(self._waiting), *self.adapters.resident)

    def end_all(self, problem: str) -> None:
        """Ends everything that runs or waits, with an error; safe when the device is dead."""
        requests = dict.fromkeys([*(s.request for s in self._running), *self._waiting])
        self._start_anew()
        self._waiting = Turns()
        for request in requests:
            request.deliver(Token(error=InternalError(problem)))

    def step(self) -> bool:
        """One forward and one token for every sequence that is ready; False if nothing was left.

        A request whose outputs are not numbers ends with an error. When the forward itself
        fails, all that run do, and the engine goes on with empty slots.
        """
        self._admit()
        extended = sorted((s for s in self._running if not s.reading), key=lambda s: s.slot)
        pieces = self._next_pieces(bool(extended))
        if not extended and not pieces:
            return False
        try:
            with torch.inference_mode():
                self._advance(extended, pieces)
        except Exception as error:
            self._fail(f"sampling failed ({type(error).__name__}): repeat the request")
        return True

    # --- inside ------------------------------------------------------------------------------

    def _admit(self) -> None:
        """A request gets all its slots at once; none overtakes the one whose turn it is."""
        while self._waiting and self._waiting.next.params.num_completions <= len(self._free):
            request = self._waiting.take()
            try:
                self._slots.reserve(len(request.prompt) + request.params.max_tokens)
            except (MemoryError, RuntimeError):  # of this request alone
                self.adapters.release(request.adapter)
                problem = "there is no memory for a sequence of this length: ask for fewer tokens"
                request.deliver(Token(error=QueueFullError(problem)))
                continue
            request.waited_s = time.monotonic() - request.submitted_at
            self._free.sort()
            count = request.params.num_completions
            slots, self._free = self._free[:count], self._free[count:]
            self._running.append(_Sequence(request, 0, slots[0], reserved=slots[1:]))

    def _next_pieces(self, beside_others: bool) -> list[tuple[_Sequence, Piece]]:
        room = PROMPT_TOKENS if beside_others else PROMPT_TOKENS_ALONE
        pieces = []
        for sequence in self._running:
            size = min(room, len(sequence.request.prompt) - sequence.read)
            if size > 0:
                pieces.append((sequence, Piece(sequence.slot, sequence.read, size)))
                room -= size
        return pieces

    def _advance(self, extended: list[_Sequence], pieces: list[tuple[_Sequence, Piece]]) -> None:
        """The forward, then a token for each extended sequence and each prompt that is read."""
        layout = Layout(
            self._slots, [(s.slot, s.stored) for s in extended], [piece for _, piece in pieces]
        )
        tokens = [s.generated[-1] for s in extended]
        wanted = list(range(len(extended)))  # tokens of the stream whose logits are needed
        for sequence, piece in pieces:
            last = len(tokens) + piece.size - 1
            scored = sequence.request.params.prompt_logprobs
            wanted += range(len(tokens), last + 1) if scored else [last]
            tokens += sequence.request.prompt[piece.start : piece.stop]
        with self.adapters.routed(
            [self.adapters.index(s.request.adapter) for s in extended],
            [(piece.size, self.adapters.index(s.request.adapter)) for s, piece in pieces],
        ):
            rows = next_token_logits(self._base, tokens, layout, wanted)  # [len(wanted), V]
        ready, logits = extended, [rows[: len(extended)]]
        at = len(extended)
        for sequence, piece in pieces:
            count = piece.size if sequence.request.params.prompt_logprobs else 1
            found, at = rows[at : at + count], at + count
            sequence.read = piece.stop
            self._score_prompt(sequence, piece, found)
            if not sequence.reading:
                ready = ready + (forked := self._fork(sequence))
                logits.append(found[-1:].expand(len(forked), -1))
        if ready:
            self._extend(ready, torch.cat(logits))

    def _fork(self, sequence: _Sequence) -> list[_Sequence]:
        """The other completions of a prompt that was just read: copies of its slot."""
        others = []
        for index, slot in enumerate(sequence.reserved, start=1):
            self._slots.copy(sequence.slot, slot, sequence.read)
            other = _Sequence(sequence.request, index, slot, sequence.read)
            other.prompt_logprobs = sequence.prompt_logprobs
            others.append(other)
        sequence.reserved = []
        self._running += others
        return [sequence, *others]

    def _score_prompt(self, sequence: _Sequence, piece: Piece, logits: torch.Tensor) -> None:
        """Adds the log-probabilities of the tokens that follow those of the piece."""
        if not sequence.request.params.prompt_logprobs:
            return
        following = sequence.request.prompt[piece.start + 1 : piece.stop + 1]
        ids = torch.tensor(following, device=logits.device).long()
        rows = torch.log_softmax(logits[: len(following)].float(), dim=-1)
        sequence.prompt_logprobs += rows.gather(1, ids[:, None])[:, 0].tolist()

    def _extend(self, ready: list[_Sequence], logits: torch.Tensor) -> None:
        """One token for each of these sequences from its row of logits [R, V]."""
        logits = logits.float()
        logprobs = torch.log_softmax(logits, dim=-1)
        best = logits.argmax(-1).tolist()
        usable = torch.isfinite(logprobs.max(-1).values).tolist()
        drawn = []
        for row, sequence in enumerate(ready):
            token = self._choose(sequence, logits[row], best[row]) if usable[row] else None
            usable[row] = token is not None
            drawn.append(token or 0)
        index = torch.tensor(drawn, device=logits.device)[:, None]
        chosen = logprobs.gather(1, index)[:, 0].tolist()
        for row, sequence in enumerate(ready):
            if sequence not in self._running:
                continue  # an earlier completion of its request ended it
            if not usable[row]:
                problem = "the model's output is not a number: load an earlier artifact"
                self._refuse(sequence.request, NonFiniteError(problem))
                continue
            top = self._most_probable(sequence, logprobs[row])
            self._deliver(sequence, drawn[row], chosen[row], top)

    def _choose(self, sequence: _Sequence, logits: torch.Tensor, best: int) -> int | None:
        """A token, or None where this request's own parameters leave none to draw."""
        request, params = sequence.request, sequence.request.params
        scores = penalised(logits, request.prompt, sequence.generated, params)
        if scores is logits and params.temperature == 0:
            return best
        if not torch.isfinite(scores.max()):
            return None
        place = request.number, request.first + sequence.index, len(sequence.generated)
        return draw(scores, params, uniform(request.seed, *place))

    def _most_probable(
        self, sequence: _Sequence, logprobs: torch.Tensor
    ) -> tuple[tuple[int, float], ...]:
        if not sequence.request.params.top_logprobs:
            return ()
        found = logprobs.topk(min(sequence.request.params.top_logprobs, len(logprobs)))
        return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def _deliver(
        self,
        sequence: _Sequence,
        token_id: int,
        logprob: float,
        top: tuple[tuple[int, float], ...],
    ) -> None:
        params = sequence.request.params
        sequence.generated.append(token_id)
        reason = None
        if token_id in params.stop_token_ids:
            reason = "stop"
        elif token_id in self._base.eos_ids:
            reason = "eos"
        elif len(sequence.generated) == params.max_tokens:
            reason = "length"
        first = params.prompt_logprobs and len(sequence.generated) == 1
        prompt = (float("nan"), *sequence.prompt_logprobs) if first else None
        if reason is not None:
            self._end(sequence)
        token = Token(sequence.index, token_id, logprob, top, prompt, reason)
        sequence.request.deliver(token)

    def _end(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        self._slots.clear(sequence.slot, sequence.stored + 1)
        self._free += [sequence.slot, *sequence.reserved]
        if all(other.request is not sequence.request for other in self._running):
            self.adapters.release(sequence.request.adapter)

    def _refuse(self, request: TokenRequest, error: TGTinkerError) -> None:
        self.cancel(request)
        request.deliver(Token(error=error))

    def _fail(self, problem: str) -> None:
        """Ends all that run."""
        requests = dict.fromkeys(sequence.request for sequence in self._running)
        self._start_anew()
        for request in requests:
            request.deliver(Token(error=InternalError(problem)))

    def _start_anew(self) -> None:
        """Nothing runs. The slots are made anew, not cleared: they may be half-written, and
        whatever failed would fail again in them."""
        for request in dict.fromkeys(sequence.request for sequence in self._running):
            self.adapters.release(request.adapter)
        self._running = []
        self._slots = Slots(self._slots.count, self._base.device)
        self._free = list(range(self._slots.count))
