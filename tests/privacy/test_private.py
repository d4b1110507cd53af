"""Tests the private step without Ray: what one unit can do, and the order of noise, charge and
weights."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from actors.engine.model import Base
from actors.privacy import clipping, unit_gradients
from actors.privacy.clipping import ClippedSum, UnitGradients, privatize
from actors.privacy.noise import standard_normal
from actors.privacy.session import PrivateSession
from support.helpers import IGNORED, assert_close, assert_equal, session, weights
from support.models import make_model
from support.privacy_helpers import (
    ROWS,
    Counting,
    Noiseless,
    clipped,
    distance,
    norm,
    oracle_sum,
    oracle_unit_gradient,
    perturb,
    private_session,
    registry,
    rows,
    sums,
)
from tg_tinker import (
    DPBudgetExceededError,
    InvalidRequestError,
    LoRAConfig,
    OptimizerConfig,
    ResourceConfig,
    ServiceError,
    WindowSpoiledError,
)
from tg_tinker.records.ledger import Ledger

LORA: dict[str, Any] = {"lora_config": LoRAConfig(rank=4, alpha=32)}
EVERYTHING: dict[str, Any] = {"lora_config": None}
BIASES: dict[str, Any] = {"lora_config": LoRAConfig(rank=4, alpha=32, bias="all")}
TRAINABLE = pytest.mark.parametrize("what", [LORA, BIASES, EVERYTHING], ids=["lora", "bias", "all"])
SGD = OptimizerConfig(name="sgd", learning_rate=1.0)


# --- the sum -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("biased"), attention_bias=True)


@TRAINABLE
@pytest.mark.parametrize("bound", [0.5, 20.0, 1e6], ids=["all-clipped", "some", "none"])
def test_the_sum_equals_the_loop_oracle(biased_model: Path, what: Any, bound: float) -> None:
    s = private_session(biased_model, dp={"max_grad_norm": bound}, **what)
    perturb(s)
    assert (s.unit_backward.capture is not None) == (what is LORA)
    s.forward_backward(rows())
    assert_close(sums(s), oracle_sum(s, [[row] for row in rows()]), 2e-5)


def opacus_sum(s: PrivateSession, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Returns the clipped sum as Opacus' hooks see it, on a PEFT model of their own."""
    from opacus.grad_sample import GradSampleModule
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(s.base.directory, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(plain, LoraConfig(r=4, lora_alpha=32, target_modules=names))
    model = GradSampleModule(adapted, loss_reduction="sum", strict=False)
    ours = s._parameters
    theirs = {
        name.removeprefix("_module.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    tokens = torch.tensor(ids)
    logits = model(input_ids=tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    losses.view(len(ids), -1).mean(1).sum().backward()
    each = {name: parameter.grad_sample for name, parameter in theirs.items()}
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
    factors = s.dp.max_grad_norm / norms.clamp(min=s.dp.max_grad_norm)
    return {name: torch.tensordot(factors, gradient, dims=1) for name, gradient in each.items()}


def test_the_sum_equals_that_of_opacus_hooks(tiny_model: Path) -> None:
    s = private_session(tiny_model)
    perturb(s)
    ids = [list(range(start, start + 9)) for start in (3, 40, 90, 200)]
    s.forward_backward(rows(ids))
    assert_close(sums(s), opacus_sum(s, ids), 2e-5)


def test_a_tied_head_and_embedding_are_exact(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tied", tie_word_embeddings=True)
    s = private_session(model, **EVERYTHING)
    assert "lm_head.weight" not in s._parameters
    s.forward_backward(rows())
    assert_close(sums(s), oracle_sum(s, [[row] for row in rows()]), 2e-5)


def test_activation_checkpointing_changes_nothing(tiny_model: Path) -> None:
    resources = ResourceConfig(activation_checkpointing=True)
    s = private_session(tiny_model, resources=resources)
    perturb(s)
    assert s.unit_backward.capture is not None
    s.forward_backward(rows())
    assert_close(sums(s), oracle_sum(s, [[row] for row in rows()]), 2e-5)


LONG = [[(7 * place + row) % 257 for place in range(1100 + row)] for row in (1, 90)]
"""Two rows that no stream of 1,024 tokens holds: each recomputes its activations unasked."""


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("long"), max_position_embeddings=2048)


@contextmanager
def entries(module: torch.nn.Module) -> Iterator[list[int]]:
    """Yields a list of the number of tokens that enter this module, one for each call."""
    found: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[1]))
    yield found
    hook.remove()


@pytest.mark.parametrize("what", [LORA, EVERYTHING], ids=["lora", "all"])
@pytest.mark.parametrize(
    ("asked", "ids"),
    [(True, ROWS), (True, [*LONG, *ROWS]), (False, [*LONG, *ROWS])],
    ids=["asked", "asked-and-long", "long"],
)
def test_recomputed_activations_are_clipped_as_the_oracle_clips(
    long_model: Path, what: Any, asked: bool, ids: list[list[int]]
) -> None:
    resources = ResourceConfig(activation_checkpointing=asked)
    s = private_session(long_model, dp={"max_grad_norm": 12.0}, resources=resources, **what)
    perturb(s)
    assert (s.unit_backward.capture is not None) == (
        what is LORA
    )  # else the fast way would not be tested
    with entries(s.base.model.get_decoder().layers[0].mlp) as entered:
        s.forward_backward(rows(ids))
    lengths = [len(row) for row in ids]
    streams = lengths if what is EVERYTHING else [*lengths[:-8], sum(lengths[-8:])]
    assert Counter(entered) == Counter(n for n in streams for _ in range(1 + (asked or n > 1024)))
    assert_close(sums(s), oracle_sum(s, [[row] for row in rows(ids)]), 1e-5)
    assert 0 < sum(norm > 12 for norm in s._pending.total.norms_before) < len(ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_keeps_the_bound(tiny_model: Path, checkpointing: bool) -> None:
    s = private_session(
        tiny_model,
        lora_config=LoRAConfig(rank=4, dropout=0.5),
        resources=ResourceConfig(activation_checkpointing=checkpointing),
    )
    perturb(s, 0.5)
    for row in rows():
        s.forward_backward([row])
        assert norm(sums(s)) <= 1 + 1e-5
        s._open_window()


def test_dropout_is_drawn_afresh_whatever_the_seed(tiny_model: Path) -> None:
    """If a recipient knew the masks, one row could change the masks of others."""
    lora = LoRAConfig(rank=4, dropout=0.5)
    found = []
    for _ in range(2):
        s = private_session(tiny_model, lora_config=lora, seed=3)
        perturb(s)
        s.forward_backward(rows())
        found.append(sums(s))
    assert distance(*found) > 1e-3 * norm(found[0])


def test_bfloat16_weights_are_normed_and_summed_in_float64(tiny_model: Path) -> None:
    s = private_session(tiny_model, dtype="bfloat16")
    s.base.model.to(torch.bfloat16)
    perturb(s)
    for row in rows():
        s.forward_backward([row])
        found = sums(s)
        assert {tensor.dtype for tensor in found.values()} == {torch.float64}
        assert norm(found) <= 1 + 1e-5
        s._open_window()


@settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_one_row_moves_the_sum_by_at_most_the_bound(tiny_model: Path, data: st.DataObject) -> None:
    token = st.integers(0, 258)
    ids = data.draw(
        st.lists(st.lists(token, min_size=2, max_size=20), min_size=1, max_size=7, unique_by=tuple)
    )
    bound = data.draw(st.sampled_from([0.01, 1.0, 30.0]))
    at = data.draw(st.integers(0, len(ids) - 1))
    s = private_session(tiny_model, dp={"max_grad_norm": bound, "noise_multiplier": 1.0})
    perturb(s, 0.3)
    s.forward_backward(rows(ids))
    together = sums(s)
    s._open_window()
    s.forward_backward(rows(ids[:at] + ids[at + 1 :]))
    assert distance(together, sums(s)) <= bound * (1 + 1e-4)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_how_a_step_is_split_into_calls_changes_nothing(tiny_model: Path, size: int) -> None:
    one, many = private_session(tiny_model), private_session(tiny_model)
    one.forward_backward(rows())
    for start in range(0, 8, size):
        many.forward_backward(rows()[start : start + size])
    assert_close(sums(many), sums(one), 1e-5)
    assert len(many._pending.units) == 8


def test_micro_batches_are_bounded_by_bytes_and_change_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = private_session(tiny_model), private_session(tiny_model)
    whole.forward_backward(rows())
    monkeypatch.setattr(unit_gradients, "UNIT_GRADIENT_BYTES", 3 * 4 * cut.num_trainable)
    assert cut.unit_backward.stream_limits()[1] == 3
    cut.forward_backward(rows())
    assert_close(sums(cut), sums(whole), 1e-5)


@TRAINABLE
def test_gradients_of_single_units_are_gone_before_the_next_are_made(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    monkeypatch.setattr(unit_gradients, "MAX_STREAM_TOKENS", 8)
    s = private_session(tiny_model, **what)
    made: list[weakref.ref[torch.Tensor]] = []
    make = s.unit_backward.of_stream

    def watched(*of: Any) -> Any:
        assert not any(held() is not None for held in made)
        by_row, by_unit = make(*of)
        made.append(weakref.ref(by_unit))
        return by_row, by_unit

    monkeypatch.setattr(s.unit_backward, "of_stream", watched)
    s.forward_backward(rows())
    assert len(made) > 2


def test_a_unit_that_goes_on_holds_nothing_of_the_others() -> None:
    others, last = unit_gradients.cut_last(torch.arange(12.0).view(3, 4))
    assert last.tolist() == [8, 9, 10, 11]
    assert last.untyped_storage().nbytes() == 4 * 4
    assert others.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_neighbors_and_padding_do_not_change_a_row(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"max_grad_norm": 1e6})
    perturb(s)
    s.forward_backward(rows(ROWS[:1]))
    alone = sums(s)
    for others in ([ROWS[4]], [ROWS[5], ROWS[1]], [[9] * 100]):
        s._open_window()
        s.forward_backward(rows(others))
        without = sums(s)
        s._open_window()
        s.forward_backward(rows([*others, ROWS[0]]))
        gained = {name: tensor - without[name] for name, tensor in sums(s).items()}
        assert distance(gained, alone) <= 1e-4 * norm(alone)
    s._open_window()
    mask = [[0] * 5 + [1] * 7 + [0] * 4]
    s.forward_backward(rows([[3] * 5 + ROWS[0] + [3] * 4], attention_mask=mask))
    assert distance(sums(s), alone) <= 1e-6 * norm(alone)


def test_a_row_that_is_not_finite_adds_zero_and_leaves_the_others(tiny_model: Path) -> None:
    s = private_session(tiny_model)
    with torch.no_grad():
        s.base.model.get_input_embeddings().weight[200] = math.inf
    s.forward_backward(rows())
    clean = sums(s)
    s._open_window()
    result = s.forward_backward(rows([*ROWS, [199, 200, 201]]))
    assert_close(sums(s), clean, 1e-5)
    assert "1 gradient not finite" in result.warnings[0]
    assert math.isfinite(result.loss)
    assert s.optim_step().dp_metrics.num_clipped == 8


DEFECTS = {
    "too long": [1] * 129,
    "out of vocabulary": [1, 2, 259],
    "nothing labeled": [7],
    "repeated in the step": ROWS[2],
}


@pytest.mark.parametrize(("reason", "ids"), DEFECTS.items(), ids=DEFECTS)
def test_a_defect_makes_a_row_add_zero_and_is_reported(
    tiny_model: Path, reason: str, ids: list[int]
) -> None:
    s = private_session(tiny_model)
    s.forward_backward(rows())
    clean = sums(s)
    s._open_window()
    result = s.forward_backward(rows([*ROWS, ids]))
    assert_close(sums(s), clean, 1e-5)
    assert result.warnings == (f"1 of 9 rows added nothing to the gradient: 1 {reason}",)
    assert s.optim_step().step == 1


@pytest.mark.parametrize("size", [1000, 1024, 5_000_001, 30_000_000])
@pytest.mark.parametrize("kind", ["constant", "one large", "drawn"])
def test_norms_of_large_tensors_are_exact_enough_to_bound_by(size: int, kind: str) -> None:
    values = torch.full((1, size), 1e-3)
    if kind == "one large":
        values[0, 7] = 3.0
    if kind == "drawn":
        values = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    exact = float(values.double().square().sum().sqrt())
    assert float(UnitGradients(values).norms()[0]) == pytest.approx(exact, rel=1e-12)
    total = clipped(values, exact / 7)
    moved = float(total.values.square().sum().sqrt())
    assert moved == pytest.approx(exact / 7, rel=1e-12)


def test_a_run_that_cannot_start_binds_no_data_set(tiny_model: Path) -> None:
    known, wrong = registry(), LoRAConfig(target_modules=("no_such",))
    with pytest.raises(InvalidRequestError, match="no_such"):
        private_session(tiny_model, known=known, lora_config=wrong)
    assert known.ledgers.entries("default", "default") == []


def test_a_step_without_rows_says_so(tiny_model: Path) -> None:
    s = private_session(tiny_model)
    assert any("noise alone" in warning for warning in s.optim_step().warnings)


def test_a_row_repeated_in_a_later_call_of_the_step_adds_zero(tiny_model: Path) -> None:
    s = private_session(tiny_model)
    s.forward_backward(rows())
    before = sums(s)
    s.forward_backward(rows(ROWS[:3]))
    assert_equal(sums(s), before)


def test_each_row_counts_by_the_mean_over_its_own_tokens(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"max_grad_norm": 1e6})
    perturb(s)
    labels = [[IGNORED] * (len(row) // 2) + row[len(row) // 2 :] for row in ROWS]
    batch = rows(labels=labels)
    s.forward_backward(batch)
    assert_close(sums(s), oracle_sum(s, [[row] for row in batch]), 1e-5)


def test_no_product_that_a_gpu_may_shorten_clips() -> None:
    """TF32 keeps ten bits of the factors of a product.

    Sums and elementwise products keep all bits.
    """

    class Called(TorchDispatchMode):
        names: frozenset[str] = frozenset()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names |= {func.overloadpacket.__name__}
            return func(*args, **(kwargs or {}))

    with Called() as called:
        clipped(torch.randn(3, 26), 0.5)
    assert "mul_" in called.names
    assert not called.names & {"mm", "mv", "bmm", "dot", "addmm", "addmv", "baddbmm", "matmul"}


# --- units -------------------------------------------------------------------------------------


@TRAINABLE
@pytest.mark.parametrize("tokens", [1024, 8], ids=["one-stream", "many-streams"])
def test_rows_of_one_id_are_clipped_together(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, what: Any, tokens: int
) -> None:
    monkeypatch.setattr(unit_gradients, "MAX_STREAM_TOKENS", tokens)
    s = private_session(tiny_model, dp={"unit": "id"}, **what)
    perturb(s)
    ids = ["a", "b", "a", "c", "a", "b", "d", "d"]
    s.forward_backward(rows(example_ids=ids))
    units = [[e for e in rows(example_ids=ids) if e.example_id == unit] for unit in "abcd"]
    assert_close(sums(s), oracle_sum(s, units), 2e-5)
    assert len(s._pending.units) == 4


def test_later_rows_of_an_id_add_zero(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"unit": "id"})
    s.forward_backward(rows(ROWS[:2], example_ids=["a", "b"]))
    before = sums(s)
    result = s.forward_backward(rows(ROWS[2:4], example_ids=["a", "a"]))
    assert_equal(sums(s), before)
    assert "2 repeated in the step" in result.warnings[0]


def test_ids_are_needed_where_they_are_the_unit(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"unit": "id"})
    with pytest.raises(InvalidRequestError, match="pass example_ids"):
        s.forward_backward(rows())


# --- noise -------------------------------------------------------------------------------------


@TRAINABLE
@pytest.mark.parametrize("calls", [0, 1, 8])
def test_a_step_draws_once_whatever_came(tiny_model: Path, what: Any, calls: int) -> None:
    s = private_session(tiny_model, Counting, **what)
    assert s.draws == []
    for row in rows()[:calls]:
        s.forward_backward([row])
    s.optim_step()
    assert sum(s.draws) == s.num_trainable


def released(s: PrivateSession) -> dict[str, torch.Tensor]:
    """Returns the sum plus noise of a step, from how far the weights moved under SGD at rate 1."""
    before = weights(s)
    s.optim_step()
    after = weights(s)
    return {name: (before[name] - after[name]) * s._divisor for name in before}


@pytest.mark.parametrize(
    ("bound", "sigma", "batch"), [(1.0, 1.0, 8), (0.1, 1.0, 64), (2.0, 3.0, 1), (0.1, 0.7, 1)]
)
def test_the_noise_has_std_sigma_times_bound_on_the_sum(
    tiny_model: Path, bound: float, sigma: float, batch: int
) -> None:
    dp = {"max_grad_norm": bound, "noise_multiplier": sigma, "sampling": "worst_case"}
    s = private_session(
        tiny_model, dp=dp | {"target_epsilon": 1e4}, optimizer=SGD, batch_size=batch,
        lora_config=LoRAConfig(rank=8, target_modules="all-linear"),
    )  # fmt: skip
    found = [torch.cat([t.flatten() for t in released(s).values()]) for _ in range(3)]
    values = torch.stack(found).double() / (sigma * bound)
    assert values.std() == pytest.approx(1, abs=5 / math.sqrt(2 * values.numel()))
    assert abs(values.mean()) < 5 / math.sqrt(values.numel())
    for a, b in itertools.pairwise(values):
        assert abs((a * b).mean()) < 5 / math.sqrt(len(a))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_divisor_is_the_declared_batch_never_the_actual_one(
    tiny_model: Path, count: int
) -> None:
    s = private_session(
        tiny_model, Noiseless, optimizer=SGD, batch_size=4, gradient_accumulation_steps=3
    )
    s.forward_backward(rows(ROWS[:count]))
    expected = {name: tensor / 12 for name, tensor in sums(s).items()}
    before = weights(s)
    s.optim_step()
    after = weights(s)
    assert_close({n: before[n] - after[n] for n in before}, expected, 1e-3) if count else (
        assert_equal(before, after)
    )


def test_two_runs_with_one_seed_have_different_noise(tiny_model: Path) -> None:
    moved = []
    for _ in range(2):
        torch.manual_seed(0)
        s = private_session(tiny_model, optimizer=SGD)
        s.forward_backward([])
        moved.append(torch.cat([t.flatten() for t in released(s).values()]))
    assert abs(torch.corrcoef(torch.stack(moved))[0, 1]) < 0.1


def test_noise_is_added_in_float64_and_rounded_once() -> None:
    total = ClippedSum.zero({"w": torch.zeros(100_000)}, 1.0)
    total.values += 256.0
    total.values[::2] = -256.0
    signal = total.values.float()
    gradient = privatize(total, sigma=0.5, divisor=1.0).tensors["w"]
    assert (gradient - signal).std() == pytest.approx(0.5, rel=0.02)


def test_each_value_gets_its_own_noise_however_the_draws_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clipping, "_NOISE_BLOCK", 10)
    sizes = {"a": 7, "b": 25, "c": 3, "d": 10, "e": 1}
    total = ClippedSum.zero({name: torch.zeros(size) for name, size in sizes.items()}, 2.0)
    total.values += 3.0
    drawn: list[torch.Tensor] = []

    def noise(count: int) -> torch.Tensor:
        assert count <= 10
        drawn.append(standard_normal(count))
        return drawn[-1].clone()

    found = privatize(total, sigma=0.5, divisor=4.0, noise=noise).tensors
    assert {name: tensor.numel() for name, tensor in found.items()} == sizes
    released = torch.cat([*found.values()])
    torch.testing.assert_close(released, ((3.0 + torch.cat(drawn)) / 4.0).float())


def test_privatize_consumes_the_sum_and_refuses_a_scale_without_sense() -> None:
    total = ClippedSum.zero({"w": torch.ones(3)}, 1.0)
    for sigma, divisor in ((math.inf, 1.0), (math.nan, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="finite scale"):
            privatize(total, sigma=sigma, divisor=divisor)
    privatize(total, sigma=1.0, divisor=1.0)
    assert total.sums == {}


def test_after_one_step_every_trainable_tensor_has_moved(tiny_model: Path) -> None:
    s = private_session(tiny_model, lora_config=LoRAConfig(rank=2, target_modules="all-linear"))
    before = weights(s)
    s.forward_backward(rows())
    s.optim_step()
    assert all(not torch.equal(before[name], after) for name, after in weights(s).items())


def test_grad_norm_is_that_of_the_noised_gradient(tiny_model: Path) -> None:
    s = private_session(tiny_model, optimizer=SGD)
    s.forward_backward(rows())
    before = weights(s)
    result = s.optim_step()
    assert result.grad_norm == pytest.approx(distance(before, weights(s)), rel=1e-3)
    assert result.grad_norm > 8 / 8  # the un-noised mean can be no longer than C


# --- clipping, on its own ----------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=0, max_size=6),
    bound=st.floats(1e-3, 1e3),
)
@example(values=[[4.6334746414844166e36, 0.0, 0.0]], bound=0.001)  # a factor that is denormal
def test_no_unit_adds_more_than_the_bound(values: list[list[float]], bound: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float32).reshape(-1, 3)
    for unit in tensor:
        total = clipped(unit[None], bound)
        joint = total.values.norm()
        assert joint <= bound * (1 + 1e-12)
        if not torch.isfinite(unit).all():
            assert joint == 0
            assert total.non_finite == 1


def test_a_gradient_below_the_bound_is_left_alone_and_a_zero_adds_zero() -> None:
    given_tensor = torch.tensor([[0.3, 0.4], [0.0, 0.0], [3.0, 4.0]])
    total = clipped(given_tensor, 1.0)
    torch.testing.assert_close(total.values, torch.tensor([0.3 + 0.6, 0.4 + 0.8]).double())
    assert total.norms_before.tolist() == pytest.approx([0.5, 0, 5])
    assert total.norms_after.tolist() == pytest.approx([0.5, 0, 1])
    assert total.num_clipped == 1


@pytest.mark.parametrize("count", [4096, 16384])
def test_many_rows_do_not_blur_the_part_of_one(count: int) -> None:
    """Gradients have a common direction, so the sum is long, and its last digits are coarse.

    In float32 the other rows changed by 5e-4 and 4e-3 of C.
    """
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1000, generator=generator) / 1000**0.5

    def total(first: int) -> ClippedSum:
        drawn = torch.Generator().manual_seed(1)
        found = ClippedSum.zero({"w": common}, 1.0)
        for start in range(0, count, 64):
            units = 3 * (common + torch.randn(64, 1000, generator=drawn) / 1000**0.5)
            call = ClippedSum.zero({"w": common}, 1.0)
            UnitGradients(units[first if start == 0 else 0 :]).clip_into(call)
            found.add(call)
        return found

    whole, without = total(0), total(1)
    drawn = torch.Generator().manual_seed(1)
    one = clipped(3 * (common + torch.randn(64, 1000, generator=drawn) / 1000**0.5)[:1], 1.0)
    assert whole.values.norm() > count / 2
    rest = float((whole.values - without.values - one.values).norm())
    law = 2 * len(whole.norms_before) * 2**-53 * float(whole.values.norm())
    assert rest <= min(law, 1e-8)


