"""Drawing tokens: the sampling engine, token in and token out. It knows no text.

Legend: R rows (sequences being extended), P prompts, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from actors.model import Base
from tg_tinker.errors import InvalidRequestError, NonFiniteError
from tg_tinker.sampling import SamplingParams


@dataclass(repr=False)
class Completion:
    """One completion in the making.

    Attributes:
        index: its place among all completions, prompt by prompt.
        prompt_index: which prompt it extends.
        token_ids: generated so far, the end-of-sequence token included.
        logprobs: log-probability of each under the model's own distribution, before penalties
            and temperature.
        finish_reason: None while it grows. The engine sets `length` and `eos`; whoever reads
            the text may set `stop` between steps, and the row leaves the batch.
    """

    index: int
    prompt_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class SamplingEngine(Protocol):
    """What `completion` needs of an engine; serving engines keep to it."""

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams
    ) -> Iterator[list[Completion]]:
        """Yields after each decode step the sequences that grew by one token."""


class LiveEngine:
    """Generates on the weights as they are, all rows in one left-padded batch."""

    def __init__(self, base: Base) -> None:
        self._base = base

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams
    ) -> Iterator[list[Completion]]:
        """See `SamplingEngine`.

        Raises:
            InvalidRequestError: a prompt and `max_tokens` exceed the context; nothing was drawn.
        """
        self._check_context(prompts, params)
        generator = torch.Generator(self._base.device).manual_seed(secrets.randbits(63))
        n = params.num_completions
        rows = [Completion(i, i // n) for i in range(n * len(prompts))]
        logits, batch = self._prefill(prompts, n)
        while rows:
            if logits.isnan().any():
                raise NonFiniteError("the model's output is not a number: load an earlier artifact")
            logprobs = torch.log_softmax(logits.float(), dim=-1)  # [R, V]
            scores = _penalised(logits.float(), rows, prompts, params)
            drawn = draw(scores, params, generator)  # [R]
            chosen = logprobs.gather(1, drawn[:, None])[:, 0].tolist()
            for row, token, logprob in zip(rows, drawn.tolist(), chosen, strict=True):
                self._extend(row, token, logprob, params)
            yield list(rows)
            keep = [i for i, row in enumerate(rows) if row.finish_reason is None]
            rows = [rows[i] for i in keep]
            if rows:
                logits = batch.advance(self._base.model, drawn, keep)

    def _extend(self, row: Completion, token: int, logprob: float, params: SamplingParams) -> None:
        row.token_ids.append(token)
        row.logprobs.append(logprob)
        if token in self._base.eos_ids:
            row.finish_reason = "eos"
        elif len(row.token_ids) >= params.max_tokens:
            row.finish_reason = "length"

    def _check_context(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        longest = max(map(len, prompts))
        if longest + params.max_tokens > self._base.context_length:
            raise InvalidRequestError(
                f"a prompt of {longest} tokens and max_tokens={params.max_tokens} exceed the"
                f" context of {self._base.context_length}: use at most"
                f" {max(0, self._base.context_length - longest)} max_tokens, or a shorter prompt"
            )

    def _prefill(self, prompts: Sequence[list[int]], copies: int) -> tuple[torch.Tensor, _Batch]:
        """Logits [R, V] after the prompts, each prompt computed once for all its rows."""
        device, width = self._base.device, max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        output = self._base.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        cache: Any = getattr(output, "past_key_values", None)
        if not hasattr(cache, "batch_select_indices"):
            raise InvalidRequestError(
                "this architecture keeps no key/value cache: it can be trained, not sampled; export"
                " the adapter and generate with transformers"
            )
        cache.batch_repeat_interleave(copies)
        mask = mask.repeat_interleave(copies, 0)
        return output.logits[:, -1].repeat_interleave(copies, 0), _Batch(cache, mask)


@dataclass(repr=False)
class _Batch:
    """Keys and values of all rows, and which positions are real: mask [R, tokens so far]."""

    cache: Any
    mask: torch.Tensor

    def advance(self, model: Any, drawn: torch.Tensor, keep: list[int]) -> torch.Tensor:
        """Logits [R', V] after one more token of the kept rows."""
        if len(keep) < len(drawn):
            index = torch.tensor(keep, device=drawn.device)
            self.cache.batch_select_indices(index)
            self.mask, drawn = self.mask[index], drawn[index]
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        output = model(
            input_ids=drawn[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def draw(scores: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """One token per row of scores [R, V]: int64 [R]; the most probable at temperature 0."""
    if params.temperature == 0:
        return scores.argmax(-1)
    # The largest score becomes 0, so that no temperature, however small, overflows.
    scores = (scores - scores.max(-1, keepdim=True).values) / max(params.temperature, 1e-30)
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        best = scores.topk(params.top_k)  # by index: equal scores must not add tokens
        scores = torch.full_like(scores, -torch.inf).scatter(1, best.indices, best.values)
    if params.top_p < 1:
        scores = _nucleus(scores, params.top_p)
    probabilities = torch.softmax(scores, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keeps the smallest set of most probable tokens whose probability reaches `top_p`."""
    ranked, order = scores.sort(descending=True)
    probabilities = torch.softmax(ranked, dim=-1)
    before = probabilities.cumsum(-1) - probabilities  # probability of all better tokens
    dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, before >= top_p)
    return scores.masked_fill(dropped, -torch.inf)


def _penalised(
    logits: torch.Tensor,
    rows: Sequence[Completion],
    prompts: Sequence[list[int]],
    params: SamplingParams,
) -> torch.Tensor:
    """Logits [R, V] after repetition, presence and frequency penalties."""
    logits = logits.clone()
    for i, row in enumerate(rows):
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted({*prompts[row.prompt_index], *row.token_ids}))
            score = logits[i, seen]
            factor = params.repetition_penalty
            logits[i, seen] = torch.where(score > 0, score / factor, score * factor)
        if row.token_ids and (params.presence_penalty or params.frequency_penalty):
            ids, counts = torch.unique(torch.tensor(row.token_ids), return_counts=True)
            penalty = params.presence_penalty + params.frequency_penalty * counts
            logits[i, ids] -= penalty.to(logits)
    return logits
