"""Text over tokens: prompts in, `StreamChunk`s and `Sample`s out, on any `SamplingEngine`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from actors.generation import Completion, SamplingEngine
from tg_tinker.sampling import SamplingParams
from tg_tinker.text import TextStream, encode_prompt
from tg_tinker.types import Sample, SampleResult, StreamChunk


def stream_chunks(
    engine: SamplingEngine,
    tokenizer: Any,
    prompts: Sequence[str],
    params: SamplingParams,
    *,
    version: str = "",
    check_cancelled: Callable[[], None] = lambda: None,
) -> Iterator[StreamChunk]:
    """Chunks of all completions as they grow; `index` counts prompt by prompt.

    A chunk carries text that is certain: whole characters, and nothing that may still turn out
    to be part of a stop sequence. The last chunk of a completion has a `finish_reason`.
    """
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    count = len(prompts) * params.num_completions
    texts = [TextStream(tokenizer, params.stop_sequences) for _ in range(count)]
    sent = [0] * count  # tokens of each completion that went out in chunks
    for grown in engine.generate(ids, params):
        check_cancelled()
        for row in grown:
            text = _certain_text(row, texts[row.index])
            if text or row.finish_reason is not None:
                start, sent[row.index] = sent[row.index], len(row.token_ids)
                yield StreamChunk(
                    text=text,
                    index=row.index,
                    token_ids=row.token_ids[start:],
                    logprobs=row.logprobs[start:],
                    finish_reason=row.finish_reason,
                    weights_version=version,
                )


def _certain_text(row: Completion, stream: TextStream) -> str:
    """New text of a completion; a stop sequence found in it finishes the row."""
    text = stream.push(row.token_ids[-1])
    if row.finish_reason is not None:
        text += stream.flush()
    if stream.stopped:
        row.finish_reason = "stop"
    return text


def sample(
    engine: SamplingEngine,
    tokenizer: Any,
    prompts: Sequence[str],
    params: SamplingParams,
    *,
    version: str = "",
    check_cancelled: Callable[[], None] = lambda: None,
) -> SampleResult:
    """All completions of all prompts, in the order of the prompts."""
    started = time.perf_counter()
    chunks: list[list[StreamChunk]] = [[] for _ in range(len(prompts) * params.num_completions)]
    latency = [0.0] * len(chunks)
    for chunk in stream_chunks(
        engine, tokenizer, prompts, params, version=version, check_cancelled=check_cancelled
    ):
        chunks[chunk.index].append(chunk)
        latency[chunk.index] = 1e3 * (time.perf_counter() - started)
    samples = [
        _joined(prompts[i // params.num_completions], parts, latency[i])
        for i, parts in enumerate(chunks)
    ]
    return SampleResult(
        samples=samples,
        total_tokens=sum(s.num_tokens for s in samples),
        latency_ms=1e3 * (time.perf_counter() - started),
        weights_version=version,
    )


def _joined(prompt: str, parts: list[StreamChunk], latency_ms: float) -> Sample:
    token_ids = [token for part in parts for token in part.token_ids]
    return Sample(
        prompt=prompt,
        completion="".join(part.text for part in parts),
        num_tokens=len(token_ids),
        finish_reason=parts[-1].finish_reason or "length",
        latency_ms=latency_ms,
        token_ids=token_ids,
        logprobs=[logprob for part in parts for logprob in part.logprobs],
    )
