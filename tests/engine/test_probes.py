"""Tests that the probes at load find what a model cannot do, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine import model as models
from actors.engine.attention import NAME, segmented
from actors.engine.caches import Caches, Way, sequences
from actors.engine.loading import from_directory
from actors.engine.model import Base
from actors.engine.probes import (
    layers_see_rows,
    passes,
    referenced,
    rows_are_separate,
    samples_rightly,
    way_of_sampling,
)
from actors.engine.slots import Layout, Slots
from support.families import make_family
from tg_tinker import InvalidRequestError


def loaded(name: str, folder: Path, dtype: str = "float32") -> Base:
    return Base.load(str(make_family(name, folder / "model")), cache=folder, dtype=dtype)


WAYS = {
    "diffllama": Way.SLOTS,  # attention is called twice in a layer
    "gemma3n_text": Way.SLOTS,  # layers share keys and values
    "ministral3": Way.SLOTS,  # attention is scaled by the position that we pass
    "youtu": Way.SLOTS,  # values have a head size of their own
    "llama4_text (no chunks)": Way.CACHE,  # attention is scaled by a position of its own
    "gpt_oss": Way.CACHE,  # sinks
    "gemma2": Way.CACHE,  # soft caps
    "doge": Way.CACHE,  # a mask of its own
    "jamba": Way.PROMPTS,  # transformers' cache is wrong for a prompt in pieces
    "recurrent_gemma": Way.WHOLE,  # the state is in the model, not in a cache
    "bert": None,  # tokens see later ones
}
"""What is peculiar about a family, and how it is sampled therefore."""


@pytest.mark.parametrize("name", WAYS)
def test_how_a_peculiar_family_is_sampled(name: str, tmp_path: Path) -> None:
    base = loaded(name, tmp_path)
    assert base.sampling is WAYS[name]
    if base.sampling is None:
        with pytest.raises(InvalidRequestError, match="trained but not sampled"):
            base.sequences(4)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "jetmoe", "gemma4_unified_text", "llama"])
def test_rounding_in_bfloat16_hides_no_ability(name: str, tmp_path: Path) -> None:
    """A rounding of the router sends a token to another expert."""
    base = loaded(name, tmp_path, "bfloat16")
    assert (base.flat, base.sampling) == (True, Way.SLOTS)
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


def test_a_probe_leaves_parameters_and_attention_as_they_were(tmp_path: Path) -> None:
    model = from_directory(make_family("llama", tmp_path / "m"), torch.bfloat16, NAME)
    before = dict(model.named_parameters())
    with referenced(model) as expected:
        assert expected.logits[0].dtype == torch.float32
        assert rows_are_separate(model, expected)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert model.config._attn_implementation == NAME
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_mixes_dtypes_is_probed_in_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_directory(make_family("llama", tmp_path / "m"), torch.bfloat16, NAME)
    layer = model.model.layers[0]
    real = layer.forward

    def mixing(x: torch.Tensor, **options: Any) -> Any:
        torch.mm(x[0].bfloat16(), layer.self_attn.q_proj.weight.T)
        return real(x, **options)

    monkeypatch.setattr(layer, "forward", mixing)
    with referenced(model) as expected:
        assert expected.logits[0].dtype == torch.bfloat16
        assert model.config._attn_implementation == NAME
        assert way_of_sampling(model, True, expected) is Way.SLOTS


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_says_nothing_of_a_model(error: type[Exception]) -> None:
    def fails() -> bool:
        raise error("no room")

    with pytest.raises(error):
        passes(fails)


@pytest.mark.parametrize("error", [AssertionError("a"), KeyError("b"), AttributeError("c")])
def test_any_failure_of_our_attention_means_a_plain_model(
    error: Exception, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(directory: Path, dtype: torch.dtype, implementation: str | None) -> Any:
        if implementation is not None:
            raise error
        return from_directory(directory, dtype, implementation)

    monkeypatch.setattr(models, "from_directory", load)
    base = Base.load(str(tiny_model), cache=tmp_path)
    assert (base.flat, base.sampling) == (False, Way.CACHE)


def test_attention_that_is_wrong_in_transformers_is_replaced_by_the_eager_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "rows_are_separate", lambda *_: False)
    monkeypatch.setattr(models, "is_eager", lambda *_: False)
    assert Base.load(str(tiny_model), cache=tmp_path).model.config._attn_implementation == "eager"


# --- what attention may not drop -------------------------------------------------------------

OPTIONS = {
    "s_aux": torch.zeros(2),
    "softcap": 5.0,
    "head_mask": torch.ones(2),
    "position_bias": torch.zeros(1),
    "is_causal": False,
    "something_new": 1,
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sampling", [False, True])
def test_an_option_without_a_rule_is_not_dropped(name: str, sampling: bool) -> None:
    call = segmented(lambda m, q, *_, **options: (q.transpose(1, 2), None))
    heads = torch.zeros(1, 2, 3, 4)
    slots = Slots(1, torch.device("cpu"))
    stream: dict[str, Any] = {"segment_bounds": (0, 3)}
    if sampling:
        stream = {"layout": Layout(slots, [(0, at) for at in range(3)], [])}
    layer = torch.nn.Identity()
    harmless = {"scaling": 1.0, "dropout": 0.0, "s_aux": None, "use_cache": False}
    call(layer, heads, heads, heads, None, **stream, **harmless)
    for mask, options in ((None, {name: OPTIONS[name]}), (torch.zeros(1, 1, 3, 3), {})):
        with pytest.raises(NotImplementedError):
            call(layer, heads, heads, heads, mask, **stream, **options)


# --- what the probe of sampling notices ------------------------------------------------------


@pytest.mark.parametrize("way", Way)
def test_each_way_is_right_for_a_llama(tiny_model: Path, way: Way) -> None:
    model = from_directory(tiny_model, torch.float32, NAME)
    with referenced(model) as expected:
        assert samples_rightly(model, sequences(way, 4, model), expected)


class SharedFork(Caches):
    """A fork that goes on with the cache of the sequence that it was copied from."""

    def copy(self, source: int, target: int, length: int) -> None:
        self._tokens[target] = self._tokens[source][:length]
        self._caches[target] = self._caches[source]


class Forgetful(Caches):
    """The cache loses a sequence that is not extended in every step."""

    def clear(self, slot: int, length: int) -> None: ...

    def logits(self, model: Any, slot: int, tokens: Any, wanted: Any) -> torch.Tensor:
        for other in set(self._caches) - {slot}:
            self._caches[other] = None
        self._tokens.setdefault(slot, [])
        cache = self._caches.get(slot)
        ids = torch.tensor(tokens)[None]
        outputs = model(input_ids=ids, cache=cache, use_cache=True)
        self._caches[slot] = outputs.cache
        return outputs.logits[0, wanted]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [SharedFork, Forgetful])
def test_a_wrong_cache_is_noticed(tiny_model: Path, kind: type[Caches]) -> None:
    model = from_directory(tiny_model, torch.float32, None)
    room = kind(4, cached=True, whole_prompts=False, switches=frozenset())
    with referenced(model) as expected:
        assert not passes(lambda: samples_rightly(model, room, expected))


class TakesLast(torch.nn.Module):
    """A linear layer between layers that reverse the tokens, as a sort by expert may."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flip(1)).flip(1)  # type: ignore[no-any-return]


def test_a_layer_that_sees_tokens_in_another_order_is_noticed(tiny_model: Path) -> None:
    """Nothing else changes, but adapters of two sequences would be confused."""
    model = from_directory(tiny_model, torch.float32, NAME)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = TakesLast(mlp.down_proj)
    with referenced(model) as expected:
        assert rows_are_separate(model, expected)
        assert not layers_see_rows(model, expected)
        assert way_of_sampling(model, True, expected) is Way.CACHE
