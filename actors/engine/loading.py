"""Finds base models, converts them once, and reads them through the view of `model_files`.

Weights are always read from a safetensors directory in the compute dtype, so that all actors of a
node share its pages by mmap. Any other model is converted once into the cache. `model` probes the
abilities of a model.
"""

from __future__ import annotations

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

from actors.engine.memory import check_conversion
from actors.engine.model_files import GGUF, Identity, ModelFiles, opened
from actors.engine.weights import INDEX, WHOLE, entry, indexed, stored_shapes, weight_files
from tg_tinker.data.template import end_ids
from tg_tinker.data.text import load_tokenizer
from tg_tinker.errors import InvalidRequestError, NotFoundError, StorageError, TGTinkerError
from tg_tinker.storage.paths import expanded

Progress = Callable[[str], None]

CheckRoom = Callable[[Path, torch.dtype], None]

_CACHE_VERSION = 2
_STALE_S = 86_400  # a conversion that is older than a day was killed
_BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")
_ADAPTER = "adapter_config.json"


@contextmanager
def prepared(
    model_ref: str, dtype: torch.dtype, cache: Path, progress: Progress
) -> Iterator[tuple[ModelFiles, ModelFiles]]:
    """Yields the open files of a model as the user has it, and of one that holds `dtype`.

    The second is the first if its weights have this dtype, else its conversion in the cache.
    """
    with opened(_locate(model_ref, progress)) as given:
        if not given.is_gguf and _stored_dtypes(given.view) <= {dtype}:
            yield given, given
            return
        progress("hashing the model file")
        name = str(dtype).removeprefix("torch.")
        target = cache / f"v{_CACHE_VERSION}-{given.contents()[:32]}-{name}"
        if not target.exists():
            values = _stored_values(given)
            check_conversion(values, dtype)
            progress(
                f"converting {values / 1e6:,.0f} million parameters to {name} safetensors, once"
            )
            _convert(given, dtype, target)
        with opened(target.resolve()) as converted:
            yield given, converted


@contextmanager
def explained(model_ref: str) -> Iterator[None]:
    """Translates what transformers and the disk raise while a model loads into `TGTinkerError`."""
    try:
        yield
    except TGTinkerError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise InvalidRequestError(
            f"model_ref {model_ref!r} does not fit into this node's memory: use a smaller model, a"
            " smaller dtype, or a larger node"
        ) from None
    except ImportError as error:
        raise InvalidRequestError(
            f"model_ref {model_ref!r} needs the package {error.name!r}, which is not installed"
            " here: install it with pip; what GGUF files need is in the extra 'demo' (in a clone:"
            " pip install -e '.[demo]')"
        ) from None
    except Exception as error:
        # The system's own errors have a number; those that transformers raises have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(
                f"model_ref {model_ref!r} cannot be read on this node ({error.strerror}): check"
                " that the user of the cluster may read its files and enter their folders, and that"
                " no disk is full or gone"
            ) from None
        raise InvalidRequestError(
            f"model_ref {model_ref!r} cannot be loaded ({type(error).__name__}): its files are"
            " damaged, or transformers does not support it as a causal language model"
        ) from None


def _locate(model_ref: str, progress: Progress) -> Path:
    path = expanded(Path(model_ref))
    _refuse_adapter(path, model_ref)
    if path.is_file() and path.suffix == ".gguf":
        return path.resolve()
    if path.is_dir() and (path / "config.json").exists():
        return path.resolve()
    if path.exists() or model_ref.startswith(("/", ".", "~")) or model_ref.count("/") != 1:
        raise NotFoundError(
            f"model_ref {model_ref!r} is not a GGUF file on this node, a directory with config.json"
            " on this node, or a hub id such as 'org/name'"
        )
    progress("fetching from the hub")
    return _from_hub(model_ref)


def _refuse_adapter(directory: Path, model_ref: str) -> None:
    """Raises if a folder holds an adapter, whose base model transformers would load instead."""
    if (directory / _ADAPTER).exists():
        raise InvalidRequestError(
            f"model_ref {model_ref!r} is an adapter, because it has {_ADAPTER}: pass its base model"
            " as model_ref, and load the adapter with service.import_adapter(path, model_ref)."
            f" For a whole model in this folder, remove {_ADAPTER}"
        )


