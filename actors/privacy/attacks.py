"""Attacks a private step: what one unit moves, whether the noise is correct, who was in a step.

`neighbor_replay`, `noise_fit`, `one_run_audit` and `mean_shift` each return a `Check`. They read
the internal state of their own sessions, which no client can. `self_audit` decides how many steps
are attacked, and reports the results.

Legend: P trainable values, S rows of a stream, m canaries over all steps, C the L2 bound of a unit
(`BOUND`), B the public divisor (`DIVISOR`), mu = 1 / sigma. A canary is an artificial unit that an
attacker tries to detect.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import fft, stats

from actors.engine.batching import FlatStream
from actors.engine.model import Base, save_tiny_llama
from actors.privacy.budget import Budget
from actors.privacy.session import PrivateSession
from actors.registry.scratch import scratch_registry
from tg_tinker.config import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.data.batch import Example

BOUND, DIVISOR, DELTA = 0.5, 16, 1e-5

CANARY_STEPS, CANARY_CALLS = 4, 4
"""The number of steps with canaries, and of calls per step: a window of one call hides mistakes.

Each step has its own canaries.
"""

_REPLAY_SIGMA = 1.5
_NOISE_STEPS = 4
"""Steps in each of two sessions: then 1 % of the standard deviation is 5 standard errors."""

_CONFIDENCE = 0.95
_GUESSES = (0.02, 0.1, 0.4)
"""Parts of all canaries to guess, those with the most certain scores first."""

_TOKENS = 256
_SURE = 3.5
"""The error of mu that passes, in standard errors: a correct step fails once in 2,000 audits."""

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Check:
    """A question to the mechanism, with its answer and the figures behind the answer."""

    name: str
    passed: bool
    statement: str
    figures: dict[str, float]


class Bench:
    """A factory of sessions of one type, each with its own dataset, in a scratch registry."""

    def __init__(self, folder: Path, session_type: type[PrivateSession]) -> None:
        self._model = save_tiny_llama(folder / "model", vocab_size=_TOKENS)
        self._session_type = session_type
        self._made = 0
        self._registry = scratch_registry(folder / "home")

    def session(self, sigma: float, epsilon: float = 1e4) -> PrivateSession:
        """Returns a new session that uses SGD at rate 1.

        So the movement of the weights in a step, times B, is what the step released.
        """
        self._made += 1
        config = TrainingConfig(
            model_ref=str(self._model),
            lora_config=LoRAConfig(rank=8, target_modules="all-linear"),
            optimizer=OptimizerConfig(name="sgd", learning_rate=1.0),
            dp_config=DPConfig(
                noise_multiplier=sigma, max_grad_norm=BOUND, target_epsilon=epsilon,
                target_delta=DELTA, sampling="worst_case",
            ),
            batch_size=DIVISOR // 2,
            gradient_accumulation_steps=2,
            dataset_id=f"audit-{self._made}",
            dtype="float32",
        )  # fmt: skip
        run_id = self._registry.runs.create("audit", config.model_dump_json())
        epoch = self._registry.runs.claim(run_id)
        budget = Budget.planned(self._registry, "audit", run_id, epoch, config, "float32")
        base = Base.load(str(self._model), cache=self._model, dtype="float32")
        return self._session_type(base, config, budget)


def collect(session: PrivateSession, calls: Iterable[Sequence[Example]]) -> torch.Tensor:
    """Returns float64 [P]: the clipped sum of a new window after these calls."""
    session._open_window()
    for examples in calls:
        session.forward_backward(examples)
    return _flat(session._pending.total.sums.values())


def release(session: PrivateSession) -> tuple[torch.Tensor, float]:
    """Makes a step; returns float64 [P], what it released, and the epsilon charged until then.

    The released values are computed from the weights, as an outsider sees them. The epsilon is NaN
    if the step has no DP metrics.
    """
    before = _flat(session._parameters.values())
    metrics = session.optim_step().dp_metrics
    charged = math.nan if metrics is None else metrics.total_epsilon
    return (before - _flat(session._parameters.values())) * DIVISOR, charged


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])


def _row(tokens: Sequence[int]) -> Example:
    ids = np.array(tokens, dtype=np.int64)
    return Example(ids, ids)


_ROWS = [_row(ids) for ids in (
    [5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34], [40, 41, 42, 43],
    [50] * 12, [61, 62], [70, 71, 72, 73, 74, 75], [200, 201, 202, 203],
)]  # fmt: skip


_QUIET = (1.0, 600.0, 9000.0)
"""Factors on the embeddings of all rows except the last row.

