"""Tests finding, converting and adapting base models."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from actors.engine.model import Base
from support.helpers import assert_close, examples, oracle_gradients, padded, session, window
from support.models import make_model
from support.other_user import as_nobody, needs_root, open_to_others
from tg_tinker import InvalidRequestError, LoRAConfig, NotFoundError, StorageError
from tg_tinker.data.batch import normalize


def files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_weights_in_the_compute_dtype_are_mapped_from_where_they_lie(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = Base.load(str(tiny_model), cache=tmp_path / "cache")
    assert base.directory == tiny_model
    assert not (tmp_path / "cache").exists()
    assert base.flat


def test_other_dtypes_are_converted_once_into_the_cache(tiny_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    cache = tmp_path / "cache"
    first = Base.load(str(tiny_model), cache=cache, dtype="bfloat16", progress=said.append)
    assert first.dtype == torch.bfloat16
    assert first.directory.parent == cache
    assert any("convert" in message for message in said)
    said.clear()
    second = Base.load(str(tiny_model), cache=cache, dtype="bfloat16", progress=said.append)
    assert not any("convert" in message for message in said)
    assert (first.digest, len(files(cache))) == (second.digest, 1)
    assert first.tokenizer_files()["tokenizer.json"]


def test_the_cache_knows_a_model_by_all_its_files(tiny_model: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(tiny_model, edited)
    (edited / "chat_template.jinja").write_text("another template")
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    cache = tmp_path / "cache"
    first = Base.load(str(tiny_model), cache=cache, dtype="bfloat16")
    second = Base.load(str(edited), cache=cache, dtype="bfloat16")
    assert (first.context_length, second.context_length) == (128, 64)
    assert second.tokenizer_files()["chat_template.jinja"] == b"another template"
    assert first.digest != second.digest


def test_a_full_disk_while_converting_is_named_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="free some space"):
            Base.load(str(tiny_model), cache=tmp_path / "cache", dtype="bfloat16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert files(tmp_path / "cache") == []


def test_a_conversion_that_fails_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    cache = tmp_path / "cache"
    with pytest.raises(InvalidRequestError, match="cannot be loaded"):
        Base.load(str(broken), cache=cache, dtype="bfloat16")
    assert files(cache) == []


@pytest.mark.parametrize("ref", ["/nowhere/model", "./gone", "three/part/name", "plain"])
def test_an_unknown_path_is_named(ref: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=ref):
        Base.load(ref, cache=tmp_path)


@needs_root
@pytest.mark.parametrize("closed", ["model.safetensors", "config.json", "tokenizer.json", "."])
def test_files_that_this_user_may_not_read_are_not_called_damaged(
    closed: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / closed).chmod(0)
    open_to_others(tmp_path)

    def said() -> str:
        try:
            return str(Base.load(str(model), cache=tmp_path))
        except StorageError as error:
            return error.message
        except Exception as error:
            return repr(error)

    assert "cannot be read on this node (Permission denied)" in as_nobody(said)


def test_a_model_of_an_unknown_user_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="knows no home of this user"):
        Base.load("~nobody-of-this-name/model", cache=tmp_path)


def test_the_directory_of_an_adapter_is_told_apart_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidRequestError, match=r"is an adapter.*import_adapter"):
        Base.load(str(tmp_path), cache=tmp_path / "cache")


def test_an_unreachable_hub_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="hub returned no model"):
        Base.load("no-such-org/no-such-model", cache=tmp_path)


def test_weights_in_pickle_files_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(NotFoundError, match="safetensors"):
        Base.load(str(tmp_path), cache=tmp_path / "cache")


def test_all_linear_adapts_every_layer_but_the_head(tiny_model: Path) -> None:
    s = session(tiny_model, lora_config=LoRAConfig(rank=4, target_modules="all-linear"))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in s._parameters}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_full_fine_tuning_never_writes_the_shared_file(tiny_model: Path) -> None:
    weights = (tiny_model / "model.safetensors").read_bytes()
    s = session(tiny_model, lora_config=None)
    s.forward_backward(examples())
    s.optim_step()
    assert (tiny_model / "model.safetensors").read_bytes() == weights
    fresh = session(tiny_model, lora_config=None)
    assert fresh.forward_backward(examples()).loss != s.forward_backward(examples()).loss


# --- architectures ----------------------------------------------------------------------------


def make(tmp_path: Path, config: object) -> Path:
    from transformers import AutoModelForCausalLM

    from support.models import make_tokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    return tmp_path


SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "head_dim": 8,
}  # fmt: skip


def test_sliding_windows_hold_inside_each_example(tmp_path: Path) -> None:
    from transformers import MistralConfig

    s = session(make(tmp_path, MistralConfig(**SMALL, sliding_window=4)))
    assert s.base.flat
    rows = [(list(range(40, 60)), list(range(40, 60))), ([7, 8, 9], [7, 8, 9])]
    batch = padded(rows, "right")
    s.forward_backward(normalize(batch))
    assert_close(window(s), oracle_gradients(s, batch), 1e-5)


@pytest.mark.parametrize("kind", ["PhimoeConfig", "Qwen2MoeConfig", "DogeConfig"])
def test_a_window_that_only_the_mask_knows_is_kept(tmp_path: Path, kind: str) -> None:
    """The window is wider than the rows of the probe, so no logit of the probe shows it."""
    import transformers

    config = getattr(transformers, kind)(
        **SMALL, sliding_window=16, use_sliding_window=True, max_window_layers=2,
        num_experts_per_tok=2, num_local_experts=2, num_experts=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    base = Base.load(str(make(tmp_path, config)), cache=tmp_path)
    assert not base.flat


def test_attention_with_extras_of_its_own_gets_one_row_per_stream(tmp_path: Path) -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(**SMALL, attn_logit_softcapping=1.0, query_pre_attn_scalar=8)
    s = session(make(tmp_path, config))
    assert not s.base.flat
    rows = [([5, 6, 7, 8], [5, 6, 7, 8]), ([9, 10, 11], [9, 10, 11])]
    batch = padded(rows, "right")
    s.forward_backward(normalize(batch))
    assert_close(window(s), oracle_gradients(s, batch), 1e-5)


def test_recurrent_models_are_found_to_mix_rows_and_still_train(tmp_path: Path) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=259, hidden_size=32, state_size=4, num_hidden_layers=2)
    s = session(make(tmp_path, config), lora_config=LoRAConfig(rank=4, target_modules=("in_proj",)))
    assert not s.base.flat
    a, b = examples()[0], examples()[4]
    both = s.forward_backward([a, b], train=False).loss * (a.num_labeled + b.num_labeled)
    each = sum(s.forward_backward([e], train=False).loss * e.num_labeled for e in (a, b))
    assert both == pytest.approx(each, rel=1e-5)
    s.forward_backward([a, b])
    assert s.optim_step().step == 1


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotations_by_the_longest_row_keep_rows_apart(tmp_path: Path, kind: str) -> None:
    more = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0,
            "original_max_position_embeddings": 32, **more}  # fmt: skip
    model = make_model(tmp_path / "rope", rope_parameters=rope)
    assert not Base.load(str(model), cache=tmp_path).flat


# --- the end of an answer -----------------------------------------------------------------------


def ends_of(tmp_path: Path, template: str, eos: str, configured: int | list[int]) -> set[str]:
    """Returns the texts of the tokens that end sampling, for a tokenizer with five added tokens."""
    from transformers import AutoTokenizer

    model = make_model(tmp_path / "model", eos_token_id=configured, vocab_size=270)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    found = Base.load(str(model), cache=tmp_path).eos_ids
    return {tokenizer.convert_ids_to_tokens(index) for index in found}


CHAT = "{% for m in messages %}<turn>{{ m['role'] + '\n' + m['content'] + END }}{% endfor %}"


@pytest.mark.parametrize(
    ("end", "eos", "configured", "expected"),
    [
        ("'<|im_end|>\n'", "<|im_end|>", 256, {"<|im_end|>", "<|endoftext|>"}),  # Yi, Qwen.
        ("' <end>\n'", "<|endoftext|>", 256, {"<end>", "<|endoftext|>"}),  # Llama 3, Gemma.
        ("''", "<|endoftext|>", [256, 257], {"<turn>", "<|endoftext|>", "<|im_start|>"}),  # GLM.
        ("'\n'", "<|endoftext|>", 256, {"<turn>", "<|endoftext|>"}),
        ("'<end>'", "<|endoftext|>", [256, 65], {"<end>", "<|endoftext|>"}),  # 65 is the letter b.
    ],
)
def test_an_answer_ends_by_every_control_token_that_training_teaches(
    end: str, eos: str, configured: int | list[int], expected: set[str], tmp_path: Path
) -> None:
    assert ends_of(tmp_path, CHAT.replace("END", end), eos, configured) == expected


def test_without_a_tokenizer_the_configuration_says_what_ends_an_answer(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", eos_token_id=7)
    for file in model.glob("*token*"):
        file.unlink()
    (model / "chat_template.jinja").unlink(missing_ok=True)
    assert Base.load(str(model), cache=tmp_path).eos_ids == {7}
