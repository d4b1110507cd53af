"""Shared pieces: a two-layer Llama with a byte-level tokenizer, made on the spot."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import databases
import pytest

from tg_tinker import ServiceClient

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell's background job starts with SIGINT ignored; the tests of Ctrl-C need Python's own way.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(directory: Path) -> None:
    """256 bytes and three special tokens: any text, exact bytes, no training."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.add_special_tokens([AddedToken(s, special=True) for s in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def make_model(directory: Path, seed: int = 0, **overrides: object) -> Path:
    """A Hugging Face directory: 2 layers, width 32, 259 tokens, context 128, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "eos_token_id": 258, "bos_token_id": 257, "initializer_range": 0.2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**(sizes | overrides))).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted base models, kept for the whole session: the real one takes half a minute."""
    return tmp_path_factory.mktemp("models")


def make_home(path: Path, converted_models: Path) -> Path:
    path.mkdir(mode=0o700)
    (path / "models").symlink_to(converted_models)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, converted_models: Path) -> Iterator[Path]:
    """A home directory of its own for one module."""
    path = make_home(tmp_path_factory.mktemp("home") / "tg", converted_models)
    before = os.environ.get("TG_TINKER_HOME")
    os.environ["TG_TINKER_HOME"] = str(path)
    yield path
    if before is None:
        del os.environ["TG_TINKER_HOME"]
    else:
        os.environ["TG_TINKER_HOME"] = before


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[ServiceClient]:
    """Keeps one embedded cluster alive, which every `ServiceClient()` of the module joins."""
    with ServiceClient(address="local") as client:
        yield client


@pytest.fixture(scope="session")
def postgres() -> Iterator[databases.Postgres]:
    with databases.postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def each_database(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module or test that asks for it runs on each database that `databases.url_of` names."""
    on_server = request.param == "postgresql"
    if on_server and request.node.get_closest_marker("sqlite_only"):
        pytest.skip("looks into the file of SQLite")
    with databases.all_on(request.getfixturevalue("postgres") if on_server else None):
        yield
