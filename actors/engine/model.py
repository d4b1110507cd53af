"""Holds base models in memory, probes their abilities, and runs a forward pass over a flat stream.

`Base.load` takes a hub id, a Hugging Face directory or a GGUF file, which `loading` finds and
converts, and `probes` tests. `lora` adds the trainable parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from actors.engine import attention
from actors.engine.batching import FlatStream, flatten
from actors.engine.caches import Caches, Passes, Way, sequences
from actors.engine.cpus import usable_cpus
from actors.engine.forward import logits_at
from actors.engine.loading import (
    CheckRoom,
    Progress,
    beside,
    eos_ids,
    explained,
    from_directory,
    prepared,
)
from actors.engine.losses import head_losses, token_losses
from actors.engine.model_files import KINDS, Identity
from actors.engine.probes import (
    head_is_plain,
    is_eager,
    passes,
    referenced,
    rows_are_separate,
    way_of_sampling,
)
from actors.engine.slots import Layout, Slots
from actors.engine.timing import Stage, stage
from actors.engine.weights import weight_files
from tg_tinker.data.batch import Example
from tg_tinker.errors import ArtifactMismatchError, InvalidRequestError
from tg_tinker.sampling import NOT_SAMPLED

transformers.AttentionInterface.register(
    attention.NAME, attention.segmented(sdpa_attention_forward)
)
AttentionMaskInterface.register(attention.NAME, attention.padding_only(sdpa_mask))
transformers.utils.logging.disable_progress_bar()


@dataclass(repr=False)
class Base:
    """A language model that one session trains. Processes share the memory pages of its files.

    Attributes:
        digest: `sha256:` over the weight files as loaded, and over config.json without its name,
            version and dtype fields.
        flat: whether several examples may share a stream, as `rows_are_separate` finds.
        plain_head: whether logits are hidden states times one matrix and nothing else, as
            `head_is_plain` finds.
        sampling: how sequences are sampled; None if no way gives the logits of transformers.
    """

    model: Any
    identity: Identity
    directory: Path
    tokenizer: dict[str, bytes]
    vocab_size: int
    context_length: int
    flat: bool
    plain_head: bool
    sampling: Way | None

    @property
    def digest(self) -> str:
        """`sha256:` over the weight files as loaded, and over config.json without its name, version
        and dtype."""
        return self.identity.digest

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer. Only sampling reads them, and loads the tokenizer."""
        return eos_ids(self.model, self.tokenizer)

    def known_as(self, digest: object) -> bool:
        """Returns whether a run or artifact with this digest belongs to this base model."""
        former = self.identity.former(self.directory) if digest != self.digest else None
        return digest == self.digest or (former is not None and digest == former)

    def other_kinds(self, files: Mapping[str, str] | None) -> list[str]:
        """Returns the kinds of files, in words, that differ from those with these digests.

        Nothing differs from None, which is all that is known of artifacts of older versions.
        """
        ours = self.identity.files
        return [
            words
            for kind, words in KINDS.items()
            if files is not None and files.get(kind) != ours.get(kind)
        ]

    def refuse_other_files(self, files: Mapping[str, str] | None) -> None:
        """Raises unless weights with the digests of these files were trained on this base model.

        Raises:
            ArtifactMismatchError: if a kind of file differs, such as the tokenizer or the template.
        """
        if other := self.other_kinds(files):
            raise ArtifactMismatchError(
                f"these weights were trained on a base model with the same weights and config, but"
                f" with another {' and another '.join(other)}, so the same text would have other"
                " tokens or another meaning. Nothing was loaded: restore the files that the model"
                " had then",
                details={"part": "files"},
            )

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
        """Finds, loads and probes a model; converts it first where that is necessary.

        Args:
            check_room: is called with the safetensors directory before weights are loaded from it.

        Raises:
            NotFoundError: if there is no such file or directory, or the hub returns no such model.
            InvalidRequestError: if the files are damaged, or the architecture cannot be trained.
            StorageError: if the disk has no space for the converted copy.
            PlacementError: if the node has too little memory for the conversion.
        """
        with explained(model_ref):
            return cls._load(model_ref, cache, dtype, progress, check_room)

    @classmethod
    def _load(
        cls, model_ref: str, cache: Path, dtype: str, progress: Progress, check_room: CheckRoom
    ) -> Base:
        target = getattr(torch, compute_dtype(dtype))
        with prepared(model_ref, target, cache, progress) as (given, files):
            check_room(files.view, target)
            size = sum(file.stat().st_size for file in weight_files(files.view))
            progress(f"loading the weights ({size / 1e9:.2g} GB)")
            identity = beside(lambda: files.identity(given))
            model, sampling = _flat(files.view, target)
            flat = model is not None
            if model is None:
                model, sampling = _plain(files.view, target)
            found = identity.result()
            files.refuse_changed()
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        return cls(
            model=model.requires_grad_(False),
            identity=found,
            directory=files.source,
            tokenizer=files.tokenizer,
            vocab_size=model.get_input_embeddings().num_embeddings,
            context_length=positions if positions > 0 else 2**31,  # some say that -1 is no limit
            flat=flat,
            plain_head=_head_is_plain(model, flat),
            sampling=sampling,
        )

    def sequences(self, count: int) -> Slots | Caches:
        """Returns room for `count` running sequences.

        Raises:
            InvalidRequestError: if the architecture cannot be sampled.
        """
        if self.sampling is None:
            raise InvalidRequestError(NOT_SAMPLED)
        return sequences(self.sampling, count, self.model)

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.tokenizer


