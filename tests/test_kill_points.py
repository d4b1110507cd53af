"""kill -9 of a real training actor at named points: charges cover draws, draws cover steps.

The points are put into the actor's process by the test, through Ray's own door for debugging; the
program has no switch for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from privacy_helpers import ROWS
from processes import SOAK

from tg_tinker import (
    ActorLostError,
    DPConfig,
    LoRAConfig,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:a step has")]

ROUNDS = 20 if SOAK else 1
POINTS = {
    "after the charge": ("step", 1, 0),
    "in the middle of a save": ("save", 0, 0),
    "before the charge": ("step", 0, 0),
    "after the noise": ("step", 1, 1),
    "before the reply": ("step", 1, 1),
    "before a save is entered": ("save", 0, 0),
}
"""Point -> the call it is in, and how many charges and draws that call had made by then."""

SHORT = ("after the charge", "in the middle of a save")


def doom(log: str, point: str) -> Callable[[Any], None]:
    """What the actor is made to run: it notes each draw of noise durably, and dies at the point."""

    def install(actor: Any) -> None:
        import signal

        def dying(function: Any, *, after: bool = False) -> Any:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                result = function(*arguments, **named) if after else None
                os.kill(os.getpid(), signal.SIGKILL)
                return result

            return wrapped

        worker = actor._worker
        session, noise = worker.session, worker.session._noise

        def noted(count: int) -> Any:
            with open(log, "a") as file:  # noqa: PTH123
                file.write("draw\n")
                file.flush()
                os.fsync(file.fileno())
            return noise(count)

        session._noise = noted
        if point == "before the charge":
            session._charged = dying(session._charged)
        elif point == "after the charge":
            session._charged = dying(session._charged, after=True)
        elif point == "after the noise":
            session._move = dying(session._move)
        elif point == "before the reply":
            worker.optim_step = dying(worker.optim_step, after=True)
        elif point == "in the middle of a save":
            actor.__class__.sealed_file = dying(actor.__class__.sealed_file)
            worker._write = dying(worker._write)
        elif point == "before a save is entered":
            worker._write = dying(worker._write, after=True)

    return install


@pytest.fixture(scope="module")
def tc(home: Path, tiny_model: Path) -> Iterator[TrainingClient]:
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


def charges(tc: TrainingClient) -> int:
    entries = tc.service.privacy_report().entries  # type: ignore[attr-defined]
    return Ledger.replay(entries).accounts[tc.id].count


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("point", POINTS)
def test_whatever_is_killed_the_ledger_and_the_artifacts_tell_the_truth(
    tc: TrainingClient, tmp_path: Path, point: str
) -> None:
    import ray

    if point not in SHORT and not SOAK:
        pytest.skip("make soak")
    call, charged, drawn = POINTS[point]
    for number in range(ROUNDS):
        log = tmp_path / f"draws-{number}"
        ray.get(tc._link.actor.__ray_call__.remote(doom(str(log), "")))
        step(tc).result()
        kept = tc.save_state()
        before, artifacts = charges(tc), saved(tc)
        ray.get(tc._link.actor.__ray_call__.remote(doom(str(log), point)))
        dying = step(tc) if call == "step" else tc.save_state_async()
        with pytest.raises(ActorLostError) as caught:
            dying.result(timeout=60)
        assert caught.value.details["resume_step"] == tc.service.get_artifact(kept.artifact_id).step  # type: ignore[attr-defined]
        draws = len(log.read_text().splitlines()) - 1
        assert (charges(tc) - before, min(draws, 1)) == (charged, drawn)
        assert saved(tc) == artifacts
        assert step(tc).result().step == caught.value.details["resume_step"] + 1
        assert charges(tc) == before + charged + 1  # the step that is repeated is charged again


def saved(tc: TrainingClient) -> list[str]:
    found = tc.service.list_artifacts(run=tc.id)  # type: ignore[attr-defined]
    return [info.artifact_id for info in found]
