"""Compares the sampling engine with transformers' own generation, and measures its parts.

Sides run in turns in one process, on the same weights and prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.generation import GenerationConfig

from actors.engine.model import Base, use_threads
from actors.sampling.adapters import Adapter
from actors.sampling.engine import SlotEngine
from actors.sampling.requests import TokenRequest
from bench.measure import Bench, Run, Sheet, beside_the_first, in_turns
from tg_tinker.client.home import init_home
from tg_tinker.sampling import SamplingParams

Side = Callable[[], object]
ROWS = 8
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def prompts(count: int, lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [
        generator.integers(100, 40_000, lengths[i % len(lengths)]).tolist() for i in range(count)
    ]


def greedy(size: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=size, temperature=0, **more)


def serve(engine: SlotEngine, wanted: list[tuple[list[int], SamplingParams]]) -> None:
    for prompt, params in wanted:
        engine.submit(TokenRequest(prompt, params, lambda token: None))
    while engine.step():
        pass


def compare(title: str, sides: dict[str, Side], repeats: int, tokens: int) -> Sheet:
    """Returns a sheet with a row for each side. One run of a side yields `tokens` tokens."""
    return beside_the_first(title, in_turns(sides, repeats, title), tokens=tokens)


class Plain:
    """A model of transformers, loaded as a user would load it."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def static(self, wanted: list[tuple[list[int], int]]) -> None:
        """Generates padded batches of eight in order of arrival, each until its longest ends."""
        for start in range(0, len(wanted), ROWS):
            part = wanted[start : start + ROWS]
            width = max(len(ids) for ids, _ in part)
            tokens = torch.zeros(len(part), width, dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for row, (ids, _) in enumerate(part):
                tokens[row, width - len(ids) :] = torch.tensor(ids)
                mask[row, width - len(ids) :] = 1
            self.model.generate(
                tokens, attention_mask=mask, do_sample=False, pad_token_id=0,
                max_new_tokens=max(size for _, size in part),
            )  # fmt: skip

    def continuous(self, wanted: list[tuple[list[int], int]], rows: int) -> None:
        """Generates by transformers' continuous batching, with a bounded cache."""
        from transformers import ContinuousBatchingConfig

        settings = ContinuousBatchingConfig(
            num_blocks=rows * 16, max_batch_tokens=512, max_requests_per_batch=rows,
            allow_block_sharing=False,
        )  # fmt: skip
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=settings
        ) as manager:
            for ids, size in wanted:
                manager.add_request(ids, max_new_tokens=size)
            for _ in wanted:
                while (found := manager.get_result(timeout=60)) is None or not found.is_finished():
                    pass

    def decode(self, rows: int, context: int) -> Side:
        """Returns a bare forward pass of one token per row. The context grows with each call."""
        with torch.inference_mode():
            out = self.model(torch.full((rows, context), 500), use_cache=True, logits_to_keep=1)
        cache, tokens = out.past_key_values, torch.full((rows, 1), 500)

        def side() -> None:
            with torch.inference_mode():
                self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return side


def random_adapter(plain: Any, name: str) -> Adapter:
    generator = torch.Generator().manual_seed(len(name) + ord(name[-1]))
    config = LoraConfig(r=16, lora_alpha=32, target_modules=QKVO)
    weights = {}
    for path, module in plain.named_modules():
        if path.rpartition(".")[2] in QKVO:
            out, inner = module.weight.shape
            for part, shape in (("lora_A", (16, inner)), ("lora_B", (out, 16))):
                values = torch.randn(shape, generator=generator) * 0.01
                weights[f"base_model.model.{path}.{part}.weight"] = values
    return Adapter(name, {"r": config.r, "lora_alpha": config.lora_alpha}, weights)


def mixed_lengths(base: Base, plain: Plain, repeats: int) -> list[Sheet]:
    sizes = [4, 8, 12, 48]
    wanted = [(ids, sizes[i % 4]) for i, ids in enumerate(prompts(24, [16, 40, 8, 64, 24]))]
    total = sum(size for _, size in wanted)
    engine = SlotEngine(base, ROWS)
    sides: dict[str, Side] = {
        "slots": lambda: serve(engine, [(ids, greedy(size)) for ids, size in wanted]),
        "generate, static batches": lambda: plain.static(wanted),
        "transformers, continuous": lambda: plain.continuous(wanted, ROWS),
    }
    return [
        compare("24 requests of 8 to 64 tokens, 4 to 48 new tokens, 8 rows", sides, repeats, total)
    ]


