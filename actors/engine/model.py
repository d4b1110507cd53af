"""The door to transformers and PEFT: base models, adapters, and one forward over a flat stream.

`Base.load` takes a hub id, a Hugging Face directory or a GGUF file. Weights are always read from
a safetensors directory in the compute dtype, so that all actors of a node share its pages by
mmap; whatever is not one is converted once into the cache.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from actors.engine import attention
from actors.engine.batching import FlatStream, flatten
from actors.engine.losses import head_losses, token_losses
from actors.engine.matmul import use_fast_layers
from actors.engine.memory import check_conversion, stored_shapes
from actors.engine.slots import Layout
from actors.engine.timing import Stage, stage
from tg_tinker.config import LoRAConfig
from tg_tinker.data.batch import Example
from tg_tinker.data.text import read_tokenizer
from tg_tinker.errors import InvalidRequestError, NotFoundError, StorageError, TGTinkerError

Progress = Callable[[str], None]
CheckRoom = Callable[[Path, torch.dtype], None]
Parameters = dict[str, torch.nn.Parameter]

transformers.AttentionInterface.register(
    attention.NAME, attention.segmented(sdpa_attention_forward)
)
AttentionMaskInterface.register(attention.NAME, attention.padding_only(sdpa_mask))
transformers.utils.logging.disable_progress_bar()

_CACHE_VERSION = 1
_STALE_S = 86_400  # a conversion older than a day was killed
_WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


@dataclass(repr=False)
class Base:
    """A language model as one session trains it; its file's pages are shared between processes.

    Attributes:
        digest: `sha256:` over the weight files as loaded and what of config.json shapes them.
        flat: several examples may share a stream; found by a probe, see `_rows_are_separate`.
        plain_head: logits are hidden states times one matrix and nothing else; found by a probe.
    """

    model: Any
    digest: str
    directory: Path
    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]
    flat: bool
    plain_head: bool

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def can_recompute(self) -> bool:
        """Whether activation checkpointing is known to this architecture."""
        return bool(self.model.supports_gradient_checkpointing)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @classmethod
    def load(
        cls,
        model_ref: str,
        *,
        cache: Path,
        dtype: str = "auto",
        progress: Progress = lambda message: None,
        check_room: CheckRoom = lambda directory, dtype: None,
    ) -> Base:
        """Finds, converts where needed, loads and probes a model.

        Args:
            check_room: called with the safetensors directory before weights are loaded from it.

        Raises:
            NotFoundError: no such file or directory, or the hub has (or gives) no such model.
            InvalidRequestError: the files are damaged, or of an architecture that cannot train.
            StorageError: no room for the converted copy.
            PlacementError: no memory to convert it.
        """
        with _explained(model_ref):
            return cls._load(model_ref, cache, dtype, progress, check_room)

    @classmethod
    def _load(
        cls, model_ref: str, cache: Path, dtype: str, progress: Progress, check_room: CheckRoom
    ) -> Base:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target = getattr(torch, compute_dtype(dtype))
        directory = _prepare(model_ref, target, cache, progress)
        check_room(directory, target)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        progress(f"loading the weights ({size / 1e9:.2g} GB)")
        digest = _beside(_digest, directory)
        model = _from_directory(directory, target, attention.NAME).to(device)
        flat = _rows_are_separate(model)
        if not flat:
            # The architecture mixes tokens outside of attention, or needs an attention of its
            # own: it gets one example per stream and transformers' own choice of attention.
            model = _from_directory(directory, target, None).to(device)
        config = model.config.get_text_config()
        return cls(
            model=model.requires_grad_(False),
            digest=digest.result(),
            directory=directory,
            vocab_size=model.get_input_embeddings().num_embeddings,
            context_length=getattr(config, "max_position_embeddings", None) or 2**31,
            eos_ids=_eos_ids(model),
            flat=flat,
            plain_head=_head_is_plain(model, flat),
        )

    def tokenizer_files(self) -> dict[str, bytes]:
        return read_tokenizer(self.directory)


def compute_dtype(wanted: str) -> str:
    """Of the weights on this machine: `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if torch.cuda.is_available() else "float32"


def labelled_losses(base: Base, stream: FlatStream) -> torch.Tensor:
    """float32 [L], in nats: one forward over the stream, logits only where there is a label."""
    model, predictors = base.model, stream.predictors.to(base.device)
    targets, options = stream.targets.to(base.device), _inputs(stream, base.device, base.flat)
    if base.plain_head:
        with stage(Stage.FORWARD):
            hidden = model.get_decoder()(**options).last_hidden_state[0, predictors]
        with stage(Stage.HEAD):
            return head_losses(hidden, model.get_output_embeddings().weight, targets)
    with stage(Stage.FORWARD):
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits = model(**options, logits_to_keep=predictors).logits[0]
        else:
            logits = model(**options).logits[0, predictors]
    with stage(Stage.HEAD):
        return token_losses(logits, targets)


def _inputs(stream: FlatStream, device: torch.device, flat: bool) -> dict[str, Any]:
    """What a model or its decoder is called with; a stream of one example needs no bounds."""
    options: dict[str, Any] = {"input_ids": stream.tokens.to(device), "use_cache": False}
    if flat:
        options |= {"position_ids": stream.positions.to(device), "segment_bounds": stream.bounds}
    return options


def next_token_logits(
    base: Base, tokens: Sequence[int], layout: Layout, wanted: Sequence[int]
) -> torch.Tensor:
    """[len(wanted), V] after these places of a stream of running sequences."""
    device = base.device
    keep = torch.tensor(wanted, device=device).long()
    options: dict[str, Any] = {
        "input_ids": torch.tensor(tokens, device=device)[None],
        "position_ids": layout.positions[None],
        "layout": layout,
        "use_cache": False,
    }
    if "logits_to_keep" in inspect.signature(base.model.forward).parameters:
        return base.model(**options, logits_to_keep=keep).logits[0]  # type: ignore[no-any-return]
    return base.model(**options).logits[0, keep]  # type: ignore[no-any-return]


# --- what trains -----------------------------------------------------------------------------


def make_trainable(base: Base, lora: LoRAConfig | None) -> tuple[Parameters, dict[str, Any] | None]:
    """Parameters to train by their stored names, and the PEFT config (None for all weights).

    LoRA layers are injected into `base.model`; its own weights stay frozen.

    Raises:
        InvalidRequestError: target modules this model does not have, or a rank above a layer.
    """
    if lora is None:
        base.model.requires_grad_(True)
        use_fast_layers(base.model)
        return dict(base.model.named_parameters()), None
    _check_lora(base.model, lora)
    targets = lora.target_modules if lora.target_modules == "all-linear" else [*lora.target_modules]
    peft_config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias=lora.bias,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers has since changed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(base.model, peft_config)
    use_fast_layers(base.model)  # and those of the adapter
    named = {
        name.replace(".default.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    return named, _export_config(adapted)


def _export_config(adapted: PeftModel) -> dict[str, Any]:
    """`adapter_config.json` as PEFT itself writes it."""
    with tempfile.TemporaryDirectory() as folder:
        adapted.peft_config["default"].save_pretrained(folder)
        loaded: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    return loaded | {"base_model_name_or_path": None, "inference_mode": True}


def _check_lora(model: Any, lora: LoRAConfig) -> None:
    linear = {
        name: min(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        and module is not model.get_output_embeddings()
    }
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    wanted = last_names if lora.target_modules == "all-linear" else lora.target_modules
    for target in wanted:
        sides = [side for name, side in linear.items() if f".{name}".endswith(f".{target}")]
        if not sides:
            raise InvalidRequestError(
                f"target module {target!r} is not a linear layer of this model; it has:"
                f" {', '.join(last_names)} (or use 'all-linear')",
                details={"target_modules": last_names},
            )
        if lora.rank > min(sides):
            raise InvalidRequestError(
                f"rank {lora.rank} exceeds the smaller side {min(sides)} of {target!r}: a larger"
                " rank adds nothing, lower it or train all weights (lora_config=None)",
                details={"rank": lora.rank, "bound": min(sides)},
            )


def save_tiny_llama(directory: Path, vocab_size: int) -> Path:
    """Writes a Llama of 2 layers and width 64 with random weights: for checks of the code alone."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def refuse_mixing_layers(model: Any) -> None:
    """Layers that mix examples (batch norm) or keep statistics of data have no private form.

    Raises:
        InvalidRequestError: the model has such a layer; the rules are Opacus' own.
    """
    from opacus.validators import ModuleValidator

    # Every module, not `validate`, which looks at trainable ones: a frozen batch norm mixes too.
    rules = ModuleValidator.VALIDATORS
    problems = [
        problem
        for module in model.modules()
        if type(module) in rules
        for problem in rules[type(module)](module)
    ]
    if problems:
        raise InvalidRequestError(
            f"this model cannot be trained privately: {problems[0].args[0]}. Take a model without"
            " such layers",
            details={"layers": len(problems)},
        )


def silence_dropout(model: Any) -> None:
    """Switches off the base model's own dropout: its masks follow one another along a stream, so
    a row more would shift those of the rows behind it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0


# --- finding and converting ------------------------------------------------------------------


def _prepare(model_ref: str, dtype: torch.dtype, cache: Path, progress: Progress) -> Path:
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
def _explained(model_ref: str) -> Iterator[None]:
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


def _from_directory(directory: Path, dtype: torch.dtype, implementation: str | None) -> Any:
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


def _beside(work: Callable[[Path], str], directory: Path) -> Future[str]:
    """Runs `work` in a thread of its own: hashing takes no part of Python's lock."""
    with_one = ThreadPoolExecutor(1)
    try:
        return with_one.submit(work, directory)
    finally:
        with_one.shutdown(wait=False)


def _digest(directory: Path) -> str:
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


def _eos_ids(model: Any) -> frozenset[int]:
    found: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


@torch.no_grad()
def _rows_are_separate(model: Any) -> bool:
    """Probe: does an example in a flat stream get the logits that it gets alone?

    The reference is transformers' eager attention, which knows every architecture's extras.
    """
    config = model.config.get_text_config()
    if _rope_kinds(getattr(config, "rope_parameters", None)) & {"longrope", "dynamic"}:
        return False  # the longest row of a stream decides on the rotation of all
    generator = np.random.default_rng(0)
    vocab_size = model.get_input_embeddings().num_embeddings
    rows = [generator.integers(0, vocab_size, size) for size in (11, 7)]
    stream = flatten([Example(row, row) for row in rows])
    try:
        together = model(**_inputs(stream, model.device, flat=True)).logits[0, stream.bounds[1] :]
        model.set_attn_implementation("eager")
        ids = torch.from_numpy(rows[1])[None].to(model.device)
        alone = model(input_ids=ids, use_cache=False)
        model.set_attn_implementation(attention.NAME)
    except (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError):
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    difference = (together - alone.logits[0]).abs().max()
    return bool(difference <= tolerance * alone.logits.abs().max())


@torch.no_grad()
def _head_is_plain(model: Any, flat: bool) -> bool:
    """Probe: are logits the decoder's hidden states times the output matrix, to the bit?

    Not where an architecture scales, caps or shifts them.
    """
    row = np.arange(min(12, model.get_input_embeddings().num_embeddings))
    options = _inputs(flatten([Example(row, row)]), model.device, flat)
    try:
        head = model.get_output_embeddings()
        hidden = model.get_decoder()(**options).last_hidden_state
        found = torch.nn.functional.linear(hidden, head.weight)
        # A bias of zeros shows in no logit, but trains.
        return head.bias is None and bool(torch.equal(found, model(**options).logits))
    except (AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError):
        return False


def _rope_kinds(parameters: Any) -> set[str]:
    """The kinds of rotary positions: one for the model, or one for each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = [kind for value in parameters.values() for kind in _rope_kinds(value)]
    return {str(parameters.get("rope_type", "default")), *nested}


def use_threads(count: int | None) -> int:
    """Sets torch's threads (None: every core this process may use) and says how many."""
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))
    return torch.get_num_threads()
