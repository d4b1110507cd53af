"""Tests kill -9 of a real training actor at named points: charges cover draws, and draws cover
steps.

The test puts the points into the actor's process through Ray's own door for debugging. The program
has no switch for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.privacy_helpers import ROWS
from support.processes import SOAK
from tg_tinker import (
    ActorLostError,
    DPConfig,
    LoRAConfig,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.records.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:a step has")]

ROUNDS = 8 if SOAK else 1


class Point(NamedTuple):
    """The point at which the actor dies, and what must be known of the call then.

    Attributes:
        owner, method: the method that is called at that moment, see `doom`.
        after: whether the actor dies when the method has returned, not before it begins.
        charged, drawn, saved: how many charges, draws of noise and artifacts the call has made.
    """

    call: str
    owner: str
    method: str
    after: bool = False
    charged: int = 0
    drawn: int = 0
    saved: int = 0


POINTS = {
    "a step has arrived": Point("step", "calls", "run"),
    "before the charge": Point("step", "session", "_charged"),
    "after the charge": Point("step", "session", "_charged", True, 1),
    "after the noise": Point("step", "session", "_move", False, 1, 1),
    "weights are half moved": Point("step", "optimizer", "step", False, 1, 1),
    "weights are moved": Point("step", "session", "_move", True, 1, 1),
    "before the step is noted": Point("step", "worker", "optim_step", True, 1, 1),
    "the step is noted": Point("step", "actor", "_record", True, 1, 1),
    "the reply is stored": Point("step", "calls", "run", True, 1, 1),
    "a save is copied": Point("save", "saver", "begin", True),
    "in the middle of a save": Point("save", "draft", "parts"),
    "all files are written": Point("save", "draft", "manifest"),
    "before a save is entered": Point("save", "saver", "_write", True),
    "a save is entered": Point("save", "artifact index", "publish", True, saved=1),
    "the log's head is kept": Point("save", "artifacts", "keep_newest", True, saved=1),
    "an artifact is read": Point("load", "loading", "fetch", True),
    "half of it is restored": Point("load", "session_optimizer", "load"),
    "it is restored": Point("load", "worker", "_take_over", True),
    "the load is noted": Point("load", "artifact index", "note_loaded", True),
    "before a run is parked": Point("park", "runs", "park", saved=1),
    "a run is parked": Point("park", "runs", "park", True, saved=1),
}

SHORT = ("after the charge", "in the middle of a save")


def doom(log: str, owner: str = "", method: str = "", after: bool = False) -> Callable[[Any], None]:
    """Returns code that the actor runs: it notes each draw of noise durably, and dies at the
    point."""

    def install(actor: Any) -> None:
        import signal

        import actors.artifacts.publish
        import actors.training.worker

        worker, session = actor._worker, actor._worker.session
        noise, optimizer = session._noise, session._optimizer._torch

        def noted(count: int) -> Any:
            with open(log, "a") as file:  # noqa: PTH123
                file.write("draw\n")
                file.flush()
                os.fsync(file.fileno())
            return noise(count)

        def dying(function: Any) -> Any:
            def wrapped(*arguments: Any, **named: Any) -> None:
                if after:
                    function(*arguments, **named)
                if owner == "optimizer":
                    optimizer.param_groups[0]["params"][0].data.add_(1)
                actor._notes.settle(30)  # what it has noted is known
                os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        session._noise = noted
        owners = {
            "actor": actor, "calls": actor._calls, "worker": worker, "saver": worker.saver,
            "session": session,
            "optimizer": optimizer, "session_optimizer": session._optimizer,
            "runs": worker._registry.runs, "artifact index": worker._registry.artifacts,
            "draft": actors.artifacts.publish.Draft,
            "artifacts": actors.artifacts.publish, "loading": actors.training.worker,
        }  # fmt: skip
        if owner:
            setattr(owners[owner], method, dying(getattr(owners[owner], method)))

    return install


@pytest.fixture(scope="module")
def tc(embedded: None, tiny_model: Path) -> Iterator[TrainingClient]:
    dp = DPConfig(sampling="worst_case", noise_multiplier=2.0, target_epsilon=None)
    config = TrainingConfig(
        model_ref=str(tiny_model), lora_config=LoRAConfig(rank=2), batch_size=2, dp_config=dp
    )
    with ServiceClient(address="local") as service, service.create_training_client(config) as tc:
        tc.service = service  # type: ignore[attr-defined]
        yield tc


def step(tc: TrainingClient) -> Any:
    tc.forward_backward({"input_ids": ROWS[:2]})
    return tc.optim_step()


def loss(tc: TrainingClient) -> float:
    """Returns the loss of a fixed batch, which represents the weights."""
    tc.eval()
    found = tc.forward_backward({"input_ids": ROWS[2:4]}).result().loss
    tc.train()
    return found


def charges(tc: TrainingClient) -> int:
    entries = tc.service.privacy_report().entries  # type: ignore[attr-defined]
    return Ledger.replay(entries).accounts[tc.id].count


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", POINTS)
def test_whatever_is_killed_the_ledger_and_the_artifacts_tell_the_truth(
    tc: TrainingClient, tmp_path: Path, name: str
) -> None:
    if name not in SHORT and not SOAK:
        pytest.skip("make soak")
    point = POINTS[name]
    for number in range(ROUNDS):
        log = tmp_path / f"draws-{number}"
        install(tc, doom(str(log)))
        step(tc).result()
        kept = tc.save_state()
        at, before, artifacts, weights = tc.step, charges(tc), saved(tc), loss(tc)
        if point.call == "step":
            tc.forward_backward({"input_ids": ROWS[:2]}).result()
        install(tc, doom(str(log), point.owner, point.method, point.after))
        with pytest.raises(ActorLostError) as caught:
            call(tc, point.call, kept.artifact_id)
        assert caught.value.details["resume_step"] == at
        draws = len(log.read_text().splitlines()) - 1
        assert (charges(tc) - before, min(draws, 1)) == (point.charged, point.drawn)
        assert len(saved(tc) - artifacts) == point.saved
        assert artifacts <= saved(tc)
        assert loss(tc) == weights  # to the bit: nothing that was half done is in them
        assert step(tc).result().step == at + 1
        assert charges(tc) == before + point.charged + 1  # a step that is repeated is charged again
    assert not any(dict(tc.service.verify_artifacts()).values())  # type: ignore[attr-defined]


def install(tc: TrainingClient, doomed: Callable[[Any], None]) -> None:
    import ray

    ray.get(tc._calls.link.actor.__ray_call__.remote(doomed))


def call(tc: TrainingClient, name: str, artifact_id: str) -> None:
    if name == "step":
        tc.optim_step().result(timeout=60)
    elif name == "save":
        tc.save_state_async().result(timeout=60)
    elif name == "load":
        tc.load_state(artifact_id)
    else:
        tc.park()


def saved(tc: TrainingClient) -> set[str]:
    found = tc.service.list_artifacts(run=tc.id)  # type: ignore[attr-defined]
    return {info.artifact_id for info in found}
