"""What a run needs of memory at least, told by its model's shapes before anything is loaded; what
its node or GPU has; and memory handed back.

Who is refused is up to the callers: `check_room` and `check_conversion` only compare and raise.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from actors.engine.losses import LOGIT_BYTES
from tg_tinker.config import LoRAConfig, TrainingConfig
from tg_tinker.errors import PlacementError

TOKENS = 128
"""Of the batch whose activations count: a run that has no room for so few is refused."""

KEPT_FREE = 0.05
"""Of a node's memory: above 95 % Ray ends processes."""

_MOMENTS = {"adamw": 2, "adam": 2}
"""As large as what trains; adafactor keeps rows and columns only."""
_EMBEDDINGS = ("embed", "lm_head", "wte", "wpe")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Estimate:
    """Bytes, of the whole run on one device.

    Attributes:
        weights: of the base model. On CPU the clients of a node share them, except where all train.
        trained: the adapter; 0 where the weights themselves train.
        gradients: of one call, and their sum over the calls of a step.
        optimizer: moments.
        activations: of `TOKENS` tokens, and as many logits as exist at a time.
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
    """Of training as configured.

    Args:
        shapes: of the stored weights, by name.
        sizes: the model's `config.json`.
    """
    values, width = sum(map(math.prod, shapes.values())), dtype.itemsize
    lora = config.lora_config
    trained = values if lora is None else adapter_values(shapes, lora)
    each = width if lora is None else 4  # adapters are float32
    copies = 4 if config.private else 2  # a unit's, clipped, of this call, of the window
    moments = _MOMENTS.get(config.optimizer.name, int(config.optimizer.momentum > 0))
    return Estimate(
        weights=values * width,
        trained=0 if lora is None else trained * each,
        gradients=copies * trained * each,
        optimizer=moments * trained * each,
        activations=_activations(sizes, width),
    )


def adapter_values(shapes: Shapes, lora: LoRAConfig) -> int:
    """How many numbers an adapter has."""
    return sum(
        lora.rank * sum(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and _adapted(name.removesuffix(".weight"), lora)
    )


def _adapted(name: str, lora: LoRAConfig) -> bool:
    if lora.target_modules == "all-linear":
        return not any(part in name for part in _EMBEDDINGS)
    return any(f".{name}".endswith(f".{target}") for target in lora.target_modules)


def _activations(sizes: Mapping[str, Any], width: int) -> int:
    """Zero for what the model's config does not tell."""
    hidden = sizes.get("hidden_size") or 0
    inner = sizes.get("intermediate_size") or 0
    in_layers = (sizes.get("num_hidden_layers") or 0) * (8 * hidden + 3 * inner) * width
    logits = min(TOKENS * 4 * (sizes.get("vocab_size") or 0), LOGIT_BYTES)
    return int(TOKENS * in_layers + 2 * logits)


# --- what there is ---------------------------------------------------------------------------


def stored_shapes(directory: Path) -> Shapes:
    """From the headers of a directory's safetensors."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        # Not "pt": it maps the file to be written, which Linux refuses above all memory.
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                found[name] = tuple(opened.get_slice(name).get_shape())
    return found


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that processes of this node can still get: of the machine, or of its container.

    Pages of mapped files count as free, as the kernel counts them: clients share those of weights.

    Args:
        root: where the kernel tells about itself.
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
        pass  # no container, or one without a limit
    return int(free - KEPT_FREE * total)


def device_memory(share: float) -> int:
    """Bytes left of the GPU; a client that asked for a fraction may have that fraction of it."""
    free, total = torch.cuda.mem_get_info()
    return min(int(free), int(share * total) if 0 < share < 1 else int(total))


def check_room(config: TrainingConfig, model: Path, dtype: torch.dtype) -> None:
    """Raises PlacementError, with the numbers, if a run cannot fit beside what runs already."""
    sizes = json.loads((model / "config.json").read_text())
    sizes = sizes.get("text_config", sizes)
    wanted = estimate(stored_shapes(model), sizes, dtype, config)
    gpu = torch.cuda.is_available()
    free = device_memory(config.resources.num_gpus or 0) if gpu else host_memory()
    if wanted.total <= free:
        return
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in asdict(wanted).items())
    raise PlacementError(
        f"this run needs at least {_gb(wanted.total)} GB ({parts}), its"
        f" {'GPU' if gpu else 'node'} has {_gb(free)} GB: take a smaller model or dtype, train an"
        " adapter, close a client, or pin the run to a larger node",
        details={"needed": wanted.total, "available": free} | asdict(wanted),
    )


def check_conversion(values: int, dtype: torch.dtype) -> None:
    """Raises PlacementError if a model to convert cannot be held once."""
    needed, free = values * dtype.itemsize, host_memory()
    if needed > free:
        raise PlacementError(
            f"the model needs {_gb(needed)} GB to be converted, its node has {_gb(free)} GB:"
            " convert it on a larger machine, or take a smaller one",
            details={"needed": needed, "available": free},
        )


def give_back() -> None:
    """What was freed and the allocator keeps, to the system: after a large step it is gigabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
