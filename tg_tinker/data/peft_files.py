"""A LoRA adapter in a directory as PEFT writes it: JSON and safetensors, never a pickle.

Here is checked what needs no model; that the tensors are those of a run on the model, the actor
checks (`actors.artifacts.adapters`).
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tg_tinker.config import LoRAConfig
from tg_tinker.errors import InvalidRequestError, NotFoundError, StorageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_CONFIG_BYTES, MOST_WEIGHT_BYTES = 2**20, 2**30


@dataclass(frozen=True, repr=False)
class PeftFiles:
    """What the directory holds.

    Attributes:
        config: the whole `adapter_config.json`.
        lora: the part of it that shapes the tensors.
        weights: `adapter_model.safetensors`, not looked into yet.
    """

    config: dict[str, Any]
    lora: LoRAConfig
    weights: bytes

    @classmethod
    def read(cls, directory: Path) -> PeftFiles:
        """The adapter of a directory.

        Raises:
            NotFoundError: there is no such directory, or a file is missing.
            InvalidRequestError: a pickle, a file that is too large, or no LoRA adapter that
                `LoRAConfig` can describe.
            StorageError: a file cannot be read.
        """
        if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
            raise InvalidRequestError(
                "adapter_model.bin is a pickle, which may run code when it is read: where you trust"
                " it, load it with PEFT and save_pretrained(path, safe_serialization=True)"
            )
        config = _config(_content(directory / CONFIG, MOST_CONFIG_BYTES))
        lora = _lora(config)
        return cls(config, lora, _content(directory / WEIGHTS, MOST_WEIGHT_BYTES))


def _content(path: Path, most: int) -> bytes:
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise InvalidRequestError(f"{path.name} is no plain file: nothing of it was read")
        if (size := state.st_size) > most:
            raise InvalidRequestError(
                f"{path.name} has {size} bytes, at most {most} are imported: is it an adapter?"
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"{path} does not exist: name the directory that PEFT's save_pretrained wrote, with"
            f" {CONFIG} and {WEIGHTS}"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot read {path} ({error.strerror})") from None


def _config(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content, object_pairs_hook=_once_each)
    except _TwiceError:
        raise InvalidRequestError(f"{CONFIG} says one name twice: leave one of them") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise InvalidRequestError(
            f"{CONFIG} is not of a LoRA adapter: its peft_type must be LORA, others are not trained"
            " here"
        )
    return found


class _TwiceError(ValueError):
    pass


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that is there twice, PEFT would take one value and a reader see the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError
    return found


def _lora(config: dict[str, Any]) -> LoRAConfig:
    """The run that would train it; whether the rest of the file agrees, the actor compares."""
    missing = sorted({"r", "lora_alpha", "lora_dropout", "target_modules", "bias"} - config.keys())
    if missing:
        raise InvalidRequestError(f"{CONFIG} does not say {missing[0]}: PEFT writes it")
    targets = config["target_modules"]
    if isinstance(targets, str):
        raise InvalidRequestError(
            f"{CONFIG} has a pattern as target_modules: list the names of the layers instead"
        )
    for name in ("r", "lora_alpha", "lora_dropout"):
        if isinstance(config[name], bool) or not isinstance(config[name], int | float):
            raise InvalidRequestError(f"{CONFIG} has no number as {name}")
    return LoRAConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        target_modules=tuple(sorted(targets)) if _texts(targets) else targets,
        bias=config["bias"],
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