class Waits(TorchDispatchMode):
    """A counter of what makes the host wait for a device: a value that it reads, or a size."""

    times = 0
    waiting = frozenset({"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func.overloadpacket.__name__ in self.waiting
        by_mask = func.overloadpacket.__name__ in ("index", "index_put_")
        self.times += by_mask and any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


@TRAINABLE
def test_a_micro_batch_waits_once_for_the_device(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    monkeypatch.setattr(unit_gradients, "MAX_STREAM_TOKENS", 8)
    s = private_session(tiny_model, **what)
    streams: list[int] = []
    make = s.unit_backward.of_stream
    monkeypatch.setattr(s.unit_backward, "of_stream", lambda *of: (streams.append(1), make(*of))[1])
    with Waits() as seen:
        s.unit_backward.clipped_sum([[row] for row in rows()], 1.0, lambda: None)
    assert len(streams) > 4
    # transformers asks once for each stream whether rows are packed; the mean loss is read once.
    assert seen.times <= len(streams) + 2


def test_sums_of_different_bounds_or_parameters_do_not_add() -> None:
    total = ClippedSum.zero({"w": torch.zeros(2)}, 1.0)
    others = ({"w": torch.zeros(2)}, 2.0), ({"v": torch.zeros(2)}, 1.0)
    for other in (ClippedSum.zero(*one) for one in others):
        with pytest.raises(ValueError, match="do not add up"):
            total.add(other)


# --- the budget --------------------------------------------------------------------------------


def test_an_epoch_of_distinct_rows_trains_and_charges_one_use(tiny_model: Path) -> None:
    s = private_session(tiny_model, batch_size=2)
    spent = []
    for start in range(0, 8, 2):
        s.forward_backward(rows(ROWS[start : start + 2]))
        spent.append(s.optim_step().dp_metrics.epsilon_spent)
    assert spent[0] == pytest.approx(4.377, abs=1e-3)
    assert spent[1:] == [0, 0, 0]
    s.forward_backward(rows(ROWS[:2]))
    metrics = s.optim_step().dp_metrics
    assert metrics.total_epsilon == pytest.approx(6.573, abs=1e-3)
    assert sum(spent) + metrics.epsilon_spent == pytest.approx(metrics.total_epsilon, abs=1e-9)


def test_a_unit_at_its_limit_adds_zero_and_a_batch_of_such_is_refused(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"max_participations": 1})
    s.forward_backward(rows(ROWS[:4]))
    s.optim_step()
    result = s.forward_backward(rows(ROWS[2:]))
    assert "2 use limit reached" in result.warnings[0]
    assert_close(sums(s), oracle_sum(s, [[row] for row in rows(ROWS[4:])]), 2e-5)
    s.optim_step()
    before, spent = (
        weights(s),
        s.budget.registry.ledgers.privacy_info("default", "default", run_of(s)),
    )
    with pytest.raises(DPBudgetExceededError, match="used 1 times"):
        s.forward_backward(rows())
    with pytest.raises(DPBudgetExceededError):  # the step that was queued behind it
        s.optim_step()
    assert_equal(weights(s), before)
    assert s.budget.registry.ledgers.privacy_info("default", "default", run_of(s)) == spent
    assert s.state().step == 2


def run_of(s: PrivateSession) -> str:
    return s.budget.run_id


def test_the_last_step_of_a_worst_case_budget_is_the_last(tiny_model: Path) -> None:
    dp = {"sampling": "worst_case", "noise_multiplier": 1.0, "target_epsilon": 7.0}
    s = private_session(tiny_model, dp=dp)
    for _ in range(2):
        s.forward_backward(rows())
        s.optim_step()
    before, moments = weights(s), s.state().optimizer
    with pytest.raises(DPBudgetExceededError, match="all 2"):
        s.forward_backward(rows())
    with pytest.raises(DPBudgetExceededError):
        s.optim_step()
    assert_equal(weights(s), before)
    assert_equal(s.state().optimizer, moments)
    assert s.step == 2
    s.forward_backward(rows(), train=False)


def test_an_empty_step_is_noised_and_charged(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"sampling": "worst_case"}, max_steps=2)
    before = weights(s)
    result = s.forward_backward([])
    assert math.isnan(result.loss)
    metrics = s.optim_step().dp_metrics
    assert metrics.noise_applied
    assert metrics.epsilon_spent > 4
    assert math.isnan(metrics.grad_norm_before_clip)
    assert distance(weights(s), before) > 0


def test_a_failed_call_spoils_the_step_and_charges_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = private_session(tiny_model)

    def fail(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(s.unit_backward, "of_stream", fail)
        with pytest.raises(MemoryError):
            s.forward_backward(rows())
    before = weights(s)
    with pytest.raises(WindowSpoiledError):
        s.optim_step()
    assert_equal(weights(s), before)
    s.forward_backward(rows())
    assert s.optim_step().dp_metrics.total_epsilon == pytest.approx(4.377, abs=1e-3)


def test_a_failure_after_the_charge_ends_the_session(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = private_session(tiny_model)
    s.forward_backward(rows())

    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(s._optimizer, "step", fail)
    with pytest.raises(MemoryError):
        s.optim_step()
    assert s.broken
    assert len(s._pending.total.norms_before) == 0


def test_a_charge_pays_for_one_draw(tiny_model: Path) -> None:
    s = private_session(tiny_model)
    s.forward_backward(rows())
    charge = s.budget.charge(s._pending.units, noised=True)
    assert charge.spend() == 1.0
    with pytest.raises(ServiceError, match="one draw"):
        charge.spend()


def test_a_step_without_noise_needs_an_unlimited_data_set(tiny_model: Path) -> None:
    s = private_session(tiny_model)
    s.forward_backward(rows())
    before = weights(s)
    with pytest.raises(DPBudgetExceededError, match="unlimited"):
        s.optim_step(apply_dp_noise=False)
    assert_equal(weights(s), before)
    free = private_session(tiny_model, dp={"target_epsilon": None})
    free.forward_backward(rows())
    metrics = free.optim_step(apply_dp_noise=False).dp_metrics
    assert not metrics.noise_applied
    assert metrics.total_epsilon == math.inf
    assert free.lineage.guarantee == "none"
    free.forward_backward(rows(ROWS[:1]))
    assert free.optim_step().dp_metrics.total_epsilon == math.inf
    assert free.lineage.guarantee == "none"


def test_hidden_metrics_show_nothing_of_the_data(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"show_private_metrics": False})
    result = s.forward_backward(rows([*ROWS, [7]]))
    assert math.isnan(result.loss)
    assert (result.gradient_hash, result.warnings) == ("", ())
    assert math.isnan(s.forward_backward(rows(), train=False).loss)
    metrics = s.optim_step().dp_metrics
    assert math.isnan(metrics.grad_norm_before_clip)
    assert math.isnan(metrics.grad_norm_after_clip)
    assert metrics.num_clipped == 0


def test_metrics_are_medians_over_the_units_of_the_step(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"max_grad_norm": 20.0})
    perturb(s)
    s.forward_backward(rows()[:3])
    s.forward_backward(rows()[3:])
    norms = sorted(norm(oracle_unit_gradient(s, [row])) for row in rows())
    metrics = s.optim_step().dp_metrics
    assert metrics.grad_norm_before_clip == pytest.approx((norms[3] + norms[4]) / 2, rel=1e-4)
    clipped = [min(value, 20.0) for value in norms]
    assert metrics.grad_norm_after_clip == pytest.approx((clipped[3] + clipped[4]) / 2, rel=1e-4)
    assert metrics.num_clipped == sum(value > 20 for value in norms)
    assert 0 < metrics.num_clipped < 8


def test_a_batch_far_from_the_declared_one_is_pointed_out_once(tiny_model: Path) -> None:
    s = private_session(tiny_model, batch_size=64, dp={"noise_multiplier": 3.0})
    told = []
    for row in rows()[:5]:
        s.forward_backward([row])
        told.append(s.optim_step().warnings)
    assert [len(warnings) for warnings in told] == [0, 0, 1, 0, 0]
    assert "1 rows" in told[2][0]
    assert "64" in told[2][0]


# --- lineage -----------------------------------------------------------------------------------


def test_a_nonprivate_checkpoint_is_refused_by_a_private_run(tiny_model: Path) -> None:
    plain = session(tiny_model)
    untouched = plain.state()
    plain.forward_backward(rows())
    plain.optim_step()
    s = private_session(tiny_model)
    s.load(untouched)
    before = weights(s)
    with pytest.raises(InvalidRequestError, match="allow_nonprivate_init"):
        s.load(plain.state())
    assert_equal(weights(s), before)
    allowed = private_session(tiny_model, dp={"allow_nonprivate_init": True})
    warnings = allowed.load(plain.state())
    assert any("no privacy guarantee" in warning for warning in warnings)
    allowed.forward_backward(rows())
    allowed.optim_step()
    assert allowed.state().lineage.guarantee == "none"


def test_a_private_checkpoint_carries_its_ledgers_and_links_data_sets(tiny_model: Path) -> None:
    known = registry()
    first = private_session(tiny_model, known=known, dataset_id="clinic")
    first.forward_backward(rows())
    first.optim_step()
    state = first.state()
    assert state.lineage.guarantee == "private"
    clinic = Ledger.replay(known.ledgers.entries("default", "clinic"))
    assert state.lineage.ledgers == {"clinic": clinic.at}
    second = private_session(tiny_model, known=known, dataset_id="bank")
    second.load(state)
    second.forward_backward(rows())
    second.optim_step()
    assert set(second.state().lineage.ledgers) == {"clinic", "bank"}
    bank = Ledger.replay(known.ledgers.entries("default", "bank"))
    assert bank.linked == {"clinic"}


def test_load_never_refunds(tiny_model: Path) -> None:
    s = private_session(tiny_model, dp={"sampling": "worst_case", "noise_multiplier": 2.0})
    start = s.state()
    for _ in range(3):
        s.forward_backward(rows())
        last = s.optim_step().dp_metrics
    s.load(start)
    assert s.step == 0
    s.forward_backward(rows())
    assert s.optim_step().dp_metrics.total_epsilon > last.total_epsilon


# --- models that mix rows ----------------------------------------------------------------------


def test_a_model_with_batch_norm_is_refused(tiny_model: Path) -> None:
    base = Base.load(str(tiny_model), cache=tiny_model)
    base.model.extra = torch.nn.BatchNorm1d(4)  # frozen, as all of the base: it still mixes
    base.model.requires_grad_(False)
    config = private_session(tiny_model).config
    with pytest.raises(InvalidRequestError, match="cannot be trained privately"):
        PrivateSession(base, config, private_session(tiny_model).budget)
