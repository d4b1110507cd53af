"""Opens the files of a base model once, so that what is hashed is what is loaded.

A model is loaded from a *view*: a temporary folder with copies of its small files, and with links
to the open descriptors of its weights, under names of ours. transformers finds nothing else there:
no pickle, no adapter, no code, no neighbor of a GGUF file. The names in a model's folder decide
nothing, and a file that is replaced meanwhile is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from actors.engine.weights import INDEX, WHOLE, entry, weight_map
from tg_tinker.data.text import TOKENIZER_FILES
from tg_tinker.errors import InvalidRequestError, StorageError
from tg_tinker.storage.files import opened_inside

CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
GGUF = "model.gguf"
"""The name of a GGUF file in its view."""

MOST_SMALL_BYTES = 2**28
"""The maximum size of each file beside the weights, which is read into memory."""

_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""What the config says of the program that wrote it, and not of the model."""

_BESIDE = (CONFIG, GENERATION, *(name for name in TOKENIZER_FILES if name != CONFIG))

KINDS = {
    "weights": "weights (.safetensors)",
    "index": f"index of the weights ({INDEX})",
    "config": CONFIG,
    "generation": GENERATION,
    "tokenizer": "files of the tokenizer",
    "template": f"chat template ({TEMPLATE})",
    "gguf": "GGUF file",
}
"""The kinds of files that are hashed apart, in words."""


