"""Imports and exports adapters.

An adapter from elsewhere is imported only if its tensors have exactly the names and shapes that a
run of this service with the same `LoRAConfig` would have saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
from tg_tinker.data.peft_files import CONFIG
from tg_tinker.errors import ArtifactMismatchError, InvalidRequestError, StorageError
from tg_tinker.storage.files import new_file, new_folder, refuse_existing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of adapters that can be imported. Trained adapters are float32, which keeps all values
of these dtypes exactly."""

_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "task_type",
}  # fmt: skip
"""The keys of `adapter_config.json` that change neither the tensors nor their computation."""


def imported(config: Mapping[str, Any], weights: bytes, like: SessionState) -> SessionState:
    """Returns a PEFT adapter as the state of a session before its first step.

    The origin of the adapter is unknown here, so its lineage has no guarantee.

    Args:
        config: the content of `adapter_config.json`.
        weights: the content of `adapter_model.safetensors`.
        like: the state of a fresh session on the base model.

    Raises:
        InvalidRequestError: if the weights are not safetensors, have other dtypes, or hold values
            that are not finite.
        ArtifactMismatchError: if a setting, name or shape differs from those of a run.
    """
    _check_config(config, like.adapter_config or {})
    found = _read(weights)
    _check_tensors(found, like.weights)
    taken = {name: found[name].to(mine.dtype) for name, mine in like.weights.items()}
    lineage = Lineage(like.lineage.base).unguarded()
    return replace(like, weights=taken, optimizer=None, step=0, lineage=lineage)


_INIT = "init_lora_weights"
"""The key for how the tensors were initialized, which has no effect once they are trained. But some
of PEFT's methods (pissa, olora and more) change the base weights too, and then the adapter does not
fit the plain base model."""


def _check_config(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if theirs.get(_INIT, True) not in (True, False, "gaussian"):
        raise ArtifactMismatchError(
            f"adapter_config.json says {_INIT}={theirs[_INIT]!r:.100}: such an adapter needs"
            " changed base weights. Convert it to plain LoRA with PEFT"
            " (path_initial_model_for_weight_conversion of save_pretrained), and import the result"
        )
    for key in sorted(theirs.keys() - _NO_EFFECT - {_INIT}):
        if _comparable(theirs[key]) != _comparable(ours.get(key)):
            raise ArtifactMismatchError(
                f"adapter_config.json says {key!r:.100}: {theirs[key]!r:.100}, but a run here has"
                f" {ours.get(key)!r:.100}: only plain LoRA adapters with the settings of a run can"
                " be imported"
            )


def _comparable(value: Any) -> Any:
    """Returns a value in a form that can be compared.

    The order of a list does not matter. None, false and empty are equal: the feature is off.
    """
    return (sorted(map(str, value)) if isinstance(value, list) else value) or None


def _read(weights: bytes) -> Tensors:
    try:
        return safetensors.torch.load(weights)
    except (SafetensorError, KeyError, ValueError, TypeError):
        raise InvalidRequestError(
            "adapter_model.safetensors is damaged or is no safetensors file: save the adapter again"
            " with PEFT"
        ) from None


def _check_tensors(theirs: Tensors, ours: Tensors) -> None:
    different = sorted(theirs.keys() ^ ours.keys())
    if different:
        name = different[0]
        where = "missing from the adapter" if name in ours else "not a layer that a run would train"
        raise ArtifactMismatchError(
            f"tensor {name!r:.200} is {where} ({len(different)} tensors differ): check that the"
            " adapter was trained on this base model"
        )
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            raise ArtifactMismatchError(
                f"tensor {name} has shape {[*tensor.shape]}, but this base model needs"
                f" {[*ours[name].shape]}: check that the adapter was trained on this base model"
            )
        if tensor.dtype not in DTYPES:
            raise InvalidRequestError(
                f"tensor {name} is {tensor.dtype}: convert the adapter to float32, float16 or"
                " bfloat16"
            )
        if not torch.isfinite(tensor).all():
            raise InvalidRequestError(
                f"tensor {name} holds NaN or infinite values: import an adapter whose values are"
                " finite"
            )


def export_adapter(
    registry: Registry, store: str, tenant: str, artifact_id: str, target: Path
) -> None:
    """Writes an adapter in clear, as a directory that `PeftModel.from_pretrained` reads.

    The adapter names its base model, if its run has a hub id or a directory that exists here.

    Raises:
        InvalidRequestError: if the artifact holds all weights instead of an adapter, or a file of
            an adapter is already there.
        StorageError: if the target's disk is full or refuses. No half-written adapter is left.
    """
    with _refusing(target):
        for name in (WEIGHTS, CONFIG):
            refuse_existing(target / name)
    files = fetch(registry, ArtifactStore(store), registry.data_keys.reader(tenant), artifact_id)
    adapter_config = from_files(files).state.adapter_config
    if adapter_config is None:
        raise InvalidRequestError(
            f"artifact {artifact_id} is of a full fine-tune, not an adapter: choose an artifact of"
            " an adapter, since this version exports adapters only"
        )
    # Only here: what is sealed names no base, and the digests of older artifacts must hold.
    adapter_config["base_model_name_or_path"] = _base(registry, tenant, artifact_id)
    outputs = {
        WEIGHTS: files[WEIGHTS],
        CONFIG: json.dumps(adapter_config, indent=2).encode(),
    }
    # Recorded first: an export that is not in the audit log does not happen.
    registry.audit_log.record_export(tenant, artifact_id)
    with _refusing(target):
        _write(target, outputs)
    keep_newest(registry, ArtifactStore(store), tenant)


@contextmanager
def _refusing(target: Path) -> Iterator[None]:
    """Translates what the disk raises."""
    try:
        yield
    except FileExistsError as error:
        raise InvalidRequestError(
            f"cannot export to {target} ({error.filename} exists): choose a new or empty directory"
        ) from None
    except OSError as error:
        raise StorageError(
            f"cannot export to {target} ({error.strerror}): choose another directory"
        ) from None


def _write(target: Path, outputs: Mapping[str, bytes]) -> None:
    """Writes all files, or leaves none of them."""
    new_folder(target)
    made: list[Path] = []
    try:
        for name, content in outputs.items():
            with new_file(target / name) as file:
                file.write(content)
            made.append(target / name)
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.unlink()
        raise


def _base(registry: Registry, tenant: str, artifact_id: str) -> str | None:
    """Returns the name by which others find the base model of an artifact; None if it has none.

    A GGUF file, and a directory of another machine, are no such names.
    """
    run_id = registry.catalogue.get(tenant, artifact_id).training_client_id
    model_ref = registry.runs.get(tenant, run_id)[0].model_ref
    path = Path(model_ref)
    with suppress(RuntimeError):  # the user in ~user does not exist here
        path = path.expanduser()
    if path.is_dir():
        return str(path)
    a_path = path.exists() or model_ref.startswith(("/", ".", "~")) or model_ref.count("/") != 1
    return None if a_path else model_ref
