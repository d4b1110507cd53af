"""Estimates the least memory that a run needs, measures free memory, and returns freed memory.

The estimate uses only the shapes of the model, before anything is loaded. `check_room` and
`check_conversion` only compare and raise; the callers decide when to check.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from actors.engine.losses import LOGIT_BYTES
from actors.engine.weights import Shapes, stored_shapes
from tg_tinker.config import LoRAConfig, TrainingConfig
from tg_tinker.errors import PlacementError

TOKENS = 128
"""The tokens of the batch whose activations count: too little memory for them refuses a run."""

KEPT_FREE = 0.05
"""The fraction of a node's memory to keep free: above 95 % Ray ends processes."""

_MOMENTS = {"adamw": 2, "adam": 2}
"""The number of moments as large as the trained tensors. Adafactor keeps rows and columns only."""
_EMBEDDINGS = ("embed", "lm_head", "wte", "wpe")


@dataclass(frozen=True)
class Estimate:
    """The memory of a whole run on one device, in bytes.

    Attributes:
        weights: the base model. On CPU the clients of a node share it, except in full fine-tuning.
        trained: the adapter; 0 in full fine-tuning.
        gradients: the gradients of one call, and their sum over the calls of a step.
        optimizer: the moments, and averages of the weights.
        activations: the activations of `TOKENS` tokens, and as many logits as exist at a time.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate(
    shapes: Shapes, sizes: Mapping[str, Any], dtype: torch.dtype, config: TrainingConfig
) -> Estimate:
    """Returns the estimate for training as configured.

    Args:
        shapes: the shapes of the stored weights, by name.
        sizes: the model's `config.json`.
    """
    values, width = sum(map(math.prod, shapes.values())), dtype.itemsize
    lora = config.lora_config
    trained = values if lora is None else adapter_values(shapes, lora)
    moved = trained_values(shapes, lora) if lora is not None and lora.freeze_a else trained
    each = width if lora is None else 4  # adapters are float32
    # A private run holds autograd's gradient, the unit's in float32, and the sums of this call and
    # of the window in float64.
    gradient = each + 4 + 2 * 8 if config.private else 2 * each
    optimizer = config.optimizer
    moments = _MOMENTS.get(optimizer.name, int(optimizer.momentum > 0))
    in_float32 = (optimizer.ema_decay is not None) + (optimizer.tail_from is not None)
    if optimizer.noise_correction:
        moments, in_float32 = 0, in_float32 + moments
    return Estimate(
        weights=values * width,
        trained=0 if lora is None else trained * each,
        gradients=gradient * moved,
        optimizer=moved * (moments * each + 4 * in_float32),
        activations=_activations(sizes, width),
    )


def adapter_values(shapes: Shapes, lora: LoRAConfig) -> int:
    """Returns the number of values in an adapter."""
    return sum(lora.rank * sum(shape) for shape in _adapted_shapes(shapes, lora))


def trained_values(shapes: Shapes, lora: LoRAConfig) -> int:
    """Returns the number of values in the B matrices, which `freeze_a` alone trains.

    The few models with transposed linear layers (GPT-2) count the A matrices instead.
    """
    return sum(lora.rank * shape[0] for shape in _adapted_shapes(shapes, lora))


def _adapted_shapes(shapes: Shapes, lora: LoRAConfig) -> Iterator[tuple[int, ...]]:
    for name, shape in shapes.items():
        if len(shape) == 2 and _adapted(name.removesuffix(".weight"), lora):
            yield shape


def _adapted(name: str, lora: LoRAConfig) -> bool:
    if ".experts." in name:
        return False  # stored one by one, but one parameter of the loaded model
    if lora.target_modules == "all-linear":
        return not any(part in name for part in _EMBEDDINGS)
    return any(f".{name}".endswith(f".{target}") for target in lora.target_modules)


def _activations(sizes: Mapping[str, Any], width: int) -> int:
    """Returns the bytes of activations and logits. A size that the config lacks counts as zero."""
    hidden = sizes.get("hidden_size") or 0
    inner = sizes.get("intermediate_size") or 0
    in_layers = (sizes.get("num_hidden_layers") or 0) * (8 * hidden + 3 * inner) * width
    logits = min(TOKENS * 4 * (sizes.get("vocab_size") or 0), LOGIT_BYTES)
    return int(TOKENS * in_layers + 2 * logits)


# --- what there is ---------------------------------------------------------------------------


def host_memory(root: Path = Path("/")) -> int:
    """Returns the bytes that processes of this node can still get, within its container if any.

    Pages of mapped files count as free, as the kernel counts them, because clients share the pages
    of weights.

    Args:
        root: the directory that holds the kernel's `proc` and `sys`.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    known = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    free, total = known["MemAvailable"], known["MemTotal"]
    try:
        group = root / "sys/fs/cgroup"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cached["active_file"]) + int(cached["inactive_file"]))
        total = min(total, limit)
    except (OSError, ValueError, KeyError):
        pass  # there is no container, or it has no limit
    return int(free - KEPT_FREE * total)


def device_memory(share: float) -> int:
    """Returns the bytes left on the GPU, at most the client's fraction of all its memory.

    Args:
        share: the fraction of the GPU that the client asked for; 0 or at least 1 sets no limit.
    """
    free, total = torch.cuda.mem_get_info()
    return min(int(free), int(share * total) if 0 < share < 1 else int(total))


def check_room(config: TrainingConfig, model: Path, dtype: torch.dtype) -> None:
    """Raises PlacementError, with the sizes, if a run cannot fit beside what already runs."""
    sizes = json.loads((model / "config.json").read_text())
    sizes = sizes.get("text_config", sizes)
    wanted = estimate(stored_shapes(model), sizes, dtype, config)
    gpu = torch.cuda.is_available()
    free = device_memory(config.resources.num_gpus or 0) if gpu else host_memory()
    if wanted.total <= free:
        return
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in asdict(wanted).items())
    raise PlacementError(
        f"this run needs at least {_gb(wanted.total)} GB ({parts}), but its"
        f" {'GPU' if gpu else 'node'} has {_gb(free)} GB free: use a smaller model or dtype, train"
        " an adapter, close a client, or pin the run to a larger node",
        details={"needed": wanted.total, "available": free} | asdict(wanted),
    )


def check_conversion(values: int, dtype: torch.dtype) -> None:
    """Raises PlacementError if the node has too little memory to hold the converted model once."""
    needed, free = values * dtype.itemsize, host_memory()
    if needed > free:
        raise PlacementError(
            f"converting the model needs {_gb(needed)} GB, but its node has {_gb(free)} GB free:"
            " convert it on a larger machine, or use a smaller model",
            details={"needed": needed, "available": free},
        )


def give_back() -> None:
    """Returns memory that was freed but that the allocator keeps to the system.

    After a large step that can be gigabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
