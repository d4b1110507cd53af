"""Defines the slow, obvious versions that the engine is compared with, and ragged batches for
both."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from actors.engine.matmul import Linear
from actors.engine.model import Base
from actors.engine.session import Session
from tg_tinker import LoRAConfig, TrainingConfig
from tg_tinker.data.batch import Example, normalize

IGNORED = -100

RAGGED = [
    ([5, 6, 7, 8, 9, 10, 11], [IGNORED, IGNORED, 7, 8, 9, 10, 11]),
    ([20, 21, 22], [20, 21, 22]),
    ([30, 31, 32, 33, 34], [30, IGNORED, 32, IGNORED, 34]),
    ([40, 41, 42, 43], [IGNORED] * 4),
    ([50] * 12, [50] * 12),
    ([61, 62], [61, 62]),
    ([70, 71, 72, 73, 74, 75], [IGNORED] * 5 + [75]),
    ([80, 81, 82, 83], [80, 81, 82, 83]),
]
"""Eight rows of (input_ids, labels): ragged, masked, one without any label."""


def examples(rows: list[tuple[list[int], list[int]]] = RAGGED) -> list[Example]:
    return normalize({"input_ids": [r[0] for r in rows], "labels": [r[1] for r in rows]})


def padded(rows: list[tuple[list[int], list[int]]], side: str) -> dict[str, list[list[int]]]:
    """Returns the same rows as a rectangle, padded with a real token id under a zero mask."""
    width = max(len(ids) for ids, _ in rows)

    def pad(row: list[int], value: int) -> list[int]:
        fill = [value] * (width - len(row))
        return fill + row if side == "left" else row + fill

    return {
        "input_ids": [pad(ids, 99) for ids, _ in rows],
        "attention_mask": [pad([1] * len(ids), 0) for ids, _ in rows],
        "labels": [pad(labels, 99) for _, labels in rows],
    }


def session(model: Path, **config: Any) -> Session:
    """Returns a session with LoRA of rank 4 on its own copy of the base model."""
    values: dict[str, Any] = {"lora_config": LoRAConfig(rank=4)} | config
    base = Base.load(str(model), cache=Path(tempfile.mkdtemp()))
    return Session(base, TrainingConfig(model_ref=str(model), **values))


def window(of: Session) -> dict[str, torch.Tensor]:
    """Returns copies of the gradient sums that the next step would use."""
    return {name: tensor.clone() for name, tensor in of._window.tensors.items()}


def weights(of: Session) -> dict[str, torch.Tensor]:
    return of.state().weights


def oracle_gradients(of: Session, batch: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]:
    """Returns the summed token gradients of the plain padded loop, by transformers and PEFT alone.

    The loop runs on the session's own parameters, through the model's ordinary masked forward pass.
    """
    ids, mask, labels = (torch.tensor(batch[k]) for k in ("input_ids", "attention_mask", "labels"))
    labels = labels.masked_fill(mask == 0, IGNORED)
    # The first real token of a row has no predictor, also where padding stands before it.
    first = mask.argmax(1)
    labels[torch.arange(len(labels)), first] = IGNORED
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with by_the_book(of.base.model) as model:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum",
        ignore_index=IGNORED,
    )  # fmt: skip
    loss.backward()
    found = {}
    for name, parameter in of._parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


@contextmanager
def by_the_book(model: Any) -> Iterator[Any]:
    """Makes forward passes use transformers' own attention and torch's own layers, not those
    under test."""
    attention = model.config._attn_implementation
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    kinds = [type(layer) for layer in layers]
    model.set_attn_implementation("eager")
    for layer in layers:
        layer.__class__ = torch.nn.Linear
    yield model
    model.set_attn_implementation(attention)
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = kind


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], bound: float) -> None:
    """Checks equal names, and that every tensor is within `bound` of its own largest value."""
    assert a.keys() == b.keys()
    for name in a:
        scale = float(b[name].abs().max())
        worst = float((a[name] - b[name]).abs().max())
        assert worst <= bound * scale, f"{name}: {worst / max(scale, 1e-30):.1e} apart"


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