def long_rows(base: Base, plain: Plain, repeats: int) -> list[Sheet]:
    wanted = [(ids, 32) for ids in prompts(16, [96])]
    engine = SlotEngine(base, 16)
    sides: dict[str, Side] = {
        "slots": lambda: serve(engine, [(ids, greedy(size)) for ids, size in wanted]),
        "transformers, continuous": lambda: plain.continuous(wanted, 16),
    }
    return [compare("16 requests of 96 tokens, 32 new tokens, 16 rows", sides, repeats, 16 * 32)]


def against_bare_forward(base: Base, plain: Plain, repeats: int) -> list[Sheet]:
    found = []
    for rows, context in ((1, 64), (8, 96), (8, 400)):
        engine, size = SlotEngine(base, rows), greedy(100)
        for _ in range(rows):
            engine.submit(TokenRequest([500] * context, size, lambda token: None))
        for _ in range(context * rows // 64 + 2):  # until all prompts are read
            engine.step()
        sides = {"bare forward": plain.decode(rows, context), "slots": engine.step}
        title = f"one step: {rows} rows at context {context}"
        found.append(compare(title, sides, 4 * repeats, rows))
    return found


def many_adapters(base: Base, plain: Plain, repeats: int) -> list[Sheet]:
    found = [random_adapter(plain.model, f"run@{i}") for i in range(ROWS)]
    ids = prompts(ROWS, [32])
    alone, engine = SlotEngine(base, ROWS), SlotEngine(base, ROWS)
    size = greedy(24)

    def with_adapters(names: list[str | None]) -> Side:
        def side() -> None:
            for one, name in zip(ids, names, strict=True):
                engine.submit(TokenRequest(one, size, lambda token: None, adapter=name))
            while engine.step():
                pass

        return side

    def base_alone() -> None:
        serve(alone, [(one, size) for one in ids])

    alone_first: dict[str, Side] = {"base model alone": base_alone}
    before = compare("8 rows, before any adapter is loaded", alone_first, repeats, 24 * ROWS)
    for one in found:
        engine.adapters.add(one)
    peft = get_peft_model(plain.model, LoraConfig(r=16, lora_alpha=32, target_modules=QKVO))
    peft.eval()
    for one in found:
        peft.add_adapter(one.name.replace("@", "_"), LoraConfig(r=16, target_modules=QKVO))
    tokens = torch.tensor(ids)

    def peft_mixed() -> None:
        peft.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
            max_new_tokens=24, pad_token_id=0, eos_token_id=None,
            adapter_names=[one.name.replace("@", "_") for one in found],
        )  # fmt: skip

    sides = {
        "base model": with_adapters([None] * ROWS),
        "one adapter": with_adapters([found[0].name] * ROWS),
        "eight adapters": with_adapters([one.name for one in found]),
        "PEFT, eight adapters": peft_mixed,
    }
    title = "8 rows of 32 tokens, 24 new tokens, rank 16 on 7 linear layers of each block"
    return [before, compare(title, sides, repeats, 24 * 8)]


def several_completions(base: Base, plain: Plain, repeats: int) -> list[Sheet]:
    engine, ids = SlotEngine(base, ROWS), prompts(1, [200])[0]
    short = prompts(ROWS, [200])
    sides: dict[str, Side] = {
        "n=8": lambda: serve(engine, [(ids, greedy(16, num_completions=8))]),
        "prompt": lambda: serve(engine, [(ids, greedy(1))]),
        "eight prompts": lambda: serve(engine, [(one, greedy(1)) for one in short]),
        "eight prompts, extended": lambda: serve(engine, [(one, greedy(16)) for one in short]),
    }
    title = "eight completions of a prompt of 200 tokens, 16 new tokens"
    return [compare(title, sides, repeats, 128)]


PARTS = {
    "sampling-mixed": mixed_lengths,
    "sampling-long": long_rows,
    "sampling-bare": against_bare_forward,
    "sampling-adapters": many_adapters,
    "sampling-several": several_completions,
}


def run(bench: Run) -> None:
    use_threads(None)
    for name, part in PARTS.items():
        if not bench.only or name in bench.only:
            base = Base.load(bench.model, cache=init_home() / "models")
            base.eos_ids = frozenset()
            bench.sheets += part(base, Plain(base.directory), bench.times(5))


BENCH = Bench(
    "sampling",
    "the sampling engine against generate, continuous batching and PEFT's mixed batches",
    6,
    run,
    workloads=tuple(PARTS),
)
