"""Draws one token from one row of logits.

The order is logit bias, penalties, temperature, top-k, top-p, min-p.
A draw applies the inverse of the distribution function to one uniform number. So a seeded request
gets the same tokens, whatever else the engine runs. Legend: V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch

from tg_tinker.sampling import SamplingParams

_LIKELY = 1024
"""The candidates that top-p tries first: sorting a whole vocabulary takes as long as a layer."""

_COLDEST = 1e-30


def uniform(seed: int, prompt: int, completion: int, step: int) -> float:
    """Returns a number in [0, 1), 53 bits of a hash, that depends on the arguments alone."""
    place = f"{seed}/{prompt}/{completion}/{step}".encode()
    return (int.from_bytes(hashlib.sha256(place).digest()[:8], "big") >> 11) * 2.0**-53


def penalized(
    logits: torch.Tensor, prompt: Sequence[int], generated: Sequence[int], params: SamplingParams
) -> torch.Tensor:
    """Returns logits [V] after the bias, and the repetition, frequency and presence penalties.

    Returns the same tensor if neither a bias nor a penalty applies.
    """
    if params.logit_bias:
        biased = torch.tensor([*params.logit_bias], device=logits.device)
        bias = torch.tensor([*params.logit_bias.values()], device=logits.device)
        logits = logits.index_add(0, biased, bias.to(logits))
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *generated}), device=logits.device)
        score, factor = logits[seen], params.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(score > 0, score / factor, score * factor))
    if generated and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(generated)
        ids = torch.tensor([*counts], device=logits.device)
        times = torch.tensor([*counts.values()], device=logits.device)
        penalty = params.presence_penalty + params.frequency_penalty * times
        logits = logits.index_add(0, ids, -penalty.to(logits))
    return logits


def draw(scores: torch.Tensor, params: SamplingParams, chance: float) -> int:
    """Returns the token of scores [V] at `chance` in [0, 1); the most probable at temperature 0."""
    if params.temperature == 0 or params.top_k == 1:
        return int(scores.argmax())
    # The largest score becomes 0, so that no temperature, however small, overflows.
    scores = (scores - scores.max()) / max(params.temperature, _COLDEST)
    if params.top_k is None and params.top_p == 1:
        weights = torch.softmax(scores.double(), 0)
        if params.min_p:
            weights = weights * (weights >= params.min_p * weights.max())
        return _at(weights, chance)
    if params.top_k is not None and params.top_k < len(scores):
        ranked, ids = scores.topk(params.top_k)
        weights = torch.softmax(ranked.double(), 0)
    else:
        weights, ids = _ranked(scores, params.top_p)
    before = weights.cumsum(0) - weights  # probability of all tokens that rank higher
    kept = int(((before < params.top_p) & (weights >= params.min_p * weights[0])).sum())
    return int(ids[_at(weights[:kept], chance)])


def _ranked(scores: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns probabilities and ids, most probable first, of enough tokens to reach `top_p`."""
    whole = torch.logsumexp(scores.double(), 0)
    for count in (min(_LIKELY, len(scores)), len(scores)):
        ranked, ids = scores.topk(count)
        weights = (ranked.double() - whole).exp()
        if weights.sum() >= top_p:
            break
    return weights, ids


def _at(weights: torch.Tensor, chance: float) -> int:
    """Returns the index where the running sum of float64 weights exceeds `chance` of the total."""
    sums = weights.cumsum(0)
    index = int(torch.searchsorted(sums, chance * sums[-1], right=True))
    # The minimum keeps rounding at the end from drawing a token of probability 0.
    return min(index, int(weights.nonzero()[-1]))