@dataclass(frozen=True, repr=False)
class Identity:
    """What identifies a base model, as it was loaded.

    Attributes:
        config: config.json without the name, version and dtype.
        weights: the digest of each file of the weights, by name.
        indexed: whether an index named these files.
        files: the digest of each kind of file, in hexadecimal.
    """

    config: str
    weights: Mapping[str, str]
    indexed: bool
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The identity that artifacts and runs record: weights and config."""
        return _of(self.config, self.weights)

    def former(self, folder: Path) -> str | None:
        """Returns the identity that runs before the first release have recorded for the same model.

        It covered copies of the weights too. None if those runs loaded another file than this
        release, or if a copy cannot be read.
        """
        if self.indexed and (folder / WHOLE).exists():
            return None
        copies = {file.name for file in folder.glob("*.safetensors")} - self.weights.keys()
        found = {}
        try:
            for name in copies:
                with opened_inside(folder, name) as file:
                    found[name] = _digest(file)
        except (OSError, InvalidRequestError):
            return None
        return _of(self.config, {**self.weights, **found})


@dataclass(repr=False)
class ModelFiles:
    """The open files of a model.

    Attributes:
        source: the model's folder, or its GGUF file.
        view: the folder to load the model from. It has the files of the model and no other.
        small: the contents of the files beside the weights, by name.
    """

    source: Path
    view: Path
    small: Mapping[str, bytes]
    _weights: Mapping[str, BufferedReader]
    _index: Mapping[str, str] | None
    _stamps: Mapping[str, tuple[int, ...]] = field(init=False)
    _digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stamps = self._now()

    @property
    def is_gguf(self) -> bool:
        return not self.small

    @property
    def tokenizer(self) -> dict[str, bytes]:
        """The files that `tg_tinker.data.text.load_tokenizer` takes."""
        return {name: self.small[name] for name in TOKENIZER_FILES if name in self.small}

    def contents(self) -> str:
        """Returns a digest of all that a conversion reads: each file, with its name."""
        beside = {name: hashlib.sha256(content).hexdigest() for name, content in self.small.items()}
        listed = _listing({**beside, **self._hashed()}) + json.dumps(self._index, sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()

    def identity(self, given: ModelFiles) -> Identity:
        """Returns the identity of the model in these files.

        Args:
            given: the files that the user named, if these are a conversion of them, else these.
        """
        weights = dict(self._hashed())
        config = _described(self.small[CONFIG])
        kinds = {"weights": _listing(weights), "config": config}
        if self._index is not None:
            kinds["index"] = json.dumps(self._index, sort_keys=True)
        hashed = {kind: hashlib.sha256(text.encode()).hexdigest() for kind, text in kinds.items()}
        return Identity(config, weights, self._index is not None, hashed | given.beside_weights())

    def beside_weights(self) -> dict[str, str]:
        """Returns the digests of the kinds of files that a conversion does not keep as they are."""
        if self.is_gguf:
            return {"gguf": self._hashed()[GGUF]}
        tokenizer = self.tokenizer.keys() - {CONFIG, TEMPLATE}
        kinds = {"generation": {GENERATION}, "tokenizer": tokenizer, "template": {TEMPLATE}}
        return {kind: self._of_small(names & self.small.keys()) for kind, names in kinds.items()}

    def refuse_changed(self) -> None:
        """Raises if a file of the weights was written to since it was opened.

        Raises:
            StorageError: a file has changed, so that other bytes may be loaded than were hashed.
        """
        now = self._now()
        for name, stamp in self._stamps.items():
            if now[name] != stamp:
                raise StorageError(
                    f"{self.source} changed while it was read ({name}): wait until nobody writes"
                    " to it, and try again"
                )

    def _of_small(self, names: Iterable[str]) -> str:
        found = {name: hashlib.sha256(self.small[name]).hexdigest() for name in names}
        return hashlib.sha256(_listing(found).encode()).hexdigest()

    def _hashed(self) -> Mapping[str, str]:
        for name, file in self._weights.items():
            if name not in self._digests:
                self._digests[name] = _digest(file)
        return self._digests

    def _now(self) -> dict[str, tuple[int, ...]]:
        found = {name: os.fstat(file.fileno()) for name, file in self._weights.items()}
        # The time of the last change of the inode too: its owner cannot set that one back.
        return {name: (s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found.items()}


@contextmanager
def opened(source: Path) -> Iterator[ModelFiles]:
    """Yields the files of a model's folder, or a GGUF file. The view is gone afterwards.

    Raises:
        InvalidRequestError: a file is no regular file, leads out of the folder, or is too large;
            or the index is damaged or names a file that is missing.
        NotFoundError: the folder has no safetensors.
        StorageError: a file cannot be read.
    """
    with ExitStack() as stack:
        view = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tg-tinker-model-")))
        if source.is_file():
            file = stack.enter_context(opened_inside(source.parent, source.name))
            _link(view / GGUF, file, source)
            yield ModelFiles(source, view, {}, {GGUF: file}, None)
            return
        small = dict(_small_files(source))
        index = small.pop(INDEX, None)
        shards = None if index is None else weight_map(source, index)
        names = sorted({*shards.values()}) if shards else [entry(source)]
        weights = {}
        for number, name in enumerate(names):
            weights[name] = stack.enter_context(_weight_file(source, name))
            _link(view / (_alias(number) if shards else WHOLE), weights[name], source / name)
        _write_small(view, small, shards, names)
        yield ModelFiles(source, view, small, weights, shards)


def _small_files(source: Path) -> Iterator[tuple[str, bytes]]:
    for name in (*_BESIDE, INDEX):
        if (source / name).exists():
            with opened_inside(source, name) as file:
                content = file.read(MOST_SMALL_BYTES + 1)
            if len(content) > MOST_SMALL_BYTES:
                raise InvalidRequestError(
                    f"{source / name} has more than {MOST_SMALL_BYTES} bytes: check that it is the"
                    " file of a model"
                )
            yield name, content


def _weight_file(source: Path, name: str) -> BufferedReader:
    try:
        return opened_inside(source, name)
    except FileNotFoundError:
        raise InvalidRequestError(f"{source / name} is missing: download the model again") from None


def _write_small(
    view: Path, small: Mapping[str, bytes], shards: Mapping[str, str] | None, names: list[str]
) -> None:
    """Writes what transformers reads beside the weights: configs and the index."""
    for name in small.keys() & {CONFIG, GENERATION}:
        (view / name).write_bytes(small[name])
    if shards:
        aliases = {name: _alias(number) for number, name in enumerate(names)}
        renamed = {tensor: aliases[name] for tensor, name in shards.items()}
        (view / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": renamed}))


def _alias(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _link(link: Path, file: BufferedReader, path: Path) -> None:
    """Makes a link to an open file, which leads to it also once its path leads elsewhere."""
    descriptor = Path(f"/proc/self/fd/{file.fileno()}")
    link.symlink_to(descriptor if descriptor.exists() else path.resolve())


def _described(config: bytes) -> str:
    found: dict[str, Any] = json.loads(config)
    for volatile in _VOLATILE:
        found.pop(volatile, None)
    return json.dumps(found, sort_keys=True)


def _of(config: str, weights: Mapping[str, str]) -> str:
    return "sha256:" + hashlib.sha256((config + _listing(weights)).encode()).hexdigest()


def _listing(digests: Mapping[str, str]) -> str:
    """Returns a line with the name and digest of each file, sorted by name."""
    return "".join(f"{name} {digests[name]}\n" for name in sorted(digests))


def _digest(file: BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
