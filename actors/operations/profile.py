"""Measures where the time of a training step goes, with the same steps as a training client."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.process import spin_briefly
from tg_tinker.config import TrainingConfig
from tg_tinker.data.batch import Example, check_bounds

if TYPE_CHECKING:
    from actors.engine.model import Base
    from actors.engine.session import Session

OTHER = "other"


def profile_steps(
    config: TrainingConfig, cache: Path, *, rows: int, tokens: int, steps: int,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, float]:  # fmt: skip
    """Returns the seconds of a step by stage: means over `steps` steps on random tokens.

    One more step is made first, as a warm-up. The registry is in a temporary directory, which is
    removed afterwards.

    Args:
        cache: the folder of converted models.

    Raises:
        InvalidRequestError: the rows are longer than the context of the model.
        NotFoundError: see `Base.load`.
    """
    # First, because the next lines load torch, which reads the environment once.
    spin_briefly()
    from actors.engine.model import Base, use_threads
    from actors.engine.timing import Stage, measured

    use_threads(config.resources.num_threads)
    base = Base.load(config.model_ref, cache=cache, dtype=config.dtype, progress=progress)
    batches = [_rows(base.vocab_size, rows, tokens, seed) for seed in range(steps + 1)]
    # A private step would skip rows that are too long, without an error.
    check_bounds(batches[0], base.vocab_size, base.context_length)
    with tempfile.TemporaryDirectory() as scratch:
        session = _session(base, config, Path(scratch) / "home")
        _step(session, batches[0])
        progress(f"measuring {steps} steps{_path(session)}")
        with measured() as spent:
            started = time.perf_counter()
            for batch in batches[1:]:
                _step(session, batch)
            total = time.perf_counter() - started
    found = {stage.value: spent[stage] / steps for stage in Stage}
    return found | {OTHER: total / steps - sum(found.values())}


def _path(session: Session) -> str:
    """Returns how a private session computes the gradients of single rows, in words."""
    from actors.privacy.session import PrivateSession

    if not isinstance(session, PrivateSession):
        return ""
    units = session.unit_backward
    because = units.slow_because and f", because {units.slow_because}"
    return f"; gradients of single rows: {units.path}{because}"


def _step(session: Session, batch: list[Example]) -> None:
    session.forward_backward(batch)
    session.optim_step()


def _session(base: Base, config: TrainingConfig, place: Path) -> Session:
    from actors.engine.session import Session
    from actors.privacy.budget import Budget
    from actors.privacy.session import PrivateSession
    from actors.registry.scratch import scratch_registry

    if not config.private:
        return Session(base, config)
    registry = scratch_registry(place)
    run_id = registry.runs.create("default", config.model_dump_json())
    epoch = registry.runs.claim(run_id)
    budget = Budget.planned(registry, "default", run_id, epoch, config, str(base.dtype))
    return PrivateSession(base, config, budget)


def _rows(vocab_size: int, rows: int, tokens: int, seed: int) -> list[Example]:
    generator = np.random.default_rng(seed)
    return [Example(ids, ids) for ids in generator.integers(0, vocab_size, (rows, tokens))]
