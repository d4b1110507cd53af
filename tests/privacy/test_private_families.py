"""Tests private runs of many families whose base models drop activations in train mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.engine import model as loading
from actors.engine.batching import flatten
from actors.privacy.session import PrivateSession
from actors.registry.registry import Registry
from support.families import FAMILIES, NOISE, ROWS, make_family
from support.privacy_helpers import perturb, private_session, registry, rows
from support.processes import SOAK
from tg_tinker import InvalidRequestError, LoRAConfig

QUICK = (
    "apertus", "biogpt", "bloom", "codegen", "cohere", "dbrx", "deepseek_v3", "ernie4_5",
    "falcon (ALiBi)", "falcon (new)", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gptj", "granite", "mistral", "mixtral", "mpt", "olmo2", "opt",
    "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "seed_oss", "smollm3",
    "stablelm", "starcoder2", "xglm",
)  # fmt: skip
FUNCTIONAL = {"biogpt", "dbrx", "opt", "seed_oss", "starcoder2", "xglm"}
"""Families whose dropout is no layer."""

REFUSES_DROPOUT = {"diffllama": {"attention_dropout": 0.0}}

UNFIT: dict[str, str] = {}
"""Family -> why it is refused."""


@pytest.fixture(scope="module")
def known() -> Registry:
    return registry()


def sum_of(s: PrivateSession, ids: list[list[int]]) -> torch.Tensor:
    s._open_window()
    s.forward_backward(rows(ids))
    return s._pending.total.values


@pytest.mark.parametrize("name", sorted(FAMILIES) if SOAK else QUICK)
def test_a_family_that_drops_activations_trains_privately(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: Registry
) -> None:
    monkeypatch.setattr(loading, "way_of_sampling", lambda *_: None)  # takes most of the time
    noise = dict.fromkeys((*NOISE, "layerdrop"), 0.3) | REFUSES_DROPOUT.get(name, {})
    model = make_family(name, tmp_path / "model", **noise)
    lora = LoRAConfig(rank=2, alpha=4.0, target_modules="all-linear")
    dp = {"max_grad_norm": 1e6, "sampling": "worst_case", "target_epsilon": 1e4}

    def create() -> PrivateSession:
        return private_session(
            model, known=known, lora_config=lora, dp=dp, dataset_id=tmp_path.name
        )

    if name in UNFIT:
        with pytest.raises(InvalidRequestError, match=UNFIT[name]):
            create()
        return
    s = create()
    perturb(s)
    together = sum_of(s, ROWS)
    assert together.norm() > 0
    torch.manual_seed(1)
    assert torch.equal(together, sum_of(s, ROWS))  # nothing is drawn
    s.unit_backward.capture = None
    alone = sum_of(s, ROWS)
    assert (together - alone).norm() <= 1e-4 * alone.norm()
    if name in FUNCTIONAL:  # else the family would show nothing
        s.base.model.train()
        stream = flatten(rows(ROWS[:1]))
        with torch.no_grad():
            assert len({float(s._losses(stream)) for _ in range(8)}) > 1


def test_the_adapters_own_dropout_alone_is_on(tmp_path: Path) -> None:
    model = make_family("gpt2", tmp_path / "model", attn_pdrop=0.5, resid_pdrop=0.5)
    lora = LoRAConfig(rank=2, dropout=0.5, target_modules="all-linear")
    s = private_session(model, lora_config=lora)
    perturb(s)
    on: set[str] = set()
    for name, module in s.base.model.named_modules():

        def note(module: torch.nn.Module, _: object, name: str = name) -> None:
            if module.training:
                on.add(name)

        module.register_forward_pre_hook(note)
    first = sum_of(s, ROWS).clone()
    assert not torch.equal(first, sum_of(s, ROWS))
    assert on
    assert all(".lora_dropout" in name for name in on)
    assert not any(module.training for module in s.base.model.modules())
