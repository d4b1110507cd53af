"""Tests private evaluation: what one unit can move, and the order of losses, charge and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.privacy import evaluation
from actors.privacy.clipping import Noise
from actors.privacy.evaluation import HeldOut, clipped_sum, multiplier, released
from actors.privacy.noise import LEAST_SIGMA
from actors.privacy.units import unit_ids
from actors.training.call_journal import CallJournal
from actors.training.place import Place
from actors.training.worker import Worker
from support.artifacts import TENANT, Service
from support.artifacts import service as service  # a fixture
from support.fakes import FakeService, FakeTrainingClient
from support.helpers import IGNORED, assert_equal, by_the_book, weights
from support.models import make_model
from support.privacy_helpers import (
    ROWS,
    Noiseless,
    PrivateSession,
    new_budget,
    perturb,
    private_config,
    private_session,
    registry,
    rows,
    sums,
)
from tg_tinker import (
    DPBudgetExceededError,
    InvalidRequestError,
    LoRAConfig,
    NotFoundError,
    PrivateEvalResult,
    ServiceError,
)
from tg_tinker.cluster.messages import Request
from tg_tinker.data.batch import Example
from tg_tinker.records.accounting import EVALUATION_BOUND, gaussian_epsilon
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import Charge, PrivacyReport

HELD = [[100 + row, *ids] for row, ids in enumerate(ROWS)]
"""Eight rows that nobody trains on."""

IDS = ["a", "b", "a", "c", "b", "d", "d", "d"]
FINE = 1e-4
"""A std whose grid is finer than any difference that these tests look at."""


@pytest.fixture(autouse=True)
def _any_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests look through noise that is too small for a guarantee."""
    monkeypatch.setattr(evaluation, "LEAST_SIGMA", 1e-4)


def test_noise_that_its_range_would_betray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "LEAST_SIGMA", LEAST_SIGMA)
    with pytest.raises(InvalidRequestError, match=r"outside 0\.05 to 1e\+06"):
        multiplier(0.0099, 10)
    assert multiplier(0.01, 10) == pytest.approx(0.05)


def evaluating(
    model: Path, kind: type[PrivateSession] = Noiseless, scale: float = 0.1, **values: Any
) -> PrivateSession:
    """Returns a private session whose weights differ much from those of the base model.

    The head of both is sharpened, so that the losses of some rows differ by more than two nats.
    """
    s = sharpened(private_session(model, kind, **values))
    perturb(s, scale)
    return s


def sharpened(s: PrivateSession) -> PrivateSession:
    with torch.no_grad():
        s.base.model.get_output_embeddings().weight.mul_(8)
    return s


def held_out(s: PrivateSession, epsilon: float | None = None, unit: str = "example") -> HeldOut:
    s.budget.registry.ledgers.register("default", "held", epsilon, 1e-5, unit)
    return HeldOut.opened(s.budget, "held")


def entries(s: PrivateSession, dataset: str = "held") -> list[dict[str, Any]]:
    found = s.budget.registry.ledgers.entries("default", dataset)
    Ledger.replay(found)
    return found


def plain_loss(s: PrivateSession, example: Example) -> float:
    ids, labels = torch.from_numpy(example.input_ids)[None], torch.from_numpy(example.labels)
    with by_the_book(s.base.model) as model, torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED))


def oracle_sum(s: PrivateSession, base: PrivateSession, units: Sequence[list[Example]]) -> float:
    """Returns the sum of clipped differences to a session that was never trained."""
    total = 0.0
    for unit in units:
        mean = sum(plain_loss(s, row) - plain_loss(base, row) for row in unit) / len(unit)
        total += max(-2.0, min(2.0, mean))
    return total


