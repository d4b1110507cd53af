"""Adapters from elsewhere: taken over only if they are, to the name and shape, what a run of this
service with the same `LoRAConfig` would have saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from actors.artifacts.fetch import fetch
from actors.engine.checkpoint import WEIGHTS, SessionState, from_files
from actors.engine.gradients import Tensors
from actors.engine.lineage import Lineage
from actors.registry.registry import Registry
from actors.registry.rollback import keep_newest
from actors.storage.store import ArtifactStore
from tg_tinker.errors import ArtifactMismatchError, InvalidRequestError, StorageError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Their values are kept exactly: trained adapters are float32."""

_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "task_type",
}  # fmt: skip
"""Keys of `adapter_config.json` that change neither tensors nor what is computed with them."""


def imported(config: Mapping[str, Any], weights: bytes, like: SessionState) -> SessionState:
    """A PEFT adapter as the state of a session before its first step.

    Where it comes from nobody knows here: its lineage is without a guarantee.

    Args:
        config: `adapter_config.json`.
        weights: `adapter_model.safetensors`.
        like: the state of a fresh session on the base model.

    Raises:
        InvalidRequestError: no safetensors, other dtypes, or values that are not finite.
        ArtifactMismatchError: a setting, name or shape that a run would not have.
    """
    _check_config(config, like.adapter_config or {})
    found = _read(weights)
    _check_tensors(found, like.weights)
    taken = {name: found[name].to(mine.dtype) for name, mine in like.weights.items()}
    lineage = Lineage(like.lineage.base).unguarded()
    return replace(like, weights=taken, optimizer=None, step=0, lineage=lineage)


_INIT = "init_lora_weights"
"""How the tensors began: without effect once they are trained. But PEFT's other kinds (pissa, olora
and more) change the base weights too: such an adapter fits no plain base model."""


def _check_config(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if theirs.get(_INIT, True) not in (True, False, "gaussian"):
        raise ArtifactMismatchError(
            f"adapter_config.json says {_INIT}={theirs[_INIT]!r:.100}: such an adapter belongs to"
            " base weights that were changed. Convert it to plain LoRA with PEFT"
            " (path_initial_model_for_weight_conversion of save_pretrained), and import that"
        )
    for key in sorted(theirs.keys() - _NO_EFFECT - {_INIT}):
        if _comparable(theirs[key]) != _comparable(ours.get(key)):
            raise ArtifactMismatchError(
                f"adapter_config.json says {key!r:.100}: {theirs[key]!r:.100}, a run here has"
                f" {ours.get(key)!r:.100}: such adapters are not imported"
            )


def _comparable(value: Any) -> Any:
    """Lists are sets of names; nothing, false and empty are the same: the feature is off."""
    return (sorted(map(str, value)) if isinstance(value, list) else value) or None


def _read(weights: bytes) -> Tensors:
    try:
        return safetensors.torch.load(weights)
    except (SafetensorError, KeyError, ValueError, TypeError):
        raise InvalidRequestError(
            "adapter_model.safetensors is damaged, or is no safetensors file"
        ) from None


def _check_tensors(theirs: Tensors, ours: Tensors) -> None:
    different = sorted(theirs.keys() ^ ours.keys())
    if different:
        name = different[0]
        where = "missing from the adapter" if name in ours else "not a layer that a run would train"
        raise ArtifactMismatchError(
            f"tensor {name!r:.200} is {where} ({len(different)} differ): is it of this base model?"
        )
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            raise ArtifactMismatchError(
                f"tensor {name} has shape {[*tensor.shape]}, on this base model it has"
                f" {[*ours[name].shape]}"
            )
        if tensor.dtype not in DTYPES:
            raise InvalidRequestError(
                f"tensor {name} is {tensor.dtype}: adapters are float32, float16 or bfloat16"
            )
        if not torch.isfinite(tensor).all():
            raise InvalidRequestError(f"tensor {name} holds NaN or infinite values")


def export_adapter(
    registry: Registry, store: str, tenant: str, artifact_id: str, target: Path
) -> None:
    """Writes an adapter in clear, as the directory that `PeftModel.from_pretrained` reads.

    Raises:
        InvalidRequestError: the artifact holds all weights, not an adapter.
        StorageError: the target's disk is full or refuses; no half-written adapter is left.
    """
    files = fetch(registry, ArtifactStore(store), registry.data_keys.reader(tenant), artifact_id)
    adapter_config = from_files(files).state.adapter_config
    if adapter_config is None:
        raise InvalidRequestError(
            f"artifact {artifact_id} is of a full fine-tune, not an adapter; this version exports"
            " adapters only"
        )
    outputs = {
        WEIGHTS: files[WEIGHTS],
        "adapter_config.json": json.dumps(adapter_config, indent=2).encode(),
    }
    registry.audit_log.record_export(
        tenant, artifact_id
    )  # what is not in the audit log is not exported
    try:
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in outputs.items():
            (target / name).touch(mode=0o600)
            (target / name).write_bytes(content)
    except BaseException as error:
        for name in outputs:
            with suppress(OSError):
                (target / name).unlink()
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"cannot export to {target} ({error.strerror}): choose another directory"
        ) from None
    keep_newest(registry, ArtifactStore(store), tenant)
