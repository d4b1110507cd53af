"""Base models found, converted once, read, and told apart by a digest.

Weights are always read from a safetensors directory in the compute dtype, so that all actors of a
node share its pages by mmap; whatever is not one is converted once into the cache. What a model
can do is found out in `model`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from actors.engine.memory import check_conversion, stored_shapes
from tg_tinker.errors import InvalidRequestError, NotFoundError, StorageError, TGTinkerError

Progress = Callable[[str], None]

CheckRoom = Callable[[Path, torch.dtype], None]

_CACHE_VERSION = 1
_STALE_S = 86_400  # a conversion older than a day was killed
_WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def prepare(model_ref: str, dtype: torch.dtype, cache: Path, progress: Progress) -> Path:
    """A directory whose safetensors hold `dtype`: the model's own, or one in the cache."""
    source = _locate(model_ref, progress)
    if source.is_dir() and _stored_dtypes(source) <= {dtype}:
        return source
    progress("hashing the model file")
    identity = _file_digest(source) if source.is_file() else _folder_digest(source)
    name = str(dtype).removeprefix("torch.")
    target = cache / f"v{_CACHE_VERSION}-{identity[:32]}-{name}"
    if not target.exists():
        values = _stored_values(source)
        check_conversion(values, dtype)
        progress(f"converting {values / 1e6:,.0f} million parameters to {name} safetensors, once")
        _convert(source, dtype, target)
    return target


@contextmanager
def explained(model_ref: str) -> Iterator[None]:
    """What transformers and the disk raise while a model is loaded, as our errors."""
    try:
        yield
    except TGTinkerError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise InvalidRequestError(
            f"model_ref {model_ref!r} does not fit into this node's memory: take a smaller model, a"
            " smaller dtype, or a larger node"
        ) from None
    except ImportError as error:
        raise InvalidRequestError(
            f"model_ref {model_ref!r} needs the package {error.name!r}: pip install"
            f" {error.name or 'tg-tinker[demo]'}"
        ) from None
    except Exception as error:
        raise InvalidRequestError(
            f"model_ref {model_ref!r} cannot be loaded ({type(error).__name__}): its files are"
            " damaged, or transformers does not know it as a causal language model"
        ) from None


def _locate(model_ref: str, progress: Progress) -> Path:
    path = Path(model_ref).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path.resolve()
    if path.is_dir() and (path / "config.json").exists():
        return path.resolve()
    if path.exists() or model_ref.startswith(("/", ".", "~")) or model_ref.count("/") != 1:
        raise NotFoundError(
            f"model_ref {model_ref!r} is neither a GGUF file nor a directory with config.json on"
            " this node, nor a hub id such as 'org/name'"
        )
    progress("fetching from the hub")
    return _from_hub(model_ref)


def _from_hub(model_ref: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_ref, allow_patterns=list(_WEIGHTS)))
    except Exception as error:
        raise NotFoundError(
            f"the hub gave no model {model_ref!r} ({type(error).__name__}): check the name, the"
            " network and HF_TOKEN, or pass a local directory or GGUF file"
        ) from None


def _stored_dtypes(directory: Path) -> set[torch.dtype]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise NotFoundError(
            f"{directory} has no .safetensors file: other formats may run code when they are read"
        )
    found = set()
    for file in files:
        with safe_open(file, "np") as opened:  # as `stored_shapes`
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return {names.get(name, torch.float64) for name in found}


def _stored_values(source: Path) -> int:
    if source.is_dir():
        return sum(map(math.prod, stored_shapes(source).values()))
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(source).tensors)


def _convert(source: Path, dtype: torch.dtype, target: Path) -> None:
    """Writes `target` whole or not at all: a directory of another name, renamed at the end."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for stale in target.parent.glob(".converting-*"):
        if time.time() - stale.stat().st_mtime > _STALE_S:
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        if source.is_file():
            options: dict[str, Any] = {
                "gguf_file": source.name,
                "quantization_config": GgufConfig(gguf_file=source.name, dequantize=True),
            }
            folder, tokenizer_options = source.parent, {"gguf_file": source.name}
        else:
            folder, options, tokenizer_options = source, {}, {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **tokenizer_options)
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        except (OSError, SafetensorError):
            raise StorageError(
                f"the converted model could not be written to {target.parent}: free some space, or"
                " point TG_TINKER_HOME elsewhere"
            ) from None
        os.sync()  # its bytes before its name, should the power fail
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # another actor was first: its copy serves as well
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def from_directory(directory: Path, dtype: torch.dtype, implementation: str | None) -> Any:
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    options: Mapping[str, Any] = {"local_files_only": True, "config": config, "dtype": dtype}
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation=implementation, **options
        ).eval()
    except ValueError:
        if implementation is None:
            raise
        # This architecture takes no foreign attention: the probe will find rows mixed.
        return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def beside(work: Callable[[Path], str], directory: Path) -> Future[str]:
    """Runs `work` in a thread of its own: hashing takes no part of Python's lock."""
    with_one = ThreadPoolExecutor(1)
    try:
        return with_one.submit(work, directory)
    finally:
        with_one.shutdown(wait=False)


def digest_of(directory: Path) -> str:
    """Identity of a base model: its weights, and its config without what names or dates it."""
    config = json.loads((directory / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    described = json.dumps(config, sort_keys=True) + _listing(directory, "*.safetensors")
    return "sha256:" + hashlib.sha256(described.encode()).hexdigest()


def _folder_digest(directory: Path) -> str:
    """Identity of all that a conversion reads: weights, configs, tokenizer, chat template."""
    return hashlib.sha256(_listing(directory, *_WEIGHTS).encode()).hexdigest()


def _listing(directory: Path, *patterns: str) -> str:
    """A line of name and digest for each matching file, in the order of names."""
    files = sorted(file for pattern in patterns for file in directory.glob(pattern))
    return "".join(f"{file.name} {_file_digest(file)}\n" for file in files)


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def eos_ids(model: Any) -> frozenset[int]:
    found: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)