# --- the sum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "id"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_the_value_is_the_clipped_difference_to_the_base_model(
    tmp_path: Path, unit: str, bias: Any
) -> None:
    model = make_model(tmp_path / "model", attention_bias=True)
    lora = LoRAConfig(rank=4, bias=bias, dropout=0.3)
    values: dict[str, Any] = {"lora_config": lora, "dp": {"unit": "example"}}
    s, base = evaluating(model, **values), sharpened(private_session(model, **values))
    s.forward_backward(rows(ROWS, example_ids=IDS))  # with dropout, which must be off again
    examples = rows(HELD, example_ids=IDS)
    groups = [[row] for row in examples]
    if unit == "id":
        groups = [[row for row in examples if row.example_id == name] for name in "abcd"]
    result = s.private_eval(examples, held_out(s, unit=unit), FINE)
    assert result.num_units == len(groups)
    expected = oracle_sum(s, base, groups)
    assert result.value == pytest.approx(expected / len(groups), abs=2e-4)
    parts = [oracle_sum(s, base, [[row]]) for row in examples]
    assert EVALUATION_BOUND in map(abs, parts)  # some are clipped,
    assert not all(abs(part) == EVALUATION_BOUND for part in parts)  # and some are not


@pytest.mark.parametrize(("unit", "scale"), [("example", 0.02), ("example", 1.0), ("id", 1.0)])
def test_a_unit_moves_the_sum_by_at_most_its_bound(
    tiny_model: Path, unit: str, scale: float
) -> None:
    """Each unit in turn is replaced by a null unit; the sum is read before it gets noise."""
    s = evaluating(tiny_model, scale=scale)
    examples = rows(HELD, example_ids=IDS)
    names = IDS if unit == "id" else [str(row) for row in range(len(HELD))]
    held = held_out(s, unit=unit)
    n = len(set(names))
    whole = s.private_eval(examples, held, FINE, n).value * n
    moved = []
    for name in sorted(set(names)):
        rest = [row for row, other in zip(examples, names, strict=True) if other != name]
        alone = [row for row, other in zip(examples, names, strict=True) if other == name]
        without = s.private_eval(rest, held, FINE, n).value * n
        moved.append(abs(whole - without))
        part = s.private_eval(alone, held, FINE, n).value * n
        assert whole - without == pytest.approx(part, abs=1e-4)  # the others stay as they are
    assert max(moved) <= EVALUATION_BOUND + 1e-4
    assert scale < 1 or max(moved) == pytest.approx(EVALUATION_BOUND, abs=1e-4)


def test_a_row_that_cannot_count_adds_zero_and_its_unit_is_charged(tiny_model: Path) -> None:
    s = evaluating(tiny_model)
    held = held_out(s)
    good = s.private_eval(rows(HELD[:3]), held, FINE, 8).value
    ids = [*HELD[:3], [200, 201, 202], [9, 10**6, 9], [7] * 2000, HELD[0]]
    labels = [*HELD[:3], [IGNORED] * 3, [9, 10**6, 9], [7] * 2000, HELD[0]]
    result = s.private_eval(rows(ids, labels=labels), held, FINE, 8)
    assert result.value == good
    assert result.warnings == (
        "4 of 7 rows added nothing to the mean: 1 nothing labeled, 1 out of vocabulary,"
        " 1 repeated in the call, 1 too long",
    )
    assert len(charged(s, ids)) == 6  # the ledger does not tell which rows have a defect


