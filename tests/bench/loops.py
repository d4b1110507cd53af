"""Defines the measured loops: the loop that a user would write by hand, ours, and Opacus' own.

Each loop takes the same rows of (input_ids, labels) as lists. `evaluate` returns the loss without a
gradient. `train` makes a forward pass, a backward pass and an optimizer step, and returns the loss.
Losses are in nats per labeled token. `LoopSpec` and the constants here set model, rank, targets,
dtype, optimizer, learning rate and clipping for all loops.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from actors.engine.model import Base
from actors.engine.session import Session
from tg_tinker import (
    DPConfig,
    LoRAConfig,
    OptimizerConfig,
    ResourceConfig,
    ServiceClient,
    TrainingConfig,
)
from tg_tinker.client.home import init_home
from tg_tinker.data.batch import normalize

Rows = list[tuple[list[int], list[int]]]
IGNORED = -100
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LEARNING_RATE = 1e-5
CLIP = 1.0


@dataclass(frozen=True)
class LoopSpec:
    """The settings with which a side trains.

    Attributes:
        loop: plain, ours, sdk (ours through Ray), opacus (hooks) or opacus-ghost.
        rank: the rank of the adapter; None trains all weights.
    """

    loop: str
    model: str
    rank: int | None = 16
    private: bool = False
    checkpointing: bool = False
    threads: int | None = None


class Loop(Protocol):
    def evaluate(self, rows: Rows) -> float: ...

    def train(self, rows: Rows) -> float: ...


# --- rows ------------------------------------------------------------------------------------


def ragged(count: int = 8) -> Rows:
    """Returns chats: rows of 32 to 256 tokens, with the first 60 % of each row masked."""
    generator = np.random.default_rng(0)
    rows = []
    for length in np.linspace(32, 256, count).astype(int):
        ids = generator.integers(3, 49_000, length).tolist()
        masked = int(0.6 * length)
        rows.append((ids, [IGNORED] * masked + ids[masked:]))
    return rows


def uniform(count: int = 8, length: int = 128) -> Rows:
    """Returns rows of one length, in which every token is labeled."""
    generator = np.random.default_rng(1)
    ids = generator.integers(3, 49_000, (count, length)).tolist()
    return [(row, row) for row in ids]


# --- the loop that a user would write --------------------------------------------------------


class Plain:
    """A loop of transformers and PEFT: rows padded to the longest, loss on labeled tokens alone."""

    def __init__(self, directory: Path, spec: LoopSpec) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.model.config.use_cache = False
        if spec.rank is not None:
            self.model = self._adapted(spec.rank)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def _adapted(self, rank: int) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        return get_peft_model(self.model, config)

    def backward(self, rows: Rows) -> float:
        self.model.train()
        loss = self.model(**collate(rows)).loss
        loss.backward()
        return float(loss.detach())

    def train(self, rows: Rows) -> float:
        loss = self.backward(rows)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def evaluate(self, rows: Rows) -> float:
        self.model.eval()
        return float(self.model(**collate(rows)).loss)


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    """Returns a batch as wide as the longest row. Padding has neither attention nor loss."""
    ids = [torch.tensor(ids) for ids, _ in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(
            [torch.tensor(labels) for _, labels in rows], batch_first=True, padding_value=IGNORED
        ),
    }


# --- ours ------------------------------------------------------------------------------------


def training_config(spec: LoopSpec) -> TrainingConfig:
    dp = DPConfig(noise_multiplier=1.0, target_epsilon=None, sampling="worst_case")
    clip = None if spec.private else CLIP  # a private run clips every row instead
    return TrainingConfig(
        model_ref=spec.model,
        lora_config=None if spec.rank is None else LoRAConfig(rank=spec.rank),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, max_grad_norm=clip),
        dp_config=dp if spec.private else None,
        resources=ResourceConfig(
            num_threads=spec.threads, activation_checkpointing=spec.checkpointing
        ),
    )


class Ours:
    """The engine in this process: what a training actor runs, without Ray."""

    def __init__(self, base: Base, spec: LoopSpec) -> None:
        from actors.privacy.session import PrivateSession
        from support.privacy_helpers import new_budget, registry

        config, self._folder = training_config(spec), scratch() if spec.private else None
        if self._folder:
            budget = new_budget(registry(Path(self._folder.name) / "home"), config)
            self.session: Session = PrivateSession(base, config, budget)
        else:
            self.session = Session(base, config)

    @property
    def model(self) -> Any:
        return self.session.base.model

    def train(self, rows: Rows) -> float:
        loss = self.session.forward_backward(normalize(as_batch(rows))).loss
        self.session.optim_step()
        return loss

    def evaluate(self, rows: Rows) -> float:
        return self.session.forward_backward(normalize(as_batch(rows)), train=False).loss

    def close(self) -> None:
        if self._folder:
            self._folder.cleanup()


class ThroughSdk:
    """A `TrainingClient` on an embedded cluster. It awaits both calls, as the slowest user does."""

    def __init__(self, spec: LoopSpec, models: Path) -> None:
        self._folder = scratch()
        home = Path(self._folder.name) / "home"
        init_home(home)
        (home / "models").symlink_to(models)
        os.environ["TG_TINKER_HOME"] = str(home)
        self._service = ServiceClient(address="local")
        self._client = self._service.create_training_client(training_config(spec))

    def train(self, rows: Rows) -> float:
        self._client.train()
        found = self._client.forward_backward(as_batch(rows)).result()
        self._client.optim_step().result()
        return found.loss

    def evaluate(self, rows: Rows) -> float:
        self._client.eval()
        return self._client.forward_backward(as_batch(rows)).result().loss

    def close(self) -> None:
        self._service.close()
        self._folder.cleanup()


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Returns a temporary folder for a home that ends with its side.

    It is not in /tmp, which may be in memory, where a durable charge costs nothing. It is not the
    user's own home, whose log is for real runs.
    """
    return tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-")