def _flat(directory: Path, dtype: torch.dtype) -> tuple[Any, Way | None]:
    """Returns a model with our attention, and how to sample from it.

    Returns (None, None) if the architecture mixes tokens outside of attention, or needs an
    attention of its own.
    """
    found: list[Any] = []

    def separates() -> bool:
        model = from_directory(directory, dtype, attention.NAME).to(_device())
        with referenced(model) as expected:
            if rows_are_separate(model, expected):
                found.extend((model, way_of_sampling(model, True, expected)))
        return bool(found)

    return (found[0], found[1]) if passes(separates) else (None, None)


def _plain(directory: Path, dtype: torch.dtype) -> tuple[Any, Way | None]:
    """Returns a model with the attention that transformers chooses, and how to sample from it.

    Where the chosen attention gives other logits than the eager one, the model gets the latter.
    """
    model = from_directory(directory, dtype, None).to(_device())
    with referenced(model) as expected:
        if not passes(lambda: is_eager(model, expected)):
            model.set_attn_implementation("eager")
        return model, way_of_sampling(model, False, expected)


def _head_is_plain(model: Any, flat: bool) -> bool:
    tokens = np.arange(min(12, model.get_input_embeddings().num_embeddings))
    row = _inputs(flatten([Example(tokens, tokens)]), model.device, flat)
    return passes(lambda: head_is_plain(model, row))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(wanted: str) -> str:
    """Returns the dtype of the weights on this machine.

    `auto` means bfloat16 on CUDA and float32 elsewhere.
    """
    if wanted != "auto":
        return wanted
    return "bfloat16" if torch.cuda.is_available() else "float32"


def labeled_losses(base: Base, stream: FlatStream) -> torch.Tensor:
    """Returns the loss of each labeled token: float32 [L], in nats.

    Runs one forward pass over the stream, and computes logits only where there is a label.
    """
    model, predictors = base.model, stream.predictors.to(base.device)
    targets, options = stream.targets.to(base.device), _inputs(stream, base.device, base.flat)
    if base.plain_head:
        with stage(Stage.FORWARD):
            hidden = model.get_decoder()(**options).last_hidden_state[0, predictors]
        with stage(Stage.HEAD):
            return head_losses(hidden, model.get_output_embeddings().weight, targets)
    with stage(Stage.FORWARD):
        logits = logits_at(model, predictors, **options)[0]
    with stage(Stage.HEAD):
        return token_losses(logits, targets)


def _inputs(stream: FlatStream, device: torch.device, flat: bool) -> dict[str, Any]:
    """Returns the arguments for a model or its decoder. A stream of one example needs no bounds."""
    options: dict[str, Any] = {"input_ids": stream.tokens.to(device), "use_cache": False}
    if flat:
        options |= {"position_ids": stream.positions.to(device), "segment_bounds": stream.bounds}
    return options


def next_token_logits(
    base: Base, tokens: Sequence[int], layout: Layout | Passes, wanted: Sequence[int]
) -> torch.Tensor:
    """Returns next-token logits [len(wanted), V] at the wanted places of a step.

    The step holds tokens of running sequences, as `layout` describes.
    """
    return layout.logits(base.model, tokens, wanted)


def use_threads(count: int | None) -> int:
    """Sets the number of torch's threads and returns it. None means all that can be kept busy."""
    torch.set_num_threads(count or usable_cpus())
    return torch.get_num_threads()


def save_tiny_llama(directory: Path, vocab_size: int) -> Path:
    """Writes a Llama of 2 layers and width 64 with random weights, for checks of the code alone."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory
