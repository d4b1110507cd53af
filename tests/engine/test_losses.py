"""Tests losses through the output matrix in chunks, against torch's own on whole logits."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actors.engine import attention, losses
from actors.engine.losses import head_losses, sums_by_example
from actors.engine.model import Base
from support.helpers import assert_close, examples, oracle_gradients, padded, session, window
from tg_tinker.data.batch import normalize

L, D, V = 23, 16, 300


class Largest(TorchDispatchMode):
    """A mode that records the number of values of the largest tensor that any operation returns."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.values = max([self.values, *sizes])
        return found


def pieces(*, head_trains: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(L, D, generator=generator).requires_grad_()
    head = torch.randn(V, D, generator=generator).requires_grad_(head_trains)
    targets = torch.randint(V, (L,), generator=generator)
    return hidden, head, targets, torch.rand(L, generator=generator)


@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen", "trains"])
def test_a_chunk_is_gone_before_the_next_is_made(
    head_trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    make = losses._log_likelihoods

    def watched(*of: torch.Tensor) -> torch.Tensor:
        assert not any(held() is not None for held in made)
        found = make(*of)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(losses, "_log_likelihoods", watched)
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * V * 5)
    hidden, head, targets, weights = pieces(head_trains=head_trains)
    head_losses(hidden, head, targets).backward(weights)
    assert len(made) == (10 if head_trains else 5)


def test_many_chunks_cost_a_short_type_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that were added up in bfloat16 were 1 % off."""
    hidden, head, targets, _ = pieces(head_trains=True)
    hidden, targets = hidden.detach().repeat(20, 1).bfloat16(), targets.repeat(20)
    found = []
    for rows in (1000, 2):
        monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * V * rows)
        trained = head.detach().bfloat16().requires_grad_()
        head_losses(hidden, trained, targets).sum().backward()
        assert trained.grad is not None
        found.append(trained.grad.float())
    whole, many = found
    assert torch.linalg.vector_norm(many - whole) < 3e-3 * torch.linalg.vector_norm(whole)


@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("rows", [1, 5, 23, 1000])
def test_chunks_give_the_losses_and_gradients_of_whole_logits(
    rows: int, head_trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * V * rows)
    hidden, head, targets, weights = pieces(head_trains=head_trains)
    found = head_losses(hidden, head, targets)
    found.backward(weights)  # a weight of its own for each token, as in a private run
    h, w = (t.detach().double().requires_grad_() for t in (hidden, head))
    expected = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="none")
    expected.backward(weights.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-5)
    if head_trains:
        torch.testing.assert_close(head.grad.double(), w.grad, rtol=1e-5, atol=1e-5)
    else:
        assert head.grad is None


@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen", "trains"])
def test_logits_of_all_tokens_never_exist(
    head_trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * V * 5)
    hidden, head, targets, weights = pieces(head_trains=head_trains)
    with Largest() as seen:
        head_losses(hidden, head, targets).backward(weights)
    assert seen.values <= V * max(5, D)  # a chunk's logits, or the gradient of the matrix


def test_a_token_that_is_not_finite_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * V * 5)
    hidden, head, targets, _ = pieces(head_trains=False)
    with torch.no_grad():
        hidden[7] = float("nan")
    sums = sums_by_example(head_losses(hidden, head, targets), torch.arange(L) // 4, 6)
    sums.sum().backward()
    assert [bool(torch.isfinite(s)) for s in sums] == [True, False, True, True, True, True]
    assert torch.isfinite(hidden.grad).all(1).tolist() == [i != 7 for i in range(L)]


def test_no_label_is_no_loss_and_no_gradient() -> None:
    hidden, head, _, _ = pieces(head_trains=True)
    found = head_losses(hidden[:0], head, torch.zeros(0, dtype=torch.int64))
    found.sum().backward()
    assert found.shape == (0,)
    assert not hidden.grad.any()
    assert not head.grad.any()


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_session_equals_the_plain_loop_in_many_chunks(
    tmp_path: Path, full: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.models import make_model

    s = session(
        make_model(tmp_path / "m", tie_word_embeddings=tied),
        **({"lora_config": None} if full else {}),
    )
    assert s.base.plain_head
    s.forward_backward(examples())
    s.optim_step()
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * 259 * 7)
    batch = padded([([*range(5, 30)], [*range(5, 30)]), ([9, 8, 7], [-100, 8, 7])], "right")
    s.forward_backward(normalize(batch))
    assert_close(window(s), oracle_gradients(s, batch), 1e-5)


SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["capped", "scaled", "shifted"])
def test_a_head_that_does_more_than_multiply_is_left_to_its_model(
    tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PhiConfig

    from support.models import make_tokenizer

    config = {
        "capped": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0),
        "scaled": lambda: CohereConfig(**SMALL, logit_scale=0.25),
        "shifted": lambda: PhiConfig(**SMALL),  # a bias, of zeros so far
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    s = session(tmp_path, lora_config=None)
    assert not s.base.plain_head
    batch = padded([([5, 6, 7, 8], [5, 6, 7, 8]), ([9, 10, 11], [9, 10, 11])], "right")
    s.forward_backward(normalize(batch))
    assert_close(window(s), oracle_gradients(s, batch), 1e-5)


def test_a_row_longer_than_a_stream_recomputes_activations(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.engine import session as engine

    whole, cut = session(tiny_model), session(tiny_model)
    whole.forward_backward(examples())
    monkeypatch.setattr(engine, "MAX_STREAM_TOKENS", 7)
    seen = []
    real = engine.labeled_losses

    def noted(base: Base, stream: Any) -> torch.Tensor:
        seen.append((stream.tokens.numel(), cut.recomputation.on))
        return real(base, stream)

    monkeypatch.setattr(engine, "labeled_losses", noted)
    cut.forward_backward(examples())
    assert_close(window(cut), window(whole), 1e-5)
    assert {size for size, _ in seen} & {12}
    assert all(recomputes == (size > 7) for size, recomputes in seen)


class Counted(TorchDispatchMode):
    """A counter of forward computations of attention."""

    times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func in attention._KERNELS
        return func(*args, **(kwargs or {}))


def test_attention_is_not_among_what_is_recomputed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.engine import session as engine

    s = session(tiny_model)
    monkeypatch.setattr(engine, "MAX_STREAM_TOKENS", 7)
    entered: list[int] = []
    mlp = s.base.model.get_decoder().layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: entered.append(1))
    with Counted() as seen:
        s.forward_backward([examples()[4]])
    assert len(entered) == 2
    assert seen.times == s.base.model.config.num_hidden_layers