def _from_hub(model_ref: str) -> Path:
    """Downloads what a model needs. Copies of its weights under other names are left out."""
    from huggingface_hub import snapshot_download

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(model_ref, allow_patterns=list(patterns)))

    try:
        directory = download(*_BESIDE_WEIGHTS)
        _refuse_adapter(directory, model_ref)
        if (directory / INDEX).exists():
            return download(*_BESIDE_WEIGHTS, *indexed(directory))
        directory = download(*_BESIDE_WEIGHTS, WHOLE)
        if not (directory / WHOLE).exists():
            directory = download(*_BESIDE_WEIGHTS, "*.safetensors")
        return directory
    except InvalidRequestError:
        raise
    except Exception as error:
        raise NotFoundError(
            f"the hub returned no model {model_ref!r} ({type(error).__name__}): check the name, the"
            " network and HF_TOKEN, or pass a local directory or GGUF file"
        ) from None


def _stored_dtypes(directory: Path) -> set[torch.dtype]:
    found = set()
    for file in weight_files(directory):
        with safe_open(file, "np") as opened:  # not "pt", for the reason in `stored_shapes`
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return {names.get(name, torch.float64) for name in found}


def _stored_values(given: ModelFiles) -> int:
    if not given.is_gguf:
        return sum(map(math.prod, stored_shapes(given.view).values()))
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(given.view / GGUF).tensors)


def _convert(given: ModelFiles, dtype: torch.dtype, target: Path) -> None:
    """Writes `target` whole or not at all: fills a temporary directory, then renames it."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for stale in target.parent.glob(".converting-*"):
        if time.time() - stale.stat().st_mtime > _STALE_S:
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        model, tokenizer = _read(given, dtype)
        given.refuse_changed()  # its name in the cache would be that of other files
        try:
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        except (OSError, SafetensorError):
            raise StorageError(
                f"the converted model could not be written to {target.parent}: free some space, or"
                " point TG_TINKER_HOME elsewhere"
            ) from None
        os.sync()  # the bytes reach the disk before the final name, in case the power fails
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # else another actor was first, and its copy is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(given: ModelFiles, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns the model and the tokenizer of these files; None for a tokenizer that is missing."""
    if not given.is_gguf:
        named = given.tokenizer.keys() - {"config.json"}
        tokenizer = load_tokenizer(given.tokenizer) if named else None
        return from_directory(given.view, dtype, None), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        given.view, dtype=dtype, gguf_file=GGUF, local_files_only=True, trust_remote_code=False,
        use_safetensors=True,
        quantization_config=GgufConfig(gguf_file=GGUF, dequantize=True),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(
        given.view, gguf_file=GGUF, local_files_only=True, trust_remote_code=False
    )
    return model, tokenizer


def from_directory(view: Path, dtype: torch.dtype, implementation: str | None) -> Any:
    """Returns a model with an implementation of attention; None lets transformers choose.

    Args:
        view: a folder of `model_files.opened`, or one that this program has written itself.

    Raises:
        InvalidRequestError: if the files lack some of the weights, which would then be random.
    """
    config = AutoConfig.from_pretrained(view, local_files_only=True, trust_remote_code=False)
    # Otherwise a name in config.json would choose the file, or the whole file before the index.
    config.transformers_weights = entry(view)
    model, found = AutoModelForCausalLM.from_pretrained(
        view, local_files_only=True, trust_remote_code=False, use_safetensors=True,
        config=config, dtype=dtype, attn_implementation=implementation, output_loading_info=True,
    )  # fmt: skip
    if missing := sorted(found["missing_keys"]):
        raise InvalidRequestError(
            f"the files of this model lack {len(missing)} of its tensors, such as"
            f" {missing[0]!r:.200}: download the model again, or convert it to a causal language"
            " model first"
        )
    del model.config.transformers_weights  # it would be saved with a conversion
    return model.eval()


def beside(work: Callable[[], Identity]) -> Future[Identity]:
    """Runs `work` in a separate thread: hashing releases Python's global lock."""
    with_one = ThreadPoolExecutor(1)
    try:
        return with_one.submit(work)
    finally:
        with_one.shutdown(wait=False)


def eos_ids(model: Any, tokenizer_files: Mapping[str, bytes]) -> frozenset[int]:
    """Returns the tokens that end an answer, as `tg_tinker.data.template.end_ids` finds them.

    Without a tokenizer that can be loaded, they are those of the model's configuration.
    """
    found: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    try:
        tokenizer = load_tokenizer(tokenizer_files)
    except InvalidRequestError:
        return frozenset(found)
    return end_ids(tokenizer, frozenset(found))
