"""Tests families of transformers' models, tiny and random, against transformers and PEFT alone.

`make soak-families` tests all of them, `make test` only `QUICK`. Each compares what it finds with
its row of `docs/models.md`. With TG_TINKER_WRITE=1, the rows are written there instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from actors.artifacts.adapters import imported
from actors.engine.batching import flatten
from actors.engine.gradients import by_name
from actors.engine.model import Base
from actors.engine.session import Session
from actors.privacy.gradient_probes import probe
from actors.privacy.layers import refuse_mixing_layers
from actors.privacy.unit_gradients import UnitBackward
from actors.sampling import engine as generation
from actors.sampling.adapters import Adapter
from actors.sampling.engine import SlotEngine
from support.families import FAMILIES, NEW, ROWS, make_family
from support.helpers import session, window
from support.processes import SOAK
from support.sampling import Reader, finish
from tg_tinker import InvalidRequestError, LoRAConfig
from tg_tinker.data.batch import normalize
from tg_tinker.data.peft_files import PeftFiles
from tg_tinker.sampling import SamplingParams

LABELS = sum(len(row) - 1 for row in ROWS)
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = (
    "| Family | Rows share a stream | `all-linear` | Private fast path | Sampled | Read by PEFT |"
)
QUICK = (
    "bloom", "deepseek_v3", "diffllama", "falcon (new)", "gemma3n_text", "gpt_neo", "mamba",
    "mixtral", "mpt", "qwen2_moe",
)  # fmt: skip
WRITING = "TG_TINKER_WRITE" in os.environ


@dataclass(frozen=True)
class Findings:
    """How a family trains and samples; all of it was compared with transformers and PEFT.

    Attributes:
        shared: whether several rows share a stream in training.
        adapter: whether every linear layer gets an adapter, or the names of those that do.
        private: whether one backward pass gives the gradients of several units.
        sampled: the name of the way, or "no".
        exported: whether PEFT reads the adapter. If not, it loses what it wrote itself, too.
    """

    shared: str
    adapter: str
    private: str
    sampled: str
    exported: str

    def row(self, name: str) -> str:
        kind, _, variant = name.partition(" ")
        cells = (f"`{kind}` {variant}".strip(), *astuple(self))
        return f"| {' | '.join(cells)} |"


def reference(model: Path) -> Any:
    # The eager attention of this family adds its biases twice.
    default = json.loads((model / "config.json").read_text()).get("alibi")
    return AutoModelForCausalLM.from_pretrained(
        model, attn_implementation=None if default else "eager", dtype=torch.float32
    ).eval()


def summed_loss(model: Any) -> torch.Tensor:
    losses = [
        cross_entropy(
            model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1],
            torch.tensor(row[1:]),
            reduction="sum",
        )
        for row in ROWS
    ]
    return torch.stack(losses).sum()


def tried(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Findings:
    """Compares a family with transformers and PEFT alone."""
    model = make_family(name, folder / "model")
    shared = trains(model)
    adapted, targets = with_adapter(model)
    private = separates(model, targets)
    peft = alike(model, adapted)
    exported = exports(model, adapted, peft, folder / "adapter")
    monkeypatch.setattr(generation, "PROMPT_TOKENS_ALONE", 8)
    sampled = samples(model, adapted, peft)
    adapter = "yes" if targets == "all-linear" else ", ".join(f"`{name}`" for name in targets)
    shown = [("no", "yes")[found] for found in (shared, private, exported)]
    return Findings(shown[0], adapter, shown[1], sampled, shown[2])


def trains(model: Path) -> bool:
    """Checks loss and gradient of full fine-tuning. Returns whether rows share a stream."""
    s = session(model, lora_config=None)
    result = s.forward_backward(normalize({"input_ids": ROWS}))
    plain = reference(model)
    total = summed_loss(plain)
    total.backward()
    assert result.loss == pytest.approx(float(total.detach()) / LABELS, abs=1e-4)
    found, size, off = window(s), 0.0, 0.0
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None and name in found:
            size += float(parameter.grad.double().square().sum())
            off += float((parameter.grad - found[name]).double().square().sum())
    assert size > 0
    assert off**0.5 <= 1e-3 * size**0.5
    return s.base.flat


def with_adapter(model: Path) -> tuple[Session, Any]:
    """Returns a session with a random adapter on all linear layers, or on those that PEFT takes."""
    targets: Any = "all-linear"
    try:
        s = session(model, lora_config=LoRAConfig(rank=8, target_modules=targets))
    except InvalidRequestError as refusal:
        names = refusal.details["target_modules"]  # the message quotes those that do not fit
        targets = tuple(name for name in names if f"'{name}'" not in refusal.message)
        s = session(model, lora_config=LoRAConfig(rank=8, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in s._parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return s, targets


def separates(model: Path, targets: Any) -> bool:
    """Checks the gradients of single rows. Returns whether one backward pass gives several."""
    s = session(model, lora_config=LoRAConfig(rank=8, target_modules=targets))
    refuse_mixing_layers(s.base.model)
    units = UnitBackward(s.base, s._parameters, s._losses)
    probe(units, s.recomputation)
    rows = normalize({"input_ids": ROWS})
    fast = units.path == "fast"
    streams = [rows] if fast and s.base.flat else [[row] for row in rows]
    taken = [units.of_stream(flatten(stream), [*range(len(stream))])[1] for stream in streams]
    shapes = {name: parameter.shape for name, parameter in s._parameters.items()}
    found = by_name(torch.cat(taken), shapes)
    units.capture = None
    for index, row in enumerate(rows):
        alone = by_name(units.of_stream(flatten([row]), [0])[1], shapes)
        for name, gradient in alone.items():
            assert (found[name][index] - gradient[0]).norm() <= 1e-3 * gradient.norm() + 1e-9, name
    return fast


def alike(model: Path, adapted: Session) -> Any:
    """Returns the adapted model as PEFT makes it, with the loss that the session computes."""
    state = adapted.state(include_optimizer=False)
    config = LoraConfig.from_peft_type(**(state.adapter_config or {}))
    config.inference_mode = False
    peft = get_peft_model(reference(model), config).eval()
    parameters = dict(peft.named_parameters())
    with torch.no_grad():
        for name, tensor in state.weights.items():
            parameters[f"{name.removesuffix('.weight')}.default.weight"].copy_(tensor)
    mine = adapted.forward_backward(normalize({"input_ids": ROWS}), train=False).loss
    assert mine == pytest.approx(loss(peft), abs=1e-4)
    assert abs(mine - loss(reference(model))) > 1e-3
    return peft


def exports(model: Path, adapted: Session, peft: Any, folder: Path) -> bool:
    """Checks that what PEFT writes is imported. Returns whether PEFT reads what is exported.

    If it does not, it does not read what it wrote itself either.
    """
    peft.save_pretrained(folder / "theirs")
    files = PeftFiles.read(folder / "theirs")
    like = session(model, lora_config=files.lora).state(include_optimizer=False)
    back = imported(files.config, files.weights, like).weights
    state = adapted.state(include_optimizer=False)
    assert back.keys() == state.weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.weights.items())
    (folder / "ours").mkdir()
    (folder / "ours" / "adapter_config.json").write_text(json.dumps(state.adapter_config))
    save_file(state.weights, folder / "ours" / "adapter_model.safetensors")
    read = [PeftModel.from_pretrained(reference(model), folder / by) for by in ("ours", "theirs")]
    same = [abs(loss(one.eval()) - loss(peft)) < 1e-4 for one in read]
    assert same[0] == same[1]
    return same[0]


@torch.no_grad()
def loss(model: Any) -> float:
    return float(summed_loss(model)) / LABELS


def samples(model: Path, adapted: Session, peft: Any) -> str:
    """Checks two sequences with the adapter between others without. Returns how they ran."""
    base = Base.load(str(model), cache=model)
    if base.sampling is None:
        with pytest.raises(InvalidRequestError, match="trained but not sampled"):
            SlotEngine(base)
        return "no"
    base.eos_ids = frozenset()
    engine, plain = SlotEngine(base), reference(model)
    state = adapted.state(include_optimizer=False)
    engine.adapters.add(Adapter("a", state.adapter_config or {}, state.weights))
    greedy = SamplingParams(max_tokens=NEW, temperature=0, prompt_logprobs=True)
    two = SamplingParams(max_tokens=NEW, temperature=0, num_completions=2, prompt_logprobs=True)
    readers = [Reader(ROWS[0], greedy), Reader(ROWS[1], two), Reader(ROWS[2], greedy)]
    readers[1].request.adapter = "a"
    left = Reader(ROWS[2], greedy)
    left.request.adapter = "a"
    for reader in (*readers, left):
        engine.submit(reader.request)
        engine.step()
    engine.cancel(left.request)
    finish(engine)
    assert engine.load.free == 8
    for reader, alone in zip(readers, (plain, peft, plain), strict=True):
        agree(reader, alone)
    return base.sampling.value


@torch.no_grad()
def agree(reader: Reader, model: Any) -> None:
    """Checks tokens and log-probabilities of all completions against whole forward passes."""
    prompt = reader.request.prompt
    for index in range(reader.request.params.num_completions):
        tokens = [token for token in reader.tokens if token.index == index]
        assert [token.error for token in tokens] == [None] * NEW
        whole = torch.tensor([prompt + reader.ids(index)])
        logits = model(input_ids=whole, use_cache=False).logits[0].float()
        rows = logits.log_softmax(-1)[:-1]
        expected = rows.gather(1, whole[0, 1:, None])[:, 0].tolist()
        best = rows[len(prompt) - 1 :].max(-1).values.tolist()
        assert [token.logprob for token in tokens] == pytest.approx(best, abs=1e-3)
        assert [token.logprob for token in tokens] == pytest.approx(expected[-NEW:], abs=1e-3)
        scored = tokens[0].prompt
        if index == 0:
            assert scored is not None
            assert scored[1:] == pytest.approx(expected[:-NEW], abs=1e-3)


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, str]]:
    """Returns the rows of the page by family; writes those that a test replaces."""
    before, _, table = PAGE.read_text().partition(HEAD)
    rule, *lines = table.lstrip("\n").split("\n\n")[0].splitlines()
    found = dict(zip(sorted(FAMILIES), lines, strict=False))
    yield found
    if WRITING:
        after = table.partition("\n\n")[2]
        filled = "\n".join(found[name] for name in sorted(FAMILIES))
        PAGE.write_text(f"{before}{HEAD}\n{rule}\n{filled}\n\n{after}")


def test_the_page_has_a_row_for_each_family(rows: dict[str, str]) -> None:
    assert len(FAMILIES) >= 60
    assert set(QUICK) <= set(FAMILIES)
    if not WRITING:
        assert [row.split("|")[1].strip() for row in rows.values()] == [
            Findings("", "", "", "", "").row(name).split("|")[1].strip() for name in rows
        ]
        assert len(rows) == len(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES) if SOAK else QUICK)
def test_a_family_equals_transformers_and_peft(
    name: str, rows: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tried(name, tmp_path, monkeypatch).row(name)
    if WRITING:
        rows[name] = found
    assert found == rows[name]
