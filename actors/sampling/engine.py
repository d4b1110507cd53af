"""The sampling engine: many requests at once on one base model, token in and token out.

    engine = SlotEngine(base)
    engine.submit(TokenRequest(prompt, params, deliver))
    while engine.step():
        pass

A step is one forward over a flat stream that holds one token of each sequence that is being
extended and pieces of the prompts that wait; so nobody waits for a batch to end, and a long
prompt delays the others by a piece at a time. It knows no text and has no lock: one thread calls.
Which token is drawn is up to `drawing`, whose weights a row uses to `adapters`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from actors.engine.model import Base, next_token_logits
from actors.engine.slots import Layout, Piece, Slots
from actors.sampling.adapters import AdapterBank
from actors.sampling.drawing import draw, penalised, uniform
from actors.sampling.requests import Load, RunningSequence, Token, TokenRequest, Turns
from tg_tinker.errors import (
    InternalError,
    InvalidRequestError,
    NonFiniteError,
    QueueFullError,
    TGTinkerError,
)
from tg_tinker.sampling import NOT_SAMPLED

SLOTS = 8
"""Sequences that run at a time, unless told otherwise."""

PROMPT_TOKENS = 64
"""Prompt tokens of a step beside sequences that run: bounds how long those wait for a token."""

PROMPT_TOKENS_ALONE = 512
"""The same while no sequence runs."""


class SlotEngine:
    """See the module.

    Attributes:
        adapters: those that requests may name.
    """

    def __init__(self, base: Base, slots: int = SLOTS) -> None:
        if not base.flat:
            raise InvalidRequestError(NOT_SAMPLED)
        self.adapters = AdapterBank(base.model)
        self._base = base
        self._slots = Slots(slots, base.device)
        self._free = list(range(slots))
        self._waiting = Turns()
        self._running: list[RunningSequence] = []

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
            self._running.append(RunningSequence(request, 0, slots[0], reserved=slots[1:]))

    def _next_pieces(self, beside_others: bool) -> list[tuple[RunningSequence, Piece]]:
        room = PROMPT_TOKENS if beside_others else PROMPT_TOKENS_ALONE
        pieces = []
        for sequence in self._running:
            size = min(room, len(sequence.request.prompt) - sequence.read)
            if size > 0:
                pieces.append((sequence, Piece(sequence.slot, sequence.read, size)))
                room -= size
        return pieces

    def _advance(
        self, extended: list[RunningSequence], pieces: list[tuple[RunningSequence, Piece]]
    ) -> None:
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

    def _fork(self, sequence: RunningSequence) -> list[RunningSequence]:
        """The other completions of a prompt that was just read: copies of its slot."""
        others = []
        for index, slot in enumerate(sequence.reserved, start=1):
            self._slots.copy(sequence.slot, slot, sequence.read)
            other = RunningSequence(sequence.request, index, slot, sequence.read)
            other.prompt_logprobs = sequence.prompt_logprobs
            others.append(other)
        sequence.reserved = []
        self._running += others
        return [sequence, *others]

    def _score_prompt(self, sequence: RunningSequence, piece: Piece, logits: torch.Tensor) -> None:
        """Adds the log-probabilities of the tokens that follow those of the piece."""
        if not sequence.request.params.prompt_logprobs:
            return
        following = sequence.request.prompt[piece.start + 1 : piece.stop + 1]
        ids = torch.tensor(following, device=logits.device).long()
        rows = torch.log_softmax(logits[: len(following)].float(), dim=-1)
        sequence.prompt_logprobs += rows.gather(1, ids[:, None])[:, 0].tolist()

    def _extend(self, ready: list[RunningSequence], logits: torch.Tensor) -> None:
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

    def _choose(self, sequence: RunningSequence, logits: torch.Tensor, best: int) -> int | None:
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
        self, sequence: RunningSequence, logprobs: torch.Tensor
    ) -> tuple[tuple[int, float], ...]:
        if not sequence.request.params.top_logprobs:
            return ()
        found = logprobs.topk(min(sequence.request.params.top_logprobs, len(logprobs)))
        return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def _deliver(
        self,
        sequence: RunningSequence,
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

    def _end(self, sequence: RunningSequence) -> None:
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
