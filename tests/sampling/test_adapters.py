"""Tests many LoRA adapters in one stream: each row is as if its adapter were alone on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.model import Base
from actors.engine.session import Session
from actors.sampling.adapters import Adapter, AdapterBank
from actors.sampling.engine import SlotEngine
from support.helpers import session
from support.sampling import Reader, alone, finish
from tg_tinker import InvalidRequestError, LoRAConfig, NotFoundError, QueueFullError
from tg_tinker.sampling import SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "a": {"rank": 2, "alpha": 8.0},
    "b": {"rank": 8, "target_modules": "all-linear"},
    "c": {"rank": 4, "target_modules": ("v_proj",)},
    "d": {"rank": 3, "alpha": 1.0, "target_modules": ("1.mlp.down_proj", "q_proj")},
}
GREEDY = SamplingParams(max_tokens=14, temperature=0)


def trained(model: Path, name: str, **lora: Any) -> Session:
    s = session(model, lora_config=LoRAConfig(**lora))
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameter in s._parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return s


def adapter(s: Session, name: str) -> Adapter:
    state = s.state(include_optimizer=False)
    assert state.adapter_config is not None
    return Adapter(name, state.adapter_config, state.weights)


@pytest.fixture(scope="module")
def sessions(tiny_model: Path) -> dict[str, Session]:
    return {name: trained(tiny_model, name, **lora) for name, lora in KINDS.items()}


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Base:
    return Base.load(str(tiny_model), cache=tmp_path)


def reader(prompt: list[int], name: str | None, params: SamplingParams = GREEDY) -> Reader:
    found = Reader(prompt, params)
    found.request.adapter = name
    return found


def test_rows_of_one_stream_use_their_own_adapters_or_none(
    base: Base, sessions: dict[str, Session]
) -> None:
    engine = SlotEngine(base)
    plain = alone(base, [65, 66, 67], GREEDY).ids()
    readers = []
    for name in ("a", None, "b", "c", None, "d", "a"):
        if name is not None:
            engine.adapters.add(adapter(sessions[name], name))
        readers.append(reader([65, 66, 67, *range(70, 70 + 3 * len(readers))], name))
        engine.submit(readers[-1].request)
        engine.step()
    finish(engine)
    for found in readers:
        name = found.request.adapter
        model = base if name is None else sessions[name].base
        expected = alone(model, found.request.prompt, GREEDY)
        assert found.ids() == expected.ids(), name
        close = [token.logprob for token in expected.tokens]
        assert [token.logprob for token in found.tokens] == pytest.approx(close, abs=1e-3)
    assert len({tuple(r.ids()) for r in readers}) == len(readers)
    again = reader([65, 66, 67], None)
    engine.submit(again.request)
    finish(engine)
    assert again.ids() == plain


@pytest.mark.parametrize("name", [*KINDS])
def test_one_adapter_for_all_rows(base: Base, sessions: dict[str, Session], name: str) -> None:
    engine = SlotEngine(base)
    engine.adapters.add(adapter(sessions[name], name))
    readers = [reader([80, 81 + i], name) for i in range(3)]
    for one in readers:
        engine.submit(one.request)
    finish(engine)
    for one in readers:
        assert one.ids() == alone(sessions[name].base, one.request.prompt, GREEDY).ids()


def test_conv1d_layers_take_adapters_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from support.models import make_tokenizer

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    s = trained(tmp_path, "g", rank=4, target_modules=("c_attn", "c_fc"))
    base = Base.load(str(tmp_path), cache=tmp_path / "cache")
    engine = SlotEngine(base)
    engine.adapters.add(adapter(s, "g"))
    found = reader([65, 66], "g")
    engine.submit(found.request)
    finish(engine)
    assert found.ids() == alone(s.base, [65, 66], GREEDY).ids()
    assert found.ids() != alone(base, [65, 66], GREEDY).ids()


def test_the_least_recently_used_leaves_and_its_place_is_clean(
    base: Base, sessions: dict[str, Session]
) -> None:
    a, b, c = (adapter(sessions[name], name) for name in "abc")
    bank = AdapterBank(base.model, most_bytes=a.size + b.size)
    engine = SlotEngine(base)
    engine.adapters = bank
    for one in (a, b):
        bank.add(one)
    bank.pin("a")
    bank.release("a")
    bank.add(c)  # b was used longest ago
    assert ["a" in bank, "b" in bank, "c" in bank] == [True, False, True]
    for name in ("c", "a"):
        found = reader([65, 66], name)
        engine.submit(found.request)
        finish(engine)
        assert found.ids() == alone(sessions[name].base, [65, 66], GREEDY).ids()


def test_adapters_in_use_are_never_dropped(base: Base, sessions: dict[str, Session]) -> None:
    a, b = (adapter(sessions[name], name) for name in "ab")
    engine = SlotEngine(base)
    bank = engine.adapters = AdapterBank(base.model, most_bytes=max(a.size, b.size))
    bank.add(a)
    running, waiting = reader([65], "a"), reader([66], "a")
    for one in (running, waiting):
        engine.submit(one.request)
    engine.cancel(waiting.request)
    engine.step()
    with pytest.raises(QueueFullError, match="try again"):
        bank.add(b)
    finish(engine)
    bank.add(b)
    assert "a" not in bank
    with pytest.raises(NotFoundError):
        engine.submit(reader([65], "a").request)


def test_an_adapter_is_released_once_for_all_completions(
    base: Base, sessions: dict[str, Session]
) -> None:
    engine = SlotEngine(base)
    engine.adapters.add(adapter(sessions["a"], "a"))
    several = SamplingParams(max_tokens=5, num_completions=3, seed=1)
    short, long = reader([65], "a", several), reader([66], "a")
    for one in (short, long):
        engine.submit(one.request)
    while len(short.ends) < 3:
        engine.step()
    assert engine.adapters._resident["a"].users == 1  # the long one's
    finish(engine)
    assert engine.adapters._resident["a"].users == 0


def test_a_place_that_is_taken_over_serves_the_new_adapter(
    base: Base, sessions: dict[str, Session]
) -> None:
    engine = SlotEngine(base)
    engine.adapters.add(adapter(sessions["a"], "a"))

    def mixed(name: str) -> Reader:
        found = reader([65, 66], name)
        for one in (found, reader([70], None)):  # rows that differ: gathered and kept
            engine.submit(one.request)
        finish(engine)
        return found

    assert mixed("a").ids() == alone(sessions["a"].base, [65, 66], GREEDY).ids()
    engine.adapters.drop("a")
    engine.adapters.add(adapter(sessions["c"], "c"))  # at the same index
    assert mixed("c").ids() == alone(sessions["c"].base, [65, 66], GREEDY).ids()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"config": {"use_dora": True}}, "use_dora"),
        ({"config": {"rank_pattern": {"v_proj": 3}}}, "rank_pattern"),
        ({"weights": {"base_model.model.model.norm.bias": torch.zeros(32)}}, "norm.bias"),
        ({"weights": {
            "base_model.model.model.x.lora_A.weight": torch.zeros(2, 32),
            "base_model.model.model.x.lora_B.weight": torch.zeros(32, 2),
        }}, "model.x is missing"),
        ({"weights": {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(32, 2),
        }}, "another size"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_and_changes_nothing(
    base: Base, sessions: dict[str, Session], change: dict[str, Any], told: str
) -> None:
    good = adapter(sessions["a"], "a")
    bad = Adapter(
        "bad",
        {**good.config, **change.get("config", {})},
        {**good.weights, **change.get("weights", {})},
    )
    bank = AdapterBank(base.model)
    with pytest.raises(InvalidRequestError, match=told):
        bank.add(bad)
    assert "bad" not in bank
    assert not bank._layers
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer) is torch.nn.Linear
