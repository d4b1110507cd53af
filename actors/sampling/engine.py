"""Runs the sampling engine: many requests at once on one base model, token in and token out.

    engine = SlotEngine(base)
    engine.submit(TokenRequest(prompt, params, deliver))
    while engine.step():
        pass

A step is one forward pass over a flat stream. The stream holds one token of each sequence that is
being extended, and pieces of the prompts that are still being read. So no request waits for a batch
to end, and a long prompt delays the others by one piece at a time (or by one pass of at most
`WHOLE_PROMPT` tokens, where the model cannot read pieces). The engine processes no text and
has no lock, so only one thread may call it. `drawing` draws tokens; `adapters` selects the weights
of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from actors.engine.model import Base, next_token_logits
from actors.engine.slots import Piece
from actors.sampling.adapters import AdapterBank
from actors.sampling.drawing import draw, penalized, uniform
from actors.sampling.grammar import Grammar
from actors.sampling.requests import SLOTS, Load, RunningSequence, Token, TokenRequest, Top, Turns
from tg_tinker.errors import (
    InternalError,
    InvalidRequestError,
    NonFiniteError,
    QueueFullError,
    TGTinkerError,
)

PROMPT_TOKENS = 64
"""The prompt tokens of a step while sequences run, which bounds their wait for the next token."""

PROMPT_TOKENS_ALONE = 512
"""The prompt tokens of a step while no sequence runs."""

WHOLE_PROMPT = 4096
"""The maximum prompt tokens of a model that must read each prompt in one pass: all others wait."""

_NOT_A_NUMBER = "the model's output is not a number: load an earlier artifact"


class SlotEngine:
    """An engine with continuous batching, as the module describes.

    Attributes:
        adapters: the adapters that requests may name.
    """

    def __init__(self, base: Base, slots: int = SLOTS) -> None:
        self._slots = base.sequences(slots)
        self.adapters = AdapterBank(base.model)
        self._base = base
        self._free = list(range(slots))
        self._waiting = Turns()
        self._running: list[RunningSequence] = []

    def submit(self, request: TokenRequest) -> None:
        """Queues a request.

        Raises:
            InvalidRequestError: if the request can never run. Nothing was queued.
            NotFoundError: if its adapter is not resident. Nothing was queued.
        """
        prompt, params = request.prompt, request.params
        context, vocab = self._base.context_length, self._base.vocab_size
        if len(prompt) + params.max_tokens > context:
            raise InvalidRequestError(
                f"a prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} exceed the"
                f" context of {context} tokens: use at most {max(0, context - len(prompt))}"
                " max_tokens, or a shorter prompt"
            )
        if not prompt or not all(0 <= token < vocab for token in prompt):
            raise InvalidRequestError(
                f"the prompt is empty or has a token outside [0, {vocab}): pass at least one token,"
                " each within these bounds"
            )
        if params.logit_bias and max(params.logit_bias) >= vocab:
            raise InvalidRequestError(
                f"logit_bias has a token outside [0, {vocab}): pass the ids of this model's tokens",
                details={"parameter": "logit_bias"},
            )
        if self._slots.whole_prompts and len(prompt) > WHOLE_PROMPT:
            raise InvalidRequestError(
                f"this model reads a prompt in one pass, of at most {WHOLE_PROMPT} tokens, and the"
                f" prompt has {len(prompt)}: shorten it"
            )
        if params.num_completions > self._slots.count:
            raise InvalidRequestError(
                f"{params.num_completions} completions do not fit into {self._slots.count} slots:"
                " ask for fewer completions"
            )
        self.adapters.pin(request.adapter)  # now, so that it is not dropped while this waits
        request.submitted_at = time.monotonic()
        self._waiting.append(request)

    def submit_all(self, requests: Sequence[TokenRequest]) -> None:
        """Queues all requests, or none if one is refused."""
        try:
            for request in requests:
                self.submit(request)
        except TGTinkerError:
            for request in requests:
                self.cancel(request)
            raise

    def cancel(self, request: TokenRequest, index: int | None = None) -> None:
        """Ends a request before the next step, or only its completion `index`, if that has begun.

        The engine delivers nothing more for it. The call is safe for a request that has ended.
        """
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
        """Ends every running and waiting request with an error. Safe if the device has failed."""
        requests = dict.fromkeys([*(s.request for s in self._running), *self._waiting])
        self._start_anew()
        self._waiting = Turns()
        for request in requests:
            request.deliver(Token(error=InternalError(problem)))

    def step(self) -> bool:
        """Runs one forward pass and draws one token for every sequence that is ready.

        Returns False if there was nothing to do. A request whose outputs are not numbers ends with
        an error. If the forward pass itself fails, all running requests end with an error, and the
        engine continues with empty slots.
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
        """Starts waiting requests while slots are free.

        A request gets all its slots at once. No request overtakes the next one in the queue.
        """
        while self._waiting and self._waiting.next.params.num_completions <= len(self._free):
            request = self._waiting.take()
            try:
                self._slots.reserve(len(request.prompt) + request.params.max_tokens)
            except (MemoryError, RuntimeError):  # affects this request alone
                self.adapters.release(request.adapter)
                problem = "there is no memory for a sequence this long: ask for fewer tokens"
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
            left = len(sequence.request.prompt) - sequence.read
            if left and room > 0:
                size = left if self._slots.whole_prompts else min(room, left)
                pieces.append((sequence, Piece(sequence.slot, sequence.read, size)))
                room -= size
        return pieces

    def _advance(
        self, extended: list[RunningSequence], pieces: list[tuple[RunningSequence, Piece]]
    ) -> None:
        """Runs the forward pass, then draws a token for each sequence with a fully read prompt."""
        layout = self._slots.layout(
            [(s.slot, s.stored) for s in extended],
            [piece for _, piece in pieces],
            self.adapters.alone,
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
            if not sequence.reading and sequence.request.params.max_tokens == 0:
                self._deliver_scores(sequence)
            elif not sequence.reading:
                ready = ready + (forked := self._fork(sequence))
                logits.append(found[-1:].expand(len(forked), -1))
        if ready:
            self._extend(ready, torch.cat(logits))

    def _fork(self, sequence: RunningSequence) -> list[RunningSequence]:
        """Starts the other completions of a fully read prompt as copies of its slot.

        Returns all completions of the prompt.
        """
        others = []
        for index, slot in enumerate(sequence.reserved, start=1):
            self._slots.copy(sequence.slot, slot, sequence.read)
            other = RunningSequence(sequence.request, index, slot, sequence.read)
            other.prompt_logprobs = sequence.prompt_logprobs
            other.prompt_top = sequence.prompt_top
            others.append(other)
        sequence.reserved = []
        self._running += others
        return [sequence, *others]

    def _score_prompt(self, sequence: RunningSequence, piece: Piece, logits: torch.Tensor) -> None:
        """Records the log-probability of the prompt token after each token of the piece.

        The alternatives come from the same numbers, so that a token that is the most probable one
        has exactly the log-probability of the first alternative.

        Args:
            logits: [size of the piece, V].
        """
        if not sequence.request.params.prompt_logprobs:
            return
        following = sequence.request.prompt[piece.start + 1 : piece.stop + 1]
        ids = torch.tensor(following, device=logits.device).long()
        rows = torch.log_softmax(logits[: len(following)].float(), dim=-1)
        sequence.prompt_logprobs += rows.gather(1, ids[:, None])[:, 0].tolist()
        sequence.prompt_top += _most_probable(rows, sequence.request.params.top_logprobs)

    def _extend(self, ready: list[RunningSequence], logits: torch.Tensor) -> None:
        """Draws and delivers a token for each of these sequences, from its row of logits [R, V]."""
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
                continue  # an earlier completion of the same request has ended it
            if not usable[row]:
                problem = sequence.grammar.error if sequence.grammar else None
                self._refuse(sequence.request, problem or NonFiniteError(_NOT_A_NUMBER))
                continue
            wanted = sequence.request.params.top_logprobs
            top = _most_probable(logprobs[row : row + 1], wanted)[0] if wanted else ()
            self._deliver(sequence, drawn[row], chosen[row], top)

    def _choose(self, sequence: RunningSequence, logits: torch.Tensor, best: int) -> int | None:
        """Returns a token, or None if the request's own parameters leave no token to draw."""
        request, params = sequence.request, sequence.request.params
        scores = penalized(logits, request.prompt, sequence.generated, params)
        if sequence.grammar is not None:
            allowed = sequence.grammar.allowed(len(scores))
            if allowed is None:
                return None
            scores = scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -math.inf)
        if scores is logits and params.temperature == 0:
            return best
        if not torch.isfinite(scores.max()):
            return None
        place = request.number, request.first + sequence.index, len(sequence.generated)
        return draw(scores, params, uniform(request.seed, *place))

    def _deliver(self, sequence: RunningSequence, token_id: int, logprob: float, top: Top) -> None:
        params = sequence.request.params
        sequence.generated.append(token_id)
        reason = None
        if token_id in params.stop_token_ids:
            reason = "stop"
        elif token_id in self._base.eos_ids:
            reason = "eos"
        elif _completes(sequence.grammar, token_id):
            reason = "stop"
        elif len(sequence.generated) == params.max_tokens:
            reason = "length"
        first = len(sequence.generated) == 1
        prompt, prompt_top = _scores(sequence) if first else (None, None)
        if reason is not None:
            self._end(sequence)
        token = Token(sequence.index, token_id, logprob, top, prompt, prompt_top, reason)
        sequence.request.deliver(token)

    def _deliver_scores(self, sequence: RunningSequence) -> None:
        """Ends a request that draws nothing, once its prompt is read."""
        request = sequence.request
        if any(map(math.isnan, sequence.prompt_logprobs)):
            self._refuse(request, NonFiniteError(_NOT_A_NUMBER))
            return
        prompt, prompt_top = _scores(sequence)
        self._end(sequence)
        for index in range(request.params.num_completions):
            request.deliver(
                Token(index, prompt=prompt, prompt_top=prompt_top, finish_reason="length")
            )

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
        """Ends all running requests with an error."""
        requests = dict.fromkeys(sequence.request for sequence in self._running)
        self._start_anew()
        for request in requests:
            request.deliver(Token(error=InternalError(problem)))

    def _start_anew(self) -> None:
        """Stops everything that runs and creates new slots.

        The old slots are not cleared, because they may be half-written and could cause the same
        failure again.
        """
        for request in dict.fromkeys(sequence.request for sequence in self._running):
            self.adapters.release(request.adapter)
        self._running = []
        self._slots = self._base.sequences(self._slots.count)
        self._free = list(range(self._slots.count))


def _completes(grammar: Grammar | None, token_id: int) -> bool:
    """Appends a token to the text that follows a schema, if any; returns whether it is complete."""
    if grammar is not None:
        grammar.push(token_id)
    return grammar is not None and grammar.complete


def _most_probable(logprobs: torch.Tensor, count: int) -> list[Top]:
    """Returns the `count` most probable tokens of each row of log-probabilities [R, V]."""
    if not count:
        return []
    found = logprobs.topk(min(count, logprobs.shape[1]))
    rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [tuple(zip(tokens, values, strict=True)) for tokens, values in rows]


def _scores(sequence: RunningSequence) -> tuple[tuple[float, ...] | None, tuple[Top, ...] | None]:
    """Returns `Token.prompt` and `Token.prompt_top`, as the request asks for them."""
    params = sequence.request.params
    if not params.prompt_logprobs:
        return None, None
    top = ((), *sequence.prompt_top) if params.top_logprobs else None
    return (math.nan, *sequence.prompt_logprobs), top
