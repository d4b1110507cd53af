"""Defines private sessions over a real registry, and the slow, obvious version of their sums."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.engine.model import Base
from actors.privacy.budget import Budget
from actors.privacy.clipping import ClippedSum, UnitGradients
from actors.privacy.session import PrivateSession
from actors.registry.registry import Registry
from actors.storage import home
from support import databases
from support.helpers import IGNORED, by_the_book
from tg_tinker import DPConfig, LoRAConfig, TrainingConfig
from tg_tinker.data.batch import Example, normalize

ROWS = [
    [5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34], [40, 41, 42, 43],
    [50] * 12, [61, 62], [70, 71, 72, 73, 74, 75], [80, 81, 82, 83],
]  # fmt: skip
"""Eight ragged, distinct rows."""


class Noiseless(PrivateSession):
    """A session that releases the sum itself, for tests of what the noise is added to."""

    _noise = staticmethod(lambda count: torch.zeros(count, dtype=torch.float64))


class Counting(PrivateSession):
    """A session with the real noise, which counts the values that were drawn in each step."""

    def __init__(self, *arguments: Any) -> None:
        self.draws: list[int] = []
        real = PrivateSession._noise

        def counted(count: int) -> torch.Tensor:
            self.draws.append(count)
            return real(count)

        self._noise = counted  # type: ignore[method-assign]
        super().__init__(*arguments)


def registry(path: Path | None = None) -> Registry:
    """Returns a registry in a home of its own, and makes the home if it is missing."""
    path = path or Path(tempfile.mkdtemp()) / "home"
    home.create(path)
    return Registry(databases.url_of(path), path / "keyring")


def private_config(model: Path, **values: Any) -> TrainingConfig:
    """Returns a config with LoRA of rank 4, sigma 1 and epsilon 8; `dp` replaces values of its
    DPConfig."""
    dp = {"noise_multiplier": 1.0} | values.pop("dp", {})
    defaults: dict[str, Any] = {"lora_config": LoRAConfig(rank=4, alpha=32), "batch_size": 8}
    return TrainingConfig(model_ref=str(model), dp_config=DPConfig(**dp), **(defaults | values))


def planned_budget(known: Registry, config: TrainingConfig) -> Budget:
    """Returns the budget of a new run that is not open yet: `PrivateSession` opens it."""
    run_id = known.runs.create("default", config.model_dump_json())
    return Budget.planned(known, "default", run_id, known.runs.claim(run_id), config, "float32")


def new_budget(known: Registry, config: TrainingConfig) -> Budget:
    return planned_budget(known, config).open()


def private_session(
    model: Path,
    kind: type[PrivateSession] = PrivateSession,
    known: Registry | None = None,
    **values: Any,
) -> PrivateSession:
    config = private_config(model, **values)
    base = Base.load(str(model), cache=Path(tempfile.mkdtemp()))
    return kind(base, config, planned_budget(known or registry(), config))


def rows(ids: Sequence[Sequence[int]] = ROWS, **fields: Any) -> list[Example]:
    return normalize({"input_ids": [*map(list, ids)], **fields}, may_be_empty=True)


def perturb(session: PrivateSession, scale: float = 0.05) -> None:
    """Moves the weights: LoRA's B starts at zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in session._parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def clipped(values: torch.Tensor, bound: float) -> ClippedSum:
    """Returns the clipped sum of units with these gradients [U, P]."""
    total = ClippedSum.zero({"w": values[0]}, bound)
    UnitGradients(values).clip_into(total)
    return total


def sums(session: PrivateSession) -> dict[str, torch.Tensor]:
    """Returns copies of the clipped sums to which the next step would add noise."""
    return {name: tensor.clone() for name, tensor in session._pending.total.sums.items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(torch.stack([(a[n] - b[n]).double().square().sum() for n in a]).sum().sqrt())


def norm(a: dict[str, torch.Tensor]) -> float:
    return distance(a, {name: torch.zeros_like(tensor) for name, tensor in a.items()})


def oracle_unit_gradient(
    session: PrivateSession, examples: Sequence[Example]
) -> dict[str, torch.Tensor]:
    """Returns the gradient of one unit, from its rows one by one through transformers' own eager
    forward pass."""
    total = {name: torch.zeros_like(p) for name, p in session._parameters.items()}
    for example in examples:
        ids = torch.from_numpy(example.input_ids)[None]
        labels = torch.from_numpy(example.labels)
        with by_the_book(session.base.model) as model:
            logits = model(input_ids=ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED)
        loss.backward()
        for name, parameter in session._parameters.items():
            if parameter.grad is not None:
                total[name] += parameter.grad
            parameter.grad = None
    return total


def oracle_sum(
    session: PrivateSession, units: Sequence[Sequence[Example]]
) -> dict[str, torch.Tensor]:
    """Clips each unit's gradient over all tensors jointly, then adds, in a loop and by nothing
    else."""
    bound = session.dp.max_grad_norm
    total = {name: torch.zeros_like(p) for name, p in session._parameters.items()}
    for unit in units:
        gradient = oracle_unit_gradient(session, unit)
        factor = min(1.0, bound / max(norm(gradient), 1e-30))
        for name in total:
            total[name] += factor * gradient[name]
    return total