The gradients of these rows are divided by the factor. The norm of the last row is at first like
that of many others, then larger, then 40 C beside rows of C / 10.
"""


def neighbor_replay(bench: Bench) -> Check:
    """Compares steps with and without each row: the sum, the draws of noise and the divisor.

    A row may move the sum by C(1 + 1e-4), because sums in float32 are rounded.
    """
    session = bench.session(_REPLAY_SIGMA)
    moved = cut = 0.0
    norms: list[float] = []
    with torch.no_grad():
        # LoRA's B starts at 0, so the gradient of A would be 0.
        for parameter in session._parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    embeddings = session.base.model.get_input_embeddings().weight.data
    loud = embeddings.clone()
    for factor in _QUIET:
        embeddings[:128] = factor * loud[:128]
        whole = collect(session, [_ROWS])
        norms += session._pending.total.norms_before.tolist()
        for at in range(len(_ROWS)):
            without = collect(session, [_ROWS[:at] + _ROWS[at + 1 :]])
            moved = max(moved, float((whole - without).norm()) / BOUND)
        for size in (1, 2, 4):
            cut = max(cut, float((whole - collect(session, _cut(size))).norm()) / BOUND)
    draws, rest = _replayed_releases(session)
    alike = draws == {session.num_trainable} and rest <= 1e-4
    figures = {
        "sensitivity": moved, "change_by_cutting": cut, "release_error": rest,
        "draws": float(max(draws)), "least_norm": min(norms, default=0.0) / BOUND,
        "largest_norm": max(norms, default=0.0) / BOUND,
    }  # fmt: skip
    return Check(
        "neighbor replay",
        moved <= 1 + 1e-4 and cut <= 1e-4 and alike,
        f"Removing one row moved the clipped sum by up to {moved:.4f} C (allowed: 1), splitting a"
        f" batch into calls moved it by {cut:.0e} C (allowed: 1e-04), and"
        f" {'one draw of noise and one divisor' if alike else 'not one draw and one divisor'}"
        " served steps with all rows, without one and without any.",
        figures,
    )


def _cut(size: int) -> list[list[Example]]:
    return [_ROWS[start : start + size] for start in range(0, len(_ROWS), size)]


def _replayed_releases(session: PrivateSession) -> tuple[set[int], float]:
    """Makes steps with all rows, with fewer and without any, and records their noise.

    Returns:
        The set of the numbers of values drawn for a step, and the largest
        |released - sum - noise| / (sigma C).
    """
    drawn: list[torch.Tensor] = []
    noise = session._noise

    def recorded(count: int) -> torch.Tensor:
        drawn.append(noise(count))
        return drawn[-1].clone()

    session._noise = recorded
    std = _REPLAY_SIGMA * BOUND
    counts, worst = set[int](), 0.0
    windows: list[list[list[Example]]] = [[_ROWS], [_ROWS[:-1]], [_ROWS[:1]], [[]], _cut(1)]
    for calls in windows:
        drawn.clear()
        expected = collect(session, calls)
        released, _ = release(session)
        values = torch.cat([torch.zeros(0), *drawn])
        counts.add(len(values))
        if len(values) == len(expected):
            error = (released - expected - std * values).abs().max()
            worst = max(worst, float(error) / std)
    return counts, worst


def noise_fit(bench: Bench) -> Check:
    """Checks the noise in steps without rows: normal, of size sigma C, and never repeated."""
    sigma = _REPLAY_SIGMA
    steps = []
    # Both sessions have the same seed, so noise that torch drew from the seed would be the same.
    for _ in range(2):
        session = bench.session(sigma)
        for _ in range(_NOISE_STEPS):
            collect(session, [[]])
            steps.append(release(session)[0] / (sigma * BOUND))
    values = torch.stack(steps)
    sizes = [parameter.numel() for parameter in session._parameters.values()]
    tensors = [part[:, : min(sizes)].flatten() for part in torch.split(values, sizes, dim=1)]
    std = float(values.std())
    fit = float(stats.kstest(values.flatten().numpy(), "norm").pvalue)
    by_step, by_tensor = _correlation(values), _correlation(torch.stack(tensors))
    equal = max(float((a == b).double().mean()) for i, a in enumerate(values) for b in values[:i])
    figures = {
        "std": std, "ks_p_value": fit, "step_correlation_se": by_step,
        "tensor_correlation_se": by_tensor, "equal_values": equal,
    }  # fmt: skip
    alone = by_step <= 5 and by_tensor <= 5 and equal <= 1e-3
    return Check(
        "noise fit",
        abs(std - 1) <= 0.01 and fit >= 1e-5 and alone,
        f"The noise of {len(steps)} steps without rows has {std:.4f} times the correct standard"
        f" deviation (allowed error: 1 %) and is {'normal' if fit >= 1e-5 else 'not normal'}"
        f" (p = {fit:.2g}). Different steps, tensors and sessions with the same seed"
        f" {'share none' if alone else 'share some'} of the noise.",
        figures,
    )


def _correlation(rows: torch.Tensor) -> float:
    """Returns the largest correlation between two rows, in standard errors.

    Rows without variance have the correlation 0.
    """
    each = torch.corrcoef(rows).nan_to_num() - torch.eye(len(rows))
    return float(each.triu(1).abs().max()) * math.sqrt(rows.shape[1])


def play_canaries(
    bench: Bench, count: int, sigma: float, epsilon: float
) -> tuple[Floats, Flags, float]:
    """Makes `CANARY_STEPS` real steps, each over a secret half of its canaries.

    Each step has its own canaries and its own dataset. So all steps together are as private for a
    canary as one step, and the one-run theorem holds for all m canaries.

    Returns:
        The scores [m] of the canaries, whether each canary was in its step, and the largest
        epsilon that a step was charged.
    """
    played = [_play_step(bench, count, sigma, epsilon) for _ in range(CANARY_STEPS)]
    scores, inside, charged = zip(*played, strict=True)
    return np.concatenate(scores), np.concatenate(inside), max(charged)


def _play_step(
    bench: Bench, count: int, sigma: float, epsilon: float
) -> tuple[Floats, Flags, float]:
    """Makes one real step over a secret half of its canaries.

    The gradient of each canary has its own direction, a row of the discrete cosine transform. The
    gradient is far longer than C, orthogonal to all others and spread over all tensors. The score
    of a canary is the released value in its direction, in units of C. The score is normal with
    standard deviation sigma. Its mean is 1 if the canary was in the step, and 0 otherwise, whatever
    the other canaries did.

    Returns:
        The scores, whether each canary was in the step, and the epsilon charged.
    """
    session = bench.session(sigma, epsilon)

    def planted(stream: FlatStream, owners: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(stream.size, device=session.base.device), _directions(session, stream)

    session.unit_backward.of_stream = planted  # type: ignore[method-assign]
    inside = np.frombuffer(secrets.token_bytes(count), dtype=np.uint8) % 2 == 1
    rows = [_row(divmod(number, _TOKENS)) for number in np.flatnonzero(inside).tolist()]
    collect(session, [rows[start::CANARY_CALLS] for start in range(CANARY_CALLS)])
    released, charged = release(session)
    scores: Floats = fft.dct(released.numpy(), norm="ortho")[:count] / BOUND
    return scores, inside, charged


def _directions(session: PrivateSession, stream: FlatStream) -> torch.Tensor:
    """Returns float32 [S, P]: 100 C times the direction of each canary in a stream."""
    # The two tokens of a row encode the canary's number: `_row(divmod(number, _TOKENS))`.
    first, second = stream.tokens.view(-1, 2).T.numpy()
    wanted = np.zeros((stream.size, session.num_trainable), dtype=np.float32)
    wanted[np.arange(stream.size), first * _TOKENS + second] = 100 * BOUND
    flat = torch.from_numpy(fft.idct(wanted, norm="ortho", axis=1, overwrite_x=True))
    return flat.to(session.base.device)


def one_run_audit(
    scores: Floats, inside: Flags, claimed: float, charged: float
) -> tuple[Check, float]:
    """Guesses which canaries were in, and computes which epsilon the correct guesses refute.

    The method is that of Steinke, Nasr and Jagielski 2023, arXiv:2305.08846. It tries several
    numbers of guesses, each with its share of the allowed error (Bonferroni).

    Returns:
        The check, and the largest lower bound on epsilon.
    """
    order = np.argsort(scores)
    bound, best, right = 0.0, 0, 0
    for part in _GUESSES:
        half = max(1, round(part * len(scores) / 2))
        correct = int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum())
        found = epsilon_bound(
            len(scores), 2 * half, correct, DELTA, (1 - _CONFIDENCE) / len(_GUESSES)
        )
        if found >= bound:
            bound, best, right = found, 2 * half, correct
    check = Check(
        "one-run audit",
        bound <= claimed and charged <= claimed,
        f"Of {best} guesses about who was in, {right} were right. So epsilon is at least"
        f" {bound:.2f} with {_CONFIDENCE:.0%} confidence; the step claims {claimed:g} and was"
        f" charged {charged:.3g}.",
        {"bound": bound, "claimed": claimed, "charged": charged, "guesses": best, "right": right},
    )
    return check, bound


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """Returns the largest epsilon that this many correct guesses refute; 0 if they refute none.

    The result exceeds the true epsilon with a probability of at most `error`.
    """
    low, high = 0.0, 20.0
    if _p_value(canaries, guesses, right, low, delta) >= error:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        refuted = _p_value(canaries, guesses, right, middle, delta) < error
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Returns an upper bound on the probability of at least `right` correct guesses.

    The bound holds under (epsilon, delta): arXiv:2305.08846, Theorem 5.2. The worst case that
    epsilon allows is randomized response for each guess. Delta may also make i guesses correct at a
    time, with probability 2 m delta / i.
    """
    rate = 1 / (1 + math.exp(-epsilon))
    lifted = np.arange(1, right + 1)
    below = np.cumsum(stats.binom.pmf(right - lifted, guesses, rate)) / lifted
    tail = float(stats.binom.sf(right - 1, guesses, rate))
    return min(1.0, tail + 2 * canaries * delta * float(below.max(initial=0.0)))