def as_batch(rows: Rows) -> dict[str, Any]:
    return {"input_ids": [r[0] for r in rows], "labels": [r[1] for r in rows]}


# --- Opacus ----------------------------------------------------------------------------------


class Opacus(Plain):
    """The plain loop with Opacus' own parts: hooks that store gradients, or ghost clipping."""

    def __init__(self, directory: Path, spec: LoopSpec) -> None:
        import opacus.optimizers as optimizers
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

        super().__init__(directory, spec)
        self._ghost = spec.loop == "opacus-ghost"
        options: dict[str, Any] = {"loss_reduction": "sum", "strict": False}
        self.model = (
            GradSampleModuleFastGradientClipping(self.model, max_grad_norm=CLIP, **options)
            if self._ghost
            else GradSampleModule(self.model, **options)
        )
        kind = optimizers.DPOptimizerFastGradientClipping if self._ghost else optimizers.DPOptimizer
        self.optimizer = kind(
            self.optimizer, noise_multiplier=1.0, max_grad_norm=CLIP, expected_batch_size=8,
            loss_reduction="sum",
        )  # fmt: skip

    def train(self, rows: Rows) -> float:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        self.model.train()
        batch = collate(rows)
        labels = batch.pop("labels")[:, 1:]
        logits = self.model(**batch).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
        )
        by_row = losses.view(labels.shape).sum(1) / (labels != IGNORED).sum(1)
        if self._ghost:
            DPTensorFastGradientClipping(self.model, self.optimizer, by_row, "sum").backward()
        else:
            by_row.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(by_row.detach().mean())


def build(spec: LoopSpec, cache: Path) -> Loop:
    if spec.loop == "sdk":
        return ThroughSdk(spec, cache)
    base = Base.load(spec.model, cache=cache)
    if spec.loop == "ours":
        return Ours(base, spec)
    directory = base.directory
    del base  # so that the plain loop's process holds only its own weights
    return Plain(directory, spec) if spec.loop == "plain" else Opacus(directory, spec)
