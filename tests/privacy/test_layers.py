"""Tests that the base model of a private run draws no random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.privacy.layers import silence_dropout
from support.families import FAMILIES, NOISE, make_family
from support.processes import SOAK

NOISY = ("biogpt", "bloom", "opt", "phimoe", "seed_oss", "starcoder2")
"""Families that keep dropout elsewhere than in layers of it, or that jitter."""

REFUSES_DROPOUT = {"diffllama": {"attention_dropout": 0.0}}


@pytest.mark.parametrize("name", sorted(FAMILIES) if SOAK else NOISY)
def test_a_silenced_family_draws_nothing(name: str, tmp_path: Path) -> None:
    noise = dict.fromkeys((*NOISE, "layerdrop"), 0.3) | REFUSES_DROPOUT.get(name, {})
    model = AutoModelForCausalLM.from_pretrained(make_family(name, tmp_path / "model", **noise))
    row = torch.arange(3, 23)[None]

    def logits(seed: int, train: bool = True) -> torch.Tensor:
        model.train(train)
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(input_ids=row, use_cache=False).logits  # type: ignore[no-any-return]

    if name in NOISY:
        assert not torch.equal(logits(1), logits(2))
    silence_dropout(model)
    assert all(torch.equal(logits(1), logits(seed)) for seed in (2, 3))
    torch.testing.assert_close(logits(1), logits(1, train=False), rtol=1e-4, atol=1e-4)
