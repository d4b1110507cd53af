"""Tests the training step without Ray: against the plain loop, and its promises one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.engine import session as engine
from actors.engine.gradients import GradientSum, gradient_hash
from actors.engine.optim import learning_rate
from support.helpers import (
    RAGGED,
    assert_close,
    assert_equal,
    examples,
    oracle_gradients,
    padded,
    session,
    weights,
    window,
)
from tg_tinker import (
    ArtifactMismatchError,
    InvalidRequestError,
    LoRAConfig,
    NonFiniteError,
    OptimizerConfig,
    ResourceConfig,
    WindowSpoiledError,
)
from tg_tinker.data.batch import normalize

LORA = {"lora_config": LoRAConfig(rank=4)}
FULL = {"lora_config": None}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("what", [LORA, FULL], ids=["lora", "full"])
def test_gradients_equal_the_plain_padded_loop(tiny_model: Path, what: dict, side: str) -> None:
    s = session(tiny_model, **what)
    if what is LORA:  # B starts at zero: take a step so that A has gradients too
        s.forward_backward(examples())
        s.optim_step()
    batch = padded(RAGGED, side)
    result = s.forward_backward(normalize(batch))
    expected = oracle_gradients(s, batch)
    assert_close(window(s), expected, 1e-5)
    assert result.num_tokens == sum(len(ids) for ids, _ in RAGGED)


def test_loss_is_the_token_weighted_mean_over_labeled_tokens(tiny_model: Path) -> None:
    s = session(tiny_model)
    whole = s.forward_backward(examples()).loss
    rows = [(e, s.forward_backward([e], train=False).loss) for e in examples() if e.num_labeled]
    total = sum(e.num_labeled for e, _ in rows)
    assert whole == pytest.approx(sum(e.num_labeled * x for e, x in rows) / total, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_how_a_batch_is_split_into_calls_changes_nothing(tiny_model: Path, size: int) -> None:
    one, many = session(tiny_model), session(tiny_model)
    rows = [*(e for e in examples() if e.num_labeled), examples()[0]]
    assert len(rows) == 8
    one.forward_backward(rows)
    for start in range(0, len(rows), size):
        many.forward_backward(rows[start : start + size])
    assert_close(window(many), window(one), 1e-5)
    assert one.optim_step().grad_norm == pytest.approx(many.optim_step().grad_norm, rel=1e-5)


def test_how_a_batch_is_cut_into_streams_changes_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = session(tiny_model), session(tiny_model)
    one.forward_backward(examples())
    monkeypatch.setattr(engine, "MAX_STREAM_TOKENS", 7)
    many.forward_backward(examples())
    assert_close(window(many), window(one), 1e-5)


def test_neighbors_in_a_stream_do_not_change_an_example(tiny_model: Path) -> None:
    s = session(tiny_model)
    one = examples()[0]
    alone = s.forward_backward([one], train=False).loss
    other = examples()[4]
    both = s.forward_backward([other, one], train=False).loss * (
        one.num_labeled + other.num_labeled
    )
    rest = s.forward_backward([other], train=False).loss * other.num_labeled
    assert both - rest == pytest.approx(alone * one.num_labeled, rel=1e-5)


def test_eval_leaves_the_window_and_the_weights_alone(tiny_model: Path) -> None:
    s = session(tiny_model, lora_config=LoRAConfig(rank=4, dropout=0.5))
    s.forward_backward(examples())
    before = window(s)
    first = s.forward_backward(examples(), train=False)
    again = s.forward_backward(examples(), train=False)
    assert first.loss == again.loss
    assert first.gradient_hash == ""
    assert_equal(window(s), before)


def test_dropout_acts_in_train_mode_only_and_repeats_with_the_seed(tiny_model: Path) -> None:
    config = {"lora_config": LoRAConfig(rank=4, dropout=0.5)}
    a, b, other = (session(tiny_model, **config, seed=seed) for seed in (1, 1, 2))
    for s in (a, b, other):  # B starts at zero, which hides what dropout does to A's input
        s.forward_backward(examples())
        s.optim_step()
    hashes = [s.forward_backward(examples()).gradient_hash for s in (a, b, other)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]
    second_call = a.forward_backward(examples()).gradient_hash
    assert second_call != hashes[0]


def test_activations_that_are_computed_again_have_the_same_masks(tiny_model: Path) -> None:
    """With other masks in the backward pass, the gradient would belong to no forward pass."""
    lora = LoRAConfig(rank=4, dropout=0.5)
    kept, again = (
        session(tiny_model, lora_config=lora, resources=ResourceConfig(activation_checkpointing=on))
        for on in (False, True)
    )
    for s in (kept, again):
        s.forward_backward(examples())
        s.optim_step()
        s.forward_backward(examples())
    assert_close(window(again), window(kept), 1e-5)


def test_sampling_state_of_torch_does_not_disturb_training(tiny_model: Path) -> None:
    config = {"lora_config": LoRAConfig(rank=4, dropout=0.5)}
    a, b = session(tiny_model, **config), session(tiny_model, **config)
    for s in (a, b):
        s.forward_backward(examples())
        s.optim_step()
        torch.rand(17 if s is a else 3)
        s.forward_backward(examples())
        s.optim_step()
    assert_equal(weights(a), weights(b))


def test_equal_runs_give_equal_hashes_and_one_token_changes_both(tiny_model: Path) -> None:
    rows = [list(ids) for ids, _ in RAGGED]
    a, b, c = (session(tiny_model) for _ in range(3))
    first = a.forward_backward(normalize({"input_ids": rows}))
    same = b.forward_backward(normalize({"input_ids": rows}))
    rows[4][3] += 1
    changed = c.forward_backward(normalize({"input_ids": rows}))
    assert (first.batch_hash, first.gradient_hash) == (same.batch_hash, same.gradient_hash)
    assert first.batch_hash != changed.batch_hash
    assert first.gradient_hash != changed.gradient_hash


def test_gradient_hash_is_of_this_call_not_of_the_window(tiny_model: Path) -> None:
    s = session(tiny_model)
    first = s.forward_backward(examples())
    second = s.forward_backward(examples())
    assert first.gradient_hash == second.gradient_hash
    assert s._window.weight == 2 * sum(e.num_labeled for e in examples())


def test_sketch_of_a_large_gradient_sees_any_single_change() -> None:
    generator = np.random.default_rng(0)
    large = {"w": torch.from_numpy(generator.normal(size=17 * 2**20).astype("float32"))}
    before = gradient_hash(large)
    assert before.startswith("sketch:")
    assert gradient_hash({"w": large["w"].clone()}) == before
    large["w"][12_345_678] += 1e-3
    assert gradient_hash(large) != before
    assert gradient_hash({"w": large["w"][:10]}).startswith("sha256:")


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_every_optimizer_learns_and_resumes_to_the_bit(tiny_model: Path, name: str) -> None:
    optimizer = OptimizerConfig(
        name=name, learning_rate=1e-2, schedule="cosine", warmup_steps=2, momentum=0.9,
        weight_decay=0.01,
    )  # fmt: skip
    config = {"optimizer": optimizer, "max_steps": 20, "seed": 3,
              "lora_config": LoRAConfig(rank=4, dropout=0.2)}  # fmt: skip
    straight, first, second = (session(tiny_model, **config) for _ in range(3))
    losses = []
    for _ in range(4):
        losses.append(straight.forward_backward(examples()).loss)
        straight.optim_step()
    for _ in range(2):
        first.forward_backward(examples())
        first.optim_step()
    assert second.load(first.state()) == ()
    for _ in range(2):
        second.forward_backward(examples())
        second.optim_step()
    assert losses[-1] < losses[0]
    assert_equal(weights(second), weights(straight))


def test_step_equals_torch_adamw_on_the_mean_gradient(tiny_model: Path) -> None:
    settings = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5)
    s = session(tiny_model, optimizer=settings)
    start = {n: t.clone().requires_grad_() for n, t in weights(s).items()}
    reference = torch.optim.AdamW(
        start.values(), lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    for _ in range(3):
        s.forward_backward(examples())
        count = s._window.weight
        for name, tensor in window(s).items():
            start[name].grad = tensor / count
        norm = torch.nn.utils.clip_grad_norm_(start.values(), 0.5)
        reference.step()
        result = s.optim_step()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert_close(weights(s), {n: t.detach() for n, t in start.items()}, 1e-6)


def test_schedules_rise_and_fall_where_they_say() -> None:
    def rates(schedule: str, warmup: int) -> list[float]:
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
        return [round(learning_rate(config, step, 4 + warmup), 4) for step in range(5 + warmup)]

    assert rates("constant", 2) == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates("linear", 0) == [1, 0.75, 0.5, 0.25, 0]
    assert rates("cosine", 0) == [1, 0.8536, 0.5, 0.1464, 0]
    assert rates("linear", 4)[:5] == [0.25, 0.5, 0.75, 1, 1]


def test_learning_rate_of_a_result_is_the_one_used(tiny_model: Path) -> None:
    s = session(tiny_model, max_steps=4, optimizer=OptimizerConfig(schedule="linear"))
    seen = []
    for _ in range(4):
        s.forward_backward(examples())
        seen.append(s.optim_step().learning_rate)
    assert seen == pytest.approx([1e-4, 7.5e-5, 5e-5, 2.5e-5])


# --- failures ---------------------------------------------------------------------------------


def test_a_failed_batch_spoils_its_window_and_the_next_is_clean(tiny_model: Path) -> None:
    s, clean = session(tiny_model), session(tiny_model)
    s.forward_backward(examples())
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        s.forward_backward(normalize({"input_ids": [[1, 999]]}))
    before = weights(s)
    with pytest.raises(WindowSpoiledError, match="step 1"):
        s.optim_step()
    assert_equal(weights(s), before)
    for each in (s, clean):
        each.forward_backward(examples())
        each.optim_step()
    assert_equal(weights(s), weights(clean))


def test_a_failed_eval_spoils_nothing(tiny_model: Path) -> None:
    s = session(tiny_model)
    s.forward_backward(examples())
    with pytest.raises(InvalidRequestError):
        s.forward_backward(normalize({"input_ids": [[1, 999]]}), train=False)
    assert s.optim_step().step == 1


def test_cancelled_between_streams_spoils_and_leaves_no_gradient(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session(tiny_model)
    monkeypatch.setattr(engine, "MAX_STREAM_TOKENS", 7)
    calls = []

    def cancel_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError):
        s.forward_backward(examples(), check_cancelled=cancel_third)
    assert not window(s)
    assert all(p.grad is None for p in s._parameters.values())
    with pytest.raises(WindowSpoiledError):
        s.optim_step()


def test_step_without_gradient_is_refused(tiny_model: Path) -> None:
    s = session(tiny_model)
    with pytest.raises(InvalidRequestError, match="forward_backward"):
        s.optim_step()
    s.forward_backward(examples(), train=False)
    with pytest.raises(InvalidRequestError, match="forward_backward"):
        s.optim_step()
    assert s.step == 0


def test_non_finite_weights_give_a_typed_error_and_spoil(tiny_model: Path) -> None:
    s = session(tiny_model)
    with torch.no_grad():  # all of them: attention kernels of some CPUs drop a query that is NaN
        for parameter in s._parameters.values():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        s.forward_backward(examples())
    with pytest.raises(WindowSpoiledError):
        s.optim_step()


def test_non_finite_gradient_moves_no_weight(tiny_model: Path) -> None:
    s = session(tiny_model)
    s.forward_backward(examples())
    next(iter(s._window.tensors.values()))[0, 0] = float("inf")
    before = weights(s)
    with pytest.raises(NonFiniteError):
        s.optim_step()
    assert_equal(weights(s), before)
    assert s.step == 0


def test_a_session_is_broken_from_where_weights_move_to_where_they_have(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    s = session(tiny_model)
    places = {"torch.nn.utils.get_total_norm": False, "torch.optim.AdamW.step": True}
    for place, broken in places.items():
        s.forward_backward(examples())
        with monkeypatch.context() as patched:
            patched.setattr(place, full)
            with pytest.raises(MemoryError):
                s.optim_step()
        assert s.broken is broken


def test_completed_run_refuses_steps_until_an_earlier_state_is_loaded(tiny_model: Path) -> None:
    s = session(tiny_model, max_steps=1)
    start = s.state()
    s.forward_backward(examples())
    s.optim_step()
    assert s.completed
    s.forward_backward(examples())
    with pytest.raises(InvalidRequestError, match="max_steps 1"):
        s.optim_step()
    s.load(start)
    assert not s.completed
    s.forward_backward(examples())
    assert s.optim_step().step == 1


# --- state ------------------------------------------------------------------------------------


def test_state_is_a_copy_and_pending_gradients_are_not_in_it(tiny_model: Path) -> None:
    s = session(tiny_model)
    saved = s.state()
    before = {name: tensor.clone() for name, tensor in saved.weights.items()}
    s.forward_backward(examples())
    assert_equal(s.state().weights, before)
    s.optim_step()
    assert_equal(saved.weights, before)


def test_load_drops_the_window(tiny_model: Path) -> None:
    s = session(tiny_model)
    saved = s.state()
    s.forward_backward(examples())
    s.load(saved)
    with pytest.raises(InvalidRequestError, match="forward_backward"):
        s.optim_step()


def test_load_without_optimizer_warns_and_starts_its_moments_anew(tiny_model: Path) -> None:
    s = session(tiny_model)
    s.forward_backward(examples())
    s.optim_step()
    warnings = s.load(s.state(include_optimizer=False))
    assert s.step == 1
    assert any("optimizer" in w for w in warnings)
    assert not s._optimizer.state()


def test_load_on_other_threads_warns_that_it_is_not_bit_exact(tiny_model: Path) -> None:
    s = session(tiny_model)
    saved = s.state()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert any("threads" in w for w in s.load(saved))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "part", ["seed", "threads", "stream_tokens", "dtype", "device", "torch", "matmul"]
)
def test_each_thing_that_bits_depend_on_is_named_where_it_differs(
    tiny_model: Path, part: str
) -> None:
    s = session(tiny_model)
    saved = s.state()
    (warning,) = s.load(replace(saved, plan=saved.plan | {part: "other"}))
    assert warning == f"not bit-exact: {part} differ from when the artifact was saved"
    assert s.load(saved) == ()


def test_target_modules_in_another_order_are_the_same_geometry(tiny_model: Path) -> None:
    one, other = (
        session(tiny_model, lora_config=LoRAConfig(rank=4, target_modules=names))
        for names in (("q_proj", "v_proj"), ("v_proj", "q_proj"))
    )
    one.load(other.state())


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"lora_config": LoRAConfig(rank=8)}, "rank is 8 in the artifact, 4 here"),
        ({"lora_config": LoRAConfig(rank=4, alpha=8.0)}, "alpha"),
        ({"lora_config": LoRAConfig(rank=4, target_modules=("q_proj",))}, "target_modules"),
        ({"lora_config": None}, "lora"),
        ({"optimizer": OptimizerConfig(name="sgd")}, "optimizer"),
    ],
)
def test_load_of_another_geometry_is_refused_and_changes_nothing(
    tiny_model: Path, other: dict, part: str
) -> None:
    s = session(tiny_model)
    before = weights(s)
    with pytest.raises(ArtifactMismatchError, match=part):
        s.load(session(tiny_model, **other).state())
    assert_equal(weights(s), before)


def test_load_of_another_base_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from support.models import make_model

    other = session(make_model(tmp_path / "other", seed=1))
    with pytest.raises(ArtifactMismatchError, match="base"):
        session(tiny_model).load(other.state())


def test_mean_divides_once_by_the_labeled_tokens() -> None:
    total = GradientSum.zero()
    total.add(GradientSum({"w": torch.tensor([6.0])}, weight=2, count=1))
    total.add(GradientSum({"w": torch.tensor([4.0])}, weight=3, count=1))
    assert total.count == 2
    assert total.mean().tensors["w"].item() == 2.0
