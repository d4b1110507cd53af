"""Base models in memory, what they are found to be able to do, and one forward over a flat stream.

`Base.load` takes a hub id, a Hugging Face directory or a GGUF file, which `loading` finds and
converts; two probes tell whether rows may share a stream and whether the head is a plain product.
What trains is put in by `lora`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from actors.engine import attention
from actors.engine.batching import FlatStream, flatten
from actors.engine.loading import (
    CheckRoom,
    Progress,
    beside,
    digest_of,
    eos_ids,
    explained,
    from_directory,
    prepare,
)
from actors.engine.losses import head_losses, token_losses
from actors.engine.slots import Layout
from actors.engine.timing import Stage, stage
from tg_tinker.data.batch import Example
from tg_tinker.data.text import read_tokenizer

transformers.AttentionInterface.register(
    attention.NAME, attention.segmented(sdpa_attention_forward)
)
AttentionMaskInterface.register(attention.NAME, attention.padding_only(sdpa_mask))
transformers.utils.logging.disable_progress_bar()


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
        with explained(model_ref):
            return cls._load(model_ref, cache, dtype, progress, check_room)

    @classmethod
    def _load(
        cls, model_ref: str, cache: Path, dtype: str, progress: Progress, check_room: CheckRoom
    ) -> Base:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target = getattr(torch, compute_dtype(dtype))
        directory = prepare(model_ref, target, cache, progress)
        check_room(directory, target)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        progress(f"loading the weights ({size / 1e9:.2g} GB)")
        digest = beside(digest_of, directory)
        model = from_directory(directory, target, attention.NAME).to(device)
        flat = _rows_are_separate(model)
        if not flat:
            # The architecture mixes tokens outside of attention, or needs an attention of its
            # own: it gets one example per stream and transformers' own choice of attention.
            model = from_directory(directory, target, None).to(device)
        config = model.config.get_text_config()
        return cls(
            model=model.requires_grad_(False),
            digest=digest.result(),
            directory=directory,
            vocab_size=model.get_input_embeddings().num_embeddings,
            context_length=getattr(config, "max_position_embeddings", None) or 2**31,
            eos_ids=eos_ids(model),
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


def use_threads(count: int | None) -> int:
    """Sets torch's threads (None: every core this process may use) and says how many."""
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))
    return torch.get_num_threads()


def save_tiny_llama(directory: Path, vocab_size: int) -> Path:
    """Writes a Llama of 2 layers and width 64 with random weights: for checks of the code alone."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


# --- probes ----------------------------------------------------------------------------------


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
