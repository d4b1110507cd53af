"""Tests normalized clipping: the bound of a unit, what it does at zero, and who may use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.privacy.clipping import GAMMA, ClippedSum, UnitGradients
from support.helpers import assert_close
from support.privacy_helpers import (
    ROWS,
    distance,
    norm,
    oracle_unit_gradient,
    perturb,
    private_session,
    registry,
    rows,
    sums,
)
from tg_tinker import DPConfig, LoRAConfig, TrainingConfig
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import PrivacyReport

NORMALISED: dict[str, Any] = {"dp": {"clipping": "normalise"}}


def normalised(units: torch.Tensor, bound: float = 1.0) -> ClippedSum:
    """Returns the normalized sum of units with these gradients [U, P]."""
    total = ClippedSum.zero({"w": units[0]}, bound)
    UnitGradients(units, "normalise").clip_into(total)
    return total


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(width=32), min_size=3, max_size=3), bound=st.floats(1e-3, 1e3))
@example(values=[3e38, 0.0, 0.0], bound=0.001)
@example(values=[1e-30, 0.0, 0.0], bound=1.0)
def test_no_unit_reaches_the_bound(values: list[float], bound: float) -> None:
    unit = torch.tensor(values, dtype=torch.float32)
    total = normalised(unit[None], bound)
    assert total.sums["w"].double().norm() < bound
    if not torch.isfinite(unit).all():
        assert not total.sums["w"].any()
        assert total.non_finite == 1


@pytest.mark.parametrize("size", [3, 1_000, 5_000])
def test_no_unit_reaches_the_bound_however_long_its_gradient_is(size: int) -> None:
    """Where |g| is far above gamma, only rounding lies between the norm and C."""
    generator = torch.Generator().manual_seed(size)
    for scale in (1e1, 1e3, 1e5, 1e7, 1e12, 1e15):
        for unit in torch.randn(100, size, generator=generator) * scale:
            assert normalised(unit[None], 0.7).sums["w"].double().norm() < 0.7


def test_what_a_unit_adds_is_its_gradient_over_its_norm_and_gamma() -> None:
    units = torch.tensor([[0.3, 0.4], [0.0, 0.0], [30.0, 40.0], [0.006, 0.008]])
    total = normalised(units, 2.0)
    wanted = torch.stack([2 * unit / (unit.norm() + GAMMA) for unit in units]).sum(0)
    torch.testing.assert_close(total.sums["w"].float(), wanted, rtol=1e-4, atol=0)
    after = [0.5 / 0.51, 0, 50 / 50.01, 0.5]
    assert total.norms_after.tolist() == pytest.approx([2 * norm for norm in after])
    assert total.norms_before.tolist() == pytest.approx([0.5, 0, 50, 0.01])
    assert total.non_finite == 0


def test_a_zero_gradient_adds_zero() -> None:
    total = normalised(torch.zeros(2, 3))
    assert not total.sums["w"].any()
    assert not total.norms_after.any()


@pytest.mark.parametrize(
    "what",
    [{}, {"lora_config": LoRAConfig(rank=4, freeze_a=True)}, {"lora_config": None}],
    ids=["lora", "freeze_a", "full"],
)
def test_nulling_one_row_moves_the_sum_by_less_than_the_bound(
    tiny_model: Path, what: dict[str, Any]
) -> None:
    s = private_session(tiny_model, **NORMALISED, **what)
    perturb(s)
    s.forward_backward(rows())
    whole = sums(s)
    moved = []
    for left_out in range(0, len(ROWS), 3):
        s._open_window()
        s.forward_backward(rows([ids for at, ids in enumerate(ROWS) if at != left_out]))
        moved.append(distance(whole, sums(s)))
    assert all(0.9 < move < 1 for move in moved)


def test_the_sum_equals_the_loop_oracle(tiny_model: Path) -> None:
    s = private_session(tiny_model, **NORMALISED)
    perturb(s)
    s.forward_backward(rows())
    wanted = {name: torch.zeros_like(p) for name, p in s._parameters.items()}
    for row in rows():
        gradient = oracle_unit_gradient(s, [row])
        for name in wanted:
            wanted[name] += gradient[name] / (norm(gradient) + GAMMA)
    assert_close(sums(s), wanted, 2e-4)


@pytest.mark.parametrize("rule", ["flat", "normalise"])
def test_the_certificate_names_the_clip_rule(tiny_model: Path, rule: str) -> None:
    known = registry()
    s = private_session(tiny_model, known=known, dp={"clipping": rule})
    entries = known.ledgers.entries("default", "default")
    (run,) = PrivacyReport(entries).certificate()["runs"].values()
    assert run["clipping"] == rule
    assert Ledger.replay(entries).accounts[s.budget.run_id].facts["clipping"] == rule


def test_the_rule_of_a_run_is_flat_unless_it_says_otherwise() -> None:
    config = TrainingConfig(model_ref="m", dp_config=DPConfig())
    assert config.dp_config is not None
    assert config.dp_config.clipping == "flat"