def mean_shift(scores: Floats, inside: Flags, sigma: float) -> tuple[Check, float]:
    """Compares mu, estimated from the scores, with 1 / sigma; returns the check and the estimate.

    This test of the size of the noise is sharper than the one-run audit.
    """
    there, away = scores[inside], scores[~inside]
    shift = float(there.mean() - away.mean())
    std = math.sqrt((there.var() * len(there) + away.var() * len(away)) / len(scores))
    mu, near = 1 / sigma, tolerance(sigma, len(scores))
    found = shift / std if std > 1e-9 else math.copysign(1e9, shift)
    check = Check(
        "mean shift",
        abs(found - mu) <= near,
        f"Presence in the step moved a canary's score by {found:.3f} standard deviations;"
        f" 1 / sigma is {mu:.3f} (allowed error: {near / mu:.0%}).",
        {
            "mu_hat": found, "mu": mu, "tolerance": near, "shift": shift, "std": std,
            "standard_error": standard_error(len(scores)),
        },
    )  # fmt: skip
    return check, found


def standard_error(canaries: int) -> float:
    """Returns the standard error of `mu_hat` that the noise causes, with half the canaries in."""
    return 2 / math.sqrt(canaries)


def tolerance(sigma: float, canaries: int) -> float:
    """Returns the error of mu that passes: 10 % of mu or `_SURE` standard errors, the larger."""
    return max(0.1 / sigma, _SURE * standard_error(canaries))
