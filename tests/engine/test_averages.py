"""Tests averages of the weights: their values from the first step on, resume, and artifacts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.checkpoint import Checkpoint, SessionState, from_files, to_files
from actors.engine.model import Base
from actors.engine.session import Session
from support.helpers import assert_close, assert_equal, examples, session, weights
from support.privacy_helpers import private_session, registry, rows
from tg_tinker import (
    ArtifactMismatchError,
    InvalidRequestError,
    LoRAConfig,
    OptimizerConfig,
    TrainingConfig,
)

DECAY, FROM = 0.7, 3
BOTH = OptimizerConfig(learning_rate=1e-2, ema_decay=DECAY, tail_from=FROM)


def trained(s: Session, steps: int) -> list[dict[str, torch.Tensor]]:
    """Returns copies of the weights after each step."""
    found = []
    for _ in range(steps):
        s.forward_backward(examples())
        s.optim_step()
        found.append({name: tensor.clone() for name, tensor in weights(s).items()})
    return found


def mean(of: list[dict[str, torch.Tensor]], shares: list[float]) -> dict[str, torch.Tensor]:
    whole = sum(shares)
    return {
        name: sum(share / whole * each[name].double() for share, each in zip(shares, of)).float()  # noqa: B905
        for name in of[0]
    }


def stored(state: SessionState) -> SessionState:
    """Returns the state as an artifact brings it back."""
    files = to_files(Checkpoint(state, {}, datetime.now(UTC)))
    return from_files({name: bytes(content) for name, content in files.items()}).state


def averages(s: Session) -> dict[str, dict[str, torch.Tensor]]:
    return {
        kind: {n: t.clone() for n, t in s.averaged_state(kind).weights.items()}  # type: ignore[arg-type]
        for kind in ("ema", "tail")
    }


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), LoRAConfig(rank=4, freeze_a=True), None])
def test_they_are_the_weighted_means_of_the_weights_after_each_step(
    tiny_model: Path, lora: Any
) -> None:
    s = session(tiny_model, lora_config=lora, optimizer=BOTH)
    after = trained(s, 1)
    assert_close(s.averaged_state("ema").weights, after[0], 1e-6)  # from the first step on
    after += trained(s, 4)
    shares = [DECAY ** (len(after) - 1 - i) for i in range(len(after))]
    assert_close(averages(s)["ema"], mean(after, shares), 1e-5)
    assert_close(averages(s)["tail"], mean(after[FROM - 1 :], [1.0] * 3), 1e-5)
    assert_equal(weights(s), after[-1])  # training does not see them


def test_a_resumed_run_has_the_same_averages_to_the_bit(tiny_model: Path) -> None:
    whole, half, resumed = (session(tiny_model, optimizer=BOTH) for _ in range(3))
    trained(whole, 5)
    trained(half, 4)
    assert resumed.load(stored(half.state())) == ()
    trained(resumed, 1)
    for kind in ("ema", "tail"):
        assert_equal(averages(resumed)[kind], averages(whole)[kind])


def test_loading_an_earlier_state_takes_the_averages_back_too(tiny_model: Path) -> None:
    s = session(tiny_model, optimizer=BOTH)
    trained(s, 3)
    saved, before = stored(s.state()), averages(s)
    trained(s, 2)
    s.load(saved)
    for kind in before:
        assert_equal(averages(s)[kind], before[kind])


@pytest.mark.parametrize(
    ("source", "optimizer", "said"),
    [
        (OptimizerConfig(), BOTH, "no ema and no tail average"),
        (OptimizerConfig(ema_decay=0.5, tail_from=FROM), BOTH, "no ema average"),
        (OptimizerConfig(), OptimizerConfig(tail_from=9), None),
    ],
)
def test_averages_that_the_artifact_lacks_begin_anew_and_say_so(
    tiny_model: Path, source: OptimizerConfig, optimizer: OptimizerConfig, said: str | None
) -> None:
    one, s = (session(tiny_model, optimizer=each) for each in (source, optimizer))
    trained(s, 2)
    trained(one, FROM)
    warnings = s.load(stored(one.state()))
    assert len(warnings) == (said is not None)
    assert all(said in w and "begins at step 4" in w for w in warnings if said)
    if said is not None:
        after = trained(s, 1)
        assert_close(s.averaged_state("ema").weights, after[0], 1e-6)


def test_a_run_that_keeps_none_says_how_to(tiny_model: Path) -> None:
    s = session(tiny_model)
    assert s.state().averages is None
    for kind, field in (("ema", "ema_decay"), ("tail", "tail_from")):
        with pytest.raises(InvalidRequestError, match=rf"OptimizerConfig\({field}=\.\.\.\)"):
            s.averaged_state(kind)  # type: ignore[arg-type]


def test_an_average_without_a_step_is_refused(tiny_model: Path) -> None:
    s = session(tiny_model, optimizer=BOTH)
    with pytest.raises(InvalidRequestError, match="no step has entered the ema average"):
        s.averaged_state("ema")
    trained(s, FROM - 1)
    with pytest.raises(InvalidRequestError, match="up to step 3"):
        s.averaged_state("tail")


def test_training_does_not_resume_from_an_average(tiny_model: Path) -> None:
    s = session(tiny_model, optimizer=BOTH)
    trained(s, 2)
    state, before = stored(s.averaged_state("ema")), weights(s)
    assert state.average == "ema"
    assert (state.optimizer, state.averages) == (None, None)
    with pytest.raises(ArtifactMismatchError, match="averaged weights") as caught:
        s.load(state)
    assert caught.value.details == {"part": "average"}
    assert "without average=" in str(caught.value)
    assert_equal(weights(s), before)


def test_an_average_has_the_lineage_of_its_run_and_costs_nothing(tiny_model: Path) -> None:
    known = registry()
    s = private_session(tiny_model, known=known, optimizer=BOTH)
    s.forward_backward(rows())
    s.optim_step()
    entries = known.ledgers.entries("default", "default")
    state = s.averaged_state("ema")
    assert state.lineage == s.state().lineage
    assert state.lineage.guarantee == "private"
    assert state.lineage.ledgers
    assert known.ledgers.entries("default", "default") == entries


def test_averages_of_bfloat16_weights_are_kept_in_float32(tiny_model: Path) -> None:
    base = Base.load(str(tiny_model), cache=tiny_model.parent / "cache", dtype="bfloat16")
    s = Session(base, TrainingConfig(model_ref=str(tiny_model), optimizer=BOTH))
    trained(s, FROM)
    assert all(tensor.dtype != torch.bfloat16 for tensor in (s.state().averages or {}).values())
    assert {t.dtype for t in s.averaged_state("ema").weights.values()} == {torch.bfloat16}
