"""Replays a step without each of its units: no unit moves the sum by more than C, nor the others.

A new trainable set, clip rule or architecture gets a row in `CASES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine import session as engine
from actors.engine.model import Base
from actors.privacy import unit_gradients
from actors.privacy.session import PrivateSession
from support.families import make_family
from support.models import make_model
from support.privacy_helpers import perturb, planned_budget, private_config, registry, rows
from tg_tinker import LoRAConfig, ResourceConfig
from tg_tinker.data.batch import Example

BOUND = 0.5
ALL_LINEAR = LoRAConfig(rank=4, target_modules="all-linear")
LENGTHS = (9, 3, 17, 5, 2, 12, 4)
OWNERS = "abacabb"


@dataclass(frozen=True)
class Case:
    """A kind of private step.

    Attributes:
        family: the name in `support.families`; None means the tiny Llama.
        sizes: replaces sizes of the model.
        config: replaces values of the training config; `dp` those of its DPConfig.
        stream: the most tokens of a stream.
        fast: whether the fast path is expected.
        residual: how far the other units may move, in units of C.
    """

    family: str | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    stream: int = 1024
    fast: bool = True
    residual: float = 5e-6


LORA = {"lora_config": LoRAConfig(rank=4)}
LINEAR = {"lora_config": ALL_LINEAR}
FULL = {"lora_config": None}
BFLOAT16 = {"dtype": "bfloat16"}
BY_ID = {"dp": {"unit": "id"}}

CASES: dict[str, Case] = {
    "lora": Case(config=LORA),
    "rank 1": Case(config={"lora_config": LoRAConfig(rank=1)}),
    "all-linear": Case(config=LINEAR),
    "bias": Case(sizes={"attention_bias": True}, fast=False,
                 config={"lora_config": LoRAConfig(rank=4, bias="all")}),
    "full": Case(config=FULL, fast=False),
    "full, tied": Case(sizes={"tie_word_embeddings": True}, config=FULL, fast=False),
    "bfloat16": Case(config=LINEAR | BFLOAT16, residual=1e-2),
    "bfloat16, full": Case(config=FULL | BFLOAT16, fast=False, residual=1e-2),
    "recomputed": Case(
        config=LORA | {"resources": ResourceConfig(activation_checkpointing=True)}
    ),
    "gpt2": Case("gpt2", config=LINEAR),
    "gpt2, full": Case("gpt2", config=FULL, fast=False),
    "mixtral": Case("mixtral", config=LINEAR),
    "mixtral, full": Case("mixtral", config=FULL, fast=False),
    "qwen2_moe": Case("qwen2_moe", config=LINEAR),
    "short streams": Case(config=LINEAR, stream=8),
    "ids": Case(config=LINEAR | BY_ID),
    "ids over streams": Case(config=LORA | BY_ID, stream=16),
    "ids, full": Case(config=FULL | BY_ID, fast=False),
    "freeze_a": Case(config={"lora_config": LoRAConfig(rank=4, freeze_a=True)}),
    "normalise": Case(config=LINEAR | {"dp": {"clipping": "normalise"}}),
    "normalise, ids": Case(
        config=LORA | {"dp": {"clipping": "normalise", "unit": "id"}}, stream=16
    ),
    "normalise, full": Case(config=FULL | {"dp": {"clipping": "normalise"}}, fast=False),
    "ids, gpt2": Case("gpt2", config=LINEAR | BY_ID, stream=16),
}  # fmt: skip


def started(case: Case, folder: Path) -> PrivateSession:
    model = (
        make_model(folder / "model", **case.sizes)
        if case.family is None
        else make_family(case.family, folder / "model", **case.sizes)
    )
    dp = {"max_grad_norm": BOUND, "sampling": "worst_case", "target_epsilon": 1e4}
    values = dict(case.config)
    config = private_config(model, dp=dp | values.pop("dp", {}), **values)
    base = Base.load(str(model), cache=folder, dtype=config.dtype)
    s = PrivateSession(base, config, planned_budget(registry(folder / "home"), config))
    perturb(s)
    return s


def collect(s: PrivateSession, examples: list[Example]) -> torch.Tensor:
    s._open_window()
    s.forward_backward(examples)
    return s._pending.total.values


@pytest.mark.parametrize("name", CASES)
def test_no_unit_moves_the_sum_by_more_than_the_bound_nor_the_others(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    for module in (engine, unit_gradients):
        monkeypatch.setattr(module, "MAX_STREAM_TOKENS", case.stream)
    s = started(case, tmp_path)
    assert (s.unit_backward.path == "fast") == case.fast, s.unit_backward.slow_because
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 255, (n,), generator=generator).tolist() for n in LENGTHS]
    by_id = s.dp.unit == "id"
    examples = rows(ids, example_ids=[*OWNERS]) if by_id else rows(ids)
    units = [*OWNERS] if by_id else [*range(len(ids))]
    whole = collect(s, examples)
    norms = s._pending.total.norms_before
    assert (norms > BOUND).any()
    for unit in sorted({*units}):
        own = [e for e, owner in zip(examples, units, strict=True) if owner == unit]
        others = [e for e, owner in zip(examples, units, strict=True) if owner != unit]
        without = collect(s, others)
        moved = float((whole - without).norm())
        alone = collect(s, own)
        rest = float((whole - without - alone).norm())
        assert float(alone.norm()) <= BOUND * (1 + 1e-6)
        assert rest <= case.residual * BOUND
        assert moved <= BOUND * (1 + 1e-6), (moved, rest)