def test_a_unit_whose_loss_is_not_finite_adds_zero(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = evaluating(tiny_model)
    for bad in (math.nan, math.inf, -math.inf):
        losses = iter([[bad, 3.0, 1.0], [1.0, 1.5, 9.0]])
        monkeypatch.setattr(s, "row_losses", lambda *given: next(losses))  # noqa: B023
        assert (
            clipped_sum(s, [[row] for row in rows(HELD[:3])], lambda: None)
            == 1.5 - EVALUATION_BOUND
        )


@pytest.mark.parametrize("unit", ["example", "id"])
def test_units_that_another_data_set_knows_add_zero(tiny_model: Path, unit: Any) -> None:
    """Trained on by this run, in its open step, or by another run under another unit."""
    known = registry()
    other = private_session(tiny_model, known=known, dataset_id="old", dp={"unit": "example"})
    other.forward_backward(rows(HELD[:1]))
    other.optim_step()
    s = evaluating(tiny_model, known=known, dataset_id="own", dp={"unit": unit})
    s.forward_backward(rows(HELD[1:2], example_ids=IDS[1:2]))
    s.optim_step()
    perturb(s, 0.1)
    s.forward_backward(rows(HELD[3:4], example_ids=IDS[3:4]))  # its step is open
    held = held_out(s, unit=unit)
    result = s.private_eval(rows(HELD, example_ids=IDS), held, FINE)
    # Of the ids, a, b and c hold a known row.
    counting = [row for row in range(8) if row not in (0, 1, 3) and (unit != "id" or row > 4)]
    alone = s.private_eval(
        rows([HELD[row] for row in counting], example_ids=[IDS[row] for row in counting]),
        held, FINE, result.num_units,
    )  # fmt: skip
    assert result.num_units == (8 if unit == "example" else 4)
    assert result.value == alone.value != 0
    assert result.warnings == (
        f"{8 - len(counting)} of 8 rows added nothing to the mean: {8 - len(counting)} known under"
        " another dataset",
    )
    assert alone.warnings == ()
    names = {IDS[row] for row in counting} if unit == "id" else counting
    assert len(charged(s, HELD, unit)) == len(names)


def test_hidden_metrics_hide_which_rows_counted(tiny_model: Path) -> None:
    s = evaluating(tiny_model, dp={"show_private_metrics": False})
    s.forward_backward(rows(HELD[:2]))
    assert s.private_eval(rows(HELD), held_out(s), FINE).warnings == ()


def charged(s: PrivateSession, ids: Any, unit: str = "example") -> set[bytes]:
    """Returns those units of these rows that the held-out dataset knows."""
    ledgers = s.budget.registry.ledgers
    _, key = ledgers.unit_keys("default")["held"]
    names = IDS if unit == "id" else None
    units = unit_ids(key, rows(ids, example_ids=names), unit)
    return ledgers.known_units("default", {"held": units})["held"]


# --- the charge --------------------------------------------------------------------------------


class Watching(PrivateSession):
    """A session that records what the held-out ledger holds whenever noise is drawn."""

    def __init__(self, *arguments: Any) -> None:
        self.seen: list[tuple[int, int]] = []
        self._noise = self.watched  # type: ignore[method-assign]
        super().__init__(*arguments)

    def watched(self, count: int) -> torch.Tensor:
        self.seen.append((count, evaluations(self)))
        return torch.ones(count, dtype=torch.float64)


def evaluations(s: PrivateSession) -> int:
    return [entry["type"] for entry in entries(s)].count("evaluation")


def test_the_charge_is_durable_before_the_one_draw_of_noise(tiny_model: Path) -> None:
    s = evaluating(tiny_model, Watching)
    held = held_out(s)
    for made in (1, 2):
        s.private_eval(rows(HELD), held, 0.5)
        assert s.seen == [(1, one) for one in range(1, made + 1)]


def test_an_evaluation_that_is_not_charged_draws_no_noise(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = evaluating(tiny_model, Watching)
    held = held_out(s, epsilon=0.5)
    with pytest.raises(DPBudgetExceededError, match="cannot pay for any of these units"):
        s.private_eval(rows(HELD), held, 0.1)
    # Another client takes the budget between the two questions.
    monkeypatch.setattr(held, "admitted", lambda units, sigma: units)
    with pytest.raises(DPBudgetExceededError):
        s.private_eval(rows(HELD), held, 0.1)
    assert s.seen == []
    assert evaluations(s) == 0
    assert s.lineage.ledgers == {}


def test_the_noise_has_the_std_of_the_charge(tiny_model: Path) -> None:
    """The noise is 1 in one session and 0 in the other; then it is drawn many times."""
    ones, none = evaluating(tiny_model, Watching), evaluating(tiny_model)
    std = 0.25
    values = [s.private_eval(rows(HELD), held_out(s), std).value for s in (ones, none)]
    assert values[0] - values[1] == pytest.approx(std, abs=2 * std * evaluation._GRID)
    generator = torch.Generator().manual_seed(7)
    drawn = [
        released(5.0, receipt(multiplier(std, 20)), 20, seeded(generator)) for _ in range(4000)
    ]
    mean, spread = torch.tensor(drawn).mean(), torch.tensor(drawn).std()
    assert abs(float(mean) - 5.0 / 20) < 5 * std / 4000**0.5
    assert float(spread) == pytest.approx(std, rel=5 / (2 * 4000) ** 0.5)


def receipt(sigma: float) -> Charge:
    return Charge("c", "held", "h", 1, sigma, True, 0.1, 0.1, 1e-5, 1)


def seeded(generator: torch.Generator) -> Noise:
    return lambda count: torch.randn(count, generator=generator, dtype=torch.float64)


def test_a_released_value_lies_on_a_coarse_grid(tiny_model: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for std in (0.1, 0.3, 1e-4):
        for total in (0.0, 1 / 3, -7.77):
            value = released(total, receipt(multiplier(std, 7)), 7, seeded(generator))
            steps = value / 2.0 ** math.floor(math.log2(evaluation._GRID * std))
            assert steps == int(steps)


def test_a_charge_pays_for_one_draw_of_an_evaluation() -> None:
    charge = receipt(1.0)
    none: Noise = lambda count: torch.zeros(count, dtype=torch.float64)  # noqa: E731
    released(1.0, charge, 4, none)
    with pytest.raises(ServiceError, match="pays for one draw"):
        released(1.0, charge, 4, none)


def test_the_cost_is_that_of_the_gaussian_mechanism_for_each_unit(tiny_model: Path) -> None:
    s = evaluating(tiny_model)
    held, std = held_out(s, epsilon=8.0), 0.3
    first = s.private_eval(rows(HELD[:4]), held, std, 8)
    other = s.private_eval(rows(HELD[4:]), held, std, 8)
    again = s.private_eval(rows(HELD), held, std)
    mu = 2 / (std * 8)
    assert (first.epsilon_before, first.epsilon_after) == (0, pytest.approx(epsilon(mu)))
    assert other.epsilon_after == pytest.approx(epsilon(mu))  # other units: no unit has two uses
    assert again.epsilon_before == pytest.approx(epsilon(mu))
    assert again.epsilon_after == pytest.approx(epsilon(mu * 2**0.5))
    assert (again.std, again.num_units, again.delta) == (std, 8, 1e-5)


def epsilon(mu: float) -> float:
    return gaussian_epsilon(mu, 1e-5)


def test_units_at_their_limit_add_zero_and_are_not_charged(tiny_model: Path) -> None:
    s = evaluating(tiny_model)
    std = 0.3
    held = held_out(s, epsilon=1.01 * epsilon(2 / (std * 8)))  # one evaluation of a unit
    s.private_eval(rows(HELD[:4]), held, std, 8)
    result = s.private_eval(rows(HELD), held, std)
    fresh = evaluating(tiny_model)
    alone = fresh.private_eval(rows(HELD[4:]), held_out(fresh), std, 8)
    assert result.value == alone.value
    assert result.warnings == ("4 of 8 rows added nothing to the mean: 4 use limit reached",)
    assert result.epsilon_after == pytest.approx(epsilon(2 / (std * 8)))
    before = entries(s)
    with pytest.raises(DPBudgetExceededError, match="cannot pay for any of these units"):
        s.private_eval(rows(HELD), held, std)
    assert entries(s) == before


def test_an_empty_set_is_noise_alone_and_costs_nothing(tiny_model: Path) -> None:
    s = evaluating(tiny_model, Watching)
    result = s.private_eval([], held_out(s), 0.5, 8)
    assert result.value == pytest.approx(0.5, abs=1e-3)
    assert result.epsilon_after == 0
    with pytest.raises(InvalidRequestError, match="outside"):
        s.private_eval([], HeldOut.opened(s.budget, "held"), 0.5)


# --- what may be evaluated ---------------------------------------------------------------------


def test_only_another_registered_data_set_of_the_tenant_is_evaluated(tiny_model: Path) -> None:
    s = evaluating(tiny_model)
    s.budget.registry.ledgers.register("somebody", "theirs", 8.0, 1e-5, "example")
    with pytest.raises(NotFoundError, match="register the held-out rows"):
        HeldOut.opened(s.budget, "theirs")
    with pytest.raises(NotFoundError):
        HeldOut.opened(s.budget, "nowhere")
    with pytest.raises(InvalidRequestError, match="this run trains on"):
        HeldOut.opened(s.budget, "default")


def test_a_unit_that_was_chosen_since_the_last_call_counts(tiny_model: Path) -> None:
    s = evaluating(tiny_model)
    config = private_config(tiny_model, dataset_id="held")
    new_budget(s.budget.registry, config)
    held = HeldOut.opened(s.budget, "held")
    assert held.unit == "example"
    chosen = private_config(tiny_model, dataset_id="held", dp={"unit": "id"})
    new_budget(s.budget.registry, chosen)
    with pytest.raises(InvalidRequestError, match="pass example_ids"):
        s.private_eval(rows(ROWS[:2]), held, 2.0)
    s.private_eval(rows(ROWS[:2], example_ids=["a", "a"]), held, 2.0)
    assert [entry["type"] for entry in entries(s)][-2:] == ["open", "evaluation"]
    assert s.budget.registry.ledgers.counted_units("default", "held") == 1


def test_a_run_that_trains_all_weights_has_no_base_to_compare_with(tiny_model: Path) -> None:
    s = evaluating(tiny_model, lora_config=None)
    held = held_out(s)
    with pytest.raises(InvalidRequestError, match="so the weights of its base model are gone"):
        s.private_eval(rows(HELD), held, 0.1)
    assert evaluations(s) == 0


def test_rows_without_ids_are_refused_where_ids_were_trained_on(tiny_model: Path) -> None:
    s = evaluating(tiny_model, dp={"unit": "id"})
    held = held_out(s)
    with pytest.raises(InvalidRequestError, match="pass example_ids"):
        s.private_eval(rows(HELD), held, 0.1)
    assert evaluations(s) == 0
    s.private_eval(rows(HELD, example_ids=IDS), held, 0.1)


# --- what stays as it is -----------------------------------------------------------------------


def test_rows_with_ids_are_refused_where_nobody_chose_the_held_out_unit(tiny_model: Path) -> None:
    known = registry()
    private_session(tiny_model, known=known, dataset_id="held")  # registers it, and states no unit
    s = evaluating(tiny_model, known=known)
    place = HeldOut.opened(s.budget, "held")
    with pytest.raises(InvalidRequestError, match="nobody has said whether an id is the unit"):
        s.private_eval(rows(HELD, example_ids=IDS), place, FINE)
    assert [entry["type"] for entry in entries(s)] == ["register", "open"]
    assert s.private_eval(rows(HELD), place, 0.5).num_units == len(HELD)


def test_an_evaluation_changes_neither_weights_nor_the_open_step(tiny_model: Path) -> None:
    s = evaluating(tiny_model, lora_config=LoRAConfig(rank=4, bias="all"))
    s.forward_backward(rows())
    before, pending = weights(s), sums(s)
    s.private_eval(rows(HELD), held_out(s), 0.1)
    assert_equal(weights(s), before)
    assert_equal(sums(s), pending)
    assert s.optim_step().step == 1


def test_weights_are_put_back_if_the_base_model_fails(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = evaluating(tiny_model)
    before, real = weights(s), s._losses
    monkeypatch.setattr(s, "_losses", lambda stream: real(stream) if intact() else 1 / 0)

    def intact() -> bool:
        return all(torch.equal(now, before[name]) for name, now in weights(s).items())

    with pytest.raises(ZeroDivisionError):
        s.private_eval(rows(HELD), held_out(s), 0.1)
    assert intact()
    assert evaluations(s) == 0


def test_what_was_evaluated_is_in_the_lineage_and_linked(tiny_model: Path) -> None:
    s = evaluating(tiny_model)
    s.private_eval(rows(HELD), held_out(s), 0.5)
    (entry,) = [entry for entry in entries(s) if entry["type"] == "evaluation"]
    assert s.lineage.ledgers["held"] == f"{entry['seq']}-{entry['hash']}"
    assert s.lineage.guarantee == "base"
    report = PrivacyReport(entries(s, "default"))
    assert report.certificate()["linked_datasets"] == ["held"]


def test_rows_that_were_evaluated_are_known_to_their_data_set(tiny_model: Path) -> None:
    s = evaluating(tiny_model)
    s.private_eval(rows(HELD), held_out(s), 0.5)
    (told,) = s.forward_backward(rows([*HELD[:2], *ROWS[:1]])).warnings
    assert told.startswith("2 of these 3 rows were charged under held")


# --- the operation and the client --------------------------------------------------------------


def test_a_repeated_request_is_answered_and_charged_once(
    service: Service, tiny_model: Path
) -> None:
    config = private_config(tiny_model, dataset_id="own")
    place = Place(
        TENANT, service.run, service.epoch, str(service.root), service.home, service.capability
    )
    worker = Worker(place, config, service.registry, lambda _: None)
    ledgers = service.registry.ledgers
    ledgers.register(TENANT, "held", 8.0, 1e-5, "example")
    arguments = {"examples": rows(HELD), "dataset_id": "held", "std": 0.5, "num_units": None}
    request = Request("r-0", "private_eval", service.epoch, "r", 0, arguments)
    journal = CallJournal(service.epoch)
    first, again = (journal.run(request, worker.run).unwrap() for _ in range(2))
    assert isinstance(first, PrivateEvalResult)
    assert first is again
    assert [entry["type"] for entry in ledgers.entries(TENANT, "held")].count("evaluation") == 1
    later = Request("r-1", "private_eval", service.epoch, "r", 1, arguments)
    assert journal.run(later, worker.run).unwrap().value != first.value
    worker._held_outs["held"].heads.keep(30)
    assert worker.heads is not None
    stored = worker._held_outs["held"].heads._stored
    assert stored == len(ledgers.entries(TENANT, "held")) - 1


@pytest.mark.parametrize(
    ("changes", "arguments", "match"),
    [
        ({"dp_config": None}, {}, "is not private"),
        ({"lora_config": None}, {}, "trains all weights"),
        ({"dataset_id": "held"}, {}, "trains on dataset 'held'"),
        ({}, {"std": 0.0}, "std must be"),
        ({}, {"std": math.inf}, "std must be"),
        ({}, {"std": math.nan}, "std must be"),
        ({}, {"num_units": 0}, "num_units must be"),
        ({}, {"num_units": 2.5}, "num_units must be"),
        ({}, {"batch": {"input_ids": []}}, "the batch is empty"),
    ],
)
def test_a_wrong_call_is_refused_before_it_is_sent(
    changes: dict[str, Any], arguments: dict[str, Any], match: str
) -> None:
    config = private_config(Path("m")).model_copy(update=changes)
    client = FakeTrainingClient(FakeService(), "run", config)
    given = {"batch": {"input_ids": HELD}, "dataset_id": "held"} | arguments
    with pytest.raises(InvalidRequestError, match=match):
        client.private_eval(**given)
    assert client.sent == []
