"""Tests which layers get an adapter: those that PEFT adapts as layers, in any architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from actors.artifacts.adapters import imported
from actors.engine.lora import make_trainable
from actors.engine.memory import adapter_values
from actors.engine.model import Base
from actors.engine.session import Session
from support.families import COMMON, EXPERTS, make_family
from support.helpers import examples, session
from tg_tinker import InvalidRequestError, LoRAConfig
from tg_tinker.data.peft_files import PeftFiles

ALL = LoRAConfig(rank=8, target_modules="all-linear")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_family(name, tmp_path_factory.mktemp("family") / "model")
        return made[name]

    return make


def adapted(s: Session) -> set[str]:
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in s._parameters}


@pytest.mark.parametrize("layers", [2, 4])
def test_a_gate_with_one_output_forbids_nothing_and_pefts_own_adapter_is_imported(
    tmp_path: Path, layers: int
) -> None:
    """From twenty layers on, PEFT writes their names shorter."""
    sizes = COMMON | EXPERTS | {"num_hidden_layers": layers}
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **sizes)).float()
    plain.save_pretrained(tmp_path / "model")
    s = session(tmp_path / "model", lora_config=ALL)
    assert {"shared_expert_gate", "q_proj", "down_proj"} < adapted(s)
    s.forward_backward(examples())
    assert s.optim_step().step == 1
    peft = get_peft_model(
        plain, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    peft.save_pretrained(tmp_path / "adapter")
    files = PeftFiles.read(tmp_path / "adapter")
    mine = session(tmp_path / "model", lora_config=files.lora)
    like = mine.live_state(include_optimizer=False)
    found = imported(files.config, files.weights, like)
    assert found.weights.keys() == s._parameters.keys()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "minimax"])
def test_all_linear_leaves_experts_and_routers_that_are_no_layers(family: Any, kind: str) -> None:
    s = session(family(kind), lora_config=ALL.model_copy(update={"dropout": 0.1}))
    config = s._trainable.adapter_config or {}
    assert config["lora_dropout"] == 0.1
    assert not config["target_parameters"]
    assert not config["rank_pattern"]
    assert "o_proj" in adapted(s)
    assert all(parameter.ndim == 2 for parameter in s._parameters.values())
    frozen = [n for n, p in s.base.model.named_parameters() if ".experts." in n]
    assert frozen
    assert not any(p.requires_grad for n, p in s.base.model.named_parameters() if n in frozen)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("deepseek_v3", ("gate_proj", "up_proj", "down_proj")),
        ("deepseek_v3", ("o_proj", "1.mlp.shared_experts.down_proj")),
        ("deepseek_v3", ("gate_proj",)),  # without up_proj, PEFT raises an error itself
        ("glm4_moe", ("q_proj", "down_proj")),
    ],
)
def test_names_that_mean_experts_are_refused_with_those_to_use(
    family: Any, kind: str, targets: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequestError, match=r"use .*o_proj") as refusal:
        session(family(kind), lora_config=LoRAConfig(rank=4, target_modules=targets))
    names = [n for n in refusal.value.details["target_modules"] if n.endswith(("o_proj", "b_proj"))]
    session(family(kind), lora_config=LoRAConfig(rank=4, target_modules=tuple(names)))


@pytest.mark.parametrize("kind", ["mamba2", "falcon_h1"])
def test_layers_that_peft_does_not_adapt_are_named(family: Any, kind: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"'out_proj' is incompatible.*in_proj"
    ) as refusal:
        session(family(kind), lora_config=ALL)
    assert "in_proj" in refusal.value.details["target_modules"]
    session(family(kind), lora_config=LoRAConfig(rank=4, target_modules=("in_proj",)))


@pytest.mark.parametrize("kind", ["llama4_text", "phimoe"])
def test_all_linear_leaves_routers_that_return_more_than_a_product(family: Any, kind: str) -> None:
    s = session(family(kind), lora_config=ALL)
    assert "router" not in adapted(s)
    assert {"q_proj", "o_proj"} < adapted(s)
    s.forward_backward(examples())
    with pytest.raises(InvalidRequestError, match=r"router.*not a linear layer"):
        session(family(kind), lora_config=LoRAConfig(target_modules=("router",)))


def test_unknown_target_modules_list_the_ones_there_are(tiny_model: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"'c_attn'.*q_proj"):
        session(tiny_model, lora_config=LoRAConfig(target_modules=("c_attn",)))


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("lm_head", "is the output head of this model, which gets no adapter"),
        ("embed_tokens", "is a layer of class Embedding, not a linear layer"),
        ("self_attn", "is a layer of class LlamaAttention, not a linear layer"),
        ("c_attn", "names no layer of this model"),
    ],
)
def test_why_a_target_gets_no_adapter_is_true(tiny_model: Path, target: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"'{target}' {why}: use one of .*q_proj"):
        session(tiny_model, lora_config=LoRAConfig(target_modules=("q_proj", target)))


def test_a_rank_above_every_layer_is_refused_with_the_bound(tiny_model: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"rank 33 exceeds .* at most 32"):
        session(tiny_model, lora_config=LoRAConfig(rank=33))
    s = session(tiny_model, lora_config=LoRAConfig(rank=32))  # k_proj is 32 x 16
    assert any(parameter.shape == (16, 32) for parameter in s._parameters.values())


def test_an_adapter_on_a_layer_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = Base.load(str(tiny_model), cache=tmp_path)
    base.model.model.table = torch.nn.ModuleDict({"q_proj": torch.nn.Embedding(8, 8)})
    with pytest.raises(InvalidRequestError, match=r"model\.table\.q_proj, which is no linear"):
        make_trainable(base, LoRAConfig(rank=4, target_modules=("q_proj",)))


def test_experts_do_not_count_as_adapted() -> None:
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.mlp.experts.3.down_proj.weight": (32, 64),
        "model.layers.0.mlp.shared_experts.down_proj.weight": (32, 64),
    }
    assert adapter_values(shapes, ALL) == 8 * (64 + 96)
