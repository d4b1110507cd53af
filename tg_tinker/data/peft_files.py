"""Reads a LoRA adapter from a directory that PEFT wrote: JSON and safetensors, never a pickle.

This module makes the checks that need no model. `actors.artifacts.adapters` then checks that the
tensors are those of a run on the model.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tg_tinker.config import LoRAConfig
from tg_tinker.errors import InvalidRequestError, NotFoundError, StorageError
from tg_tinker.storage.files import opened_regular

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_CONFIG_BYTES, MOST_WEIGHT_BYTES = 2**20, 2**30
MOST_KEYS, MOST_LEVELS = 200, 8
"""The maximum number of keys of each object in the config, and of objects and lists in another."""


@dataclass(frozen=True, repr=False)
class PeftFiles:
    """The contents of an adapter's directory.

    Attributes:
        config: the whole `adapter_config.json`.
        lora: the settings in `config` that determine the names and shapes of the tensors.
        weights: the bytes of `adapter_model.safetensors`, not parsed yet.
    """

    config: dict[str, Any]
    lora: LoRAConfig
    weights: bytes

    @classmethod
    def read(cls, directory: Path) -> PeftFiles:
        """Returns the adapter in a directory.

        Raises:
            NotFoundError: the directory or a file does not exist.
            InvalidRequestError: the weights are a pickle, a file is too large, or the adapter is
                none that `LoRAConfig` can describe.
            StorageError: a file cannot be read.
        """
        if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
            raise InvalidRequestError(
                "adapter_model.bin is a pickle, which may run code when it is read: if you trust"
                " it, load it with PEFT and save_pretrained(path, safe_serialization=True)"
            )
        config = _config(_content(directory / CONFIG, MOST_CONFIG_BYTES))
        lora = _lora(config)
        return cls(config, lora, _content(directory / WEIGHTS, MOST_WEIGHT_BYTES))


def _content(path: Path, most: int) -> bytes:
    try:
        with opened_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(most + 1) if size <= most else b""
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"{path} does not exist: name the directory that PEFT's save_pretrained wrote, with"
            f" {CONFIG} and {WEIGHTS}"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot read {path} ({error.strerror})") from None
    if max(size, len(content)) > most:
        raise InvalidRequestError(
            f"{path.name} has {max(size, len(content))} bytes, more than the {most} that can be"
            " imported: check that it is an adapter"
        )
    return content


def _config(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content, object_pairs_hook=_once_each)
    except _TwiceError:
        raise InvalidRequestError(f"{CONFIG} has one key twice: remove one of the two") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise InvalidRequestError(
            f"{CONFIG} is not from a LoRA adapter: peft_type must be LORA, the only type that"
            " TG-Tinker trains"
        )
    if not _is_bounded(found):
        raise InvalidRequestError(
            f"{CONFIG} has more than {MOST_KEYS} keys, or more than {MOST_LEVELS} levels: check"
            " that PEFT wrote it"
        )
    return found


def _is_bounded(value: Any, levels: int = MOST_LEVELS) -> bool:
    """Returns whether a JSON value is small enough to be compared and repeated in messages."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    keys = len(value) if isinstance(value, dict) else 0
    return levels > 0 and keys <= MOST_KEYS and all(_is_bounded(one, levels - 1) for one in inside)


class _TwiceError(ValueError):
    pass


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs as a dict; rejects a repeated key.

    PEFT would use one value of a repeated key, and a person might read the other.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError
    return found


def _lora(config: dict[str, Any]) -> LoRAConfig:
    """Returns the `LoRAConfig` of a run that would train this adapter.

    The actor compares the rest of the file with that run.
    """
    missing = sorted({"r", "lora_alpha", "lora_dropout", "target_modules", "bias"} - config.keys())
    if missing:
        raise InvalidRequestError(
            f"{CONFIG} has no {missing[0]}: save the adapter again with PEFT, which writes it"
        )
    targets = config["target_modules"]
    if isinstance(targets, str):
        raise InvalidRequestError(
            f"{CONFIG} has a pattern as target_modules: list the names of the layers instead"
        )
    for name in ("r", "lora_alpha", "lora_dropout"):
        if isinstance(config[name], bool) or not isinstance(config[name], int | float):
            raise InvalidRequestError(f"{name} in {CONFIG} must be a number")
    return LoRAConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        target_modules=tuple(sorted(targets)) if _texts(targets) else targets,
        bias=config["bias"],
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
