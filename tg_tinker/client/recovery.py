"""What a lost actor means to the loop that used it: from which step to repeat, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from tg_tinker.errors import ActorLostError, InvalidRequestError
from tg_tinker.types import ModelInfo, TrainingClientInfo

if TYPE_CHECKING:
    from tg_tinker.client.actor_link import TrainingLink

Recover = Literal["auto", "manual"]
"""Whether the next call after an `ActorLostError` brings the run back, or `recover()` does."""


@dataclass(frozen=True)
class Reached:
    """A run's living actor, as one client has reached it."""

    epoch: int
    link: TrainingLink
    model: ModelInfo


Reach = Callable[[], Reached]


def check_recover(recover: str) -> None:
    """Raises InvalidRequestError unless it is a value of `Recover`."""
    if recover not in get_args(Recover):
        raise InvalidRequestError(f"recover={recover!r:.80}: use 'auto' or 'manual'")


def lost_actor(
    run: TrainingClientInfo, epoch: int, seen: int, resume_step: int, reason: str
) -> ActorLostError:
    """The one error of all calls that were lost with the actor of an epoch.

    Args:
        run: as the registry knows it now; somebody else may have brought it back already.
        seen: the last step that the client heard of.
        resume_step: of the state that the run comes back in.
    """
    if run.epoch != epoch and not run.reason:  # it goes on elsewhere
        resume_step = run.step
    lost = max(0, max(run.step, seen) - resume_step)
    steps = f"steps lost after it: {lost}" if lost else "no step is lost"
    return ActorLostError(
        f"the actor of {run.training_client_id} is gone ({reason}), and calls that it had not"
        f" answered with it. The run comes back at step {resume_step}; {steps}."
        f" Repeat from step {resume_step + 1}: the next call brings it back; where"
        ' recover="manual", tc.recover() or service.get_training_client(id) does',
        details={
            "resume_step": resume_step, "lost_steps": lost, "epoch": epoch, "reason": reason,
        },
    )  # fmt: skip
