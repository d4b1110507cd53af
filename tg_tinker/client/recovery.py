"""Where a lost actor comes back: a new one under the next epoch, from what its run saved last; and
what that means to the loop that used it.

`runs` starts runs and ends them; here is how the actor of one is reached at any time.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from tg_tinker.client.actor_link import TrainingLink
from tg_tinker.client.placement import Placement
from tg_tinker.client.records import Records
from tg_tinker.cluster.cluster import Cluster
from tg_tinker.cluster.ray_calls import kill
from tg_tinker.cluster.remote_registry import RemoteRegistry
from tg_tinker.config import TrainingConfig
from tg_tinker.errors import ActorLostError, InvalidRequestError
from tg_tinker.records.files import KeptHead
from tg_tinker.records.report import dataset_of
from tg_tinker.types import ModelInfo, TrainingClientInfo

Progress = Callable[[str], None]
"""Called with what a client that is being created waits for."""

_WAIT_FOR_ANOTHER_S = 180.0
"""How long a client waits for another one that brings the same run back."""

_log = logging.getLogger("tg_tinker")

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


class Recovery:
    """Reaches the actors of one tenant's runs: the living one, or a new one where it was lost."""

    def __init__(
        self, registry: RemoteRegistry, store: str, tenant: str, home: Path, cluster: Cluster,
        records: Records, placement: Placement,
    ) -> None:  # fmt: skip
        self._registry, self._store, self._tenant = registry, store, tenant
        self._home, self._cluster = home, cluster
        self._records, self._placement = records, placement

    def warn_of_loss(self, before: TrainingClientInfo) -> None:
        """Says what was lost since a run was described. Also where its model then did not load: the
        next try finds the run at the step that it comes back in, and nothing lost."""
        now, _ = self._registry.runs.get(self._tenant, before.training_client_id)
        if now.epoch != before.epoch and before.step > now.step:
            warnings.warn(
                f"steps lost after the last artifact: {before.step - now.step}; the run goes on"
                f" from step {now.step}",
                stacklevel=4,
            )

    def met(self, config: TrainingConfig) -> KeptHead | None:
        """What this home knows of a private run's ledger, after it was held against all heads."""
        return self._records.meet_ledger(dataset_of(config)) if config.private else None

    def reach(
        self, run_id: str, config: TrainingConfig, progress: Progress | None = None
    ) -> Reached:
        """The living actor of a run; where there is none, a new one in its last saved state."""
        kept = self.met(config)
        deadline = time.monotonic() + _WAIT_FOR_ANOTHER_S
        while time.monotonic() < deadline:
            epoch = self._registry.runs.get(self._tenant, run_id)[0].epoch
            actor = self._cluster.find_training(run_id, epoch)
            if actor is None:
                reached = self._bring_back(run_id, epoch, config, progress, kept)
            else:
                link = self.link(actor, run_id, epoch, kept)
                model = link.description()
                reached = None if model is None else Reached(epoch, link, model)
            if reached is not None:
                return reached
            time.sleep(0.3)  # somebody else creates it or brings it back
        raise ActorLostError(f"{run_id} is still loading its model: ask again in a moment")

    def _bring_back(
        self,
        run_id: str,
        last: int,
        config: TrainingConfig,
        progress: Progress | None,
        kept: KeptHead | None,
    ) -> Reached | None:
        """A new actor under the epoch after `last`; None where somebody else is quicker."""
        # There is one, before anything changes.
        self._registry.runs.resume_point(self._tenant, run_id)
        epoch = 0
        try:
            epoch = self._registry.runs.claim(run_id, last)
            # Nobody saves any more.
            resume, _ = self._registry.runs.resume_point(self._tenant, run_id)
            self._cluster.kill_training(run_id, last)  # it may only be silent
            reached = self.open(run_id, epoch, config, progress, kept, resume)
        except ActorLostError:
            if self._registry.runs.get(self._tenant, run_id)[0].epoch == epoch:
                raise
            return None
        for warning in reached.model.warnings:
            warnings.warn(warning, stacklevel=5)
        return reached

    def open(
        self,
        run_id: str,
        epoch: int,
        config: TrainingConfig,
        progress: Progress | None,
        kept: KeptHead | None,
        resume: str | None = None,
    ) -> Reached:
        """Starts an actor under an epoch just claimed; loads its model, and an artifact."""
        tell = progress or partial(_log.info, "%s: %s", run_id)
        tell("waiting for a place on the cluster")
        if epoch > 1:
            self._cluster.await_possible(config.resources)
        resources = self._placement.resources(config.resources)
        actor = self._cluster.start_training(
            resources=resources,
            others=partial(self._others, run_id),
            tenant=self._tenant,
            run_id=run_id,
            epoch=epoch,
            config=config.model_copy(update={"resources": resources}).model_dump_json(),
            store=self._store,
            home=str(self._home),
            registry=self._registry.actor,
            capability=self._registry.sealed(
                self._registry.data_keys.capability(self._tenant, run_id, epoch)
            ),
            resume=resume,
        )
        link = self.link(actor, run_id, epoch, kept)
        try:
            model: ModelInfo = link.load(tell)
        except BaseException:
            kill(actor)
            raise
        return Reached(epoch, link, model)

    def link(self, actor: Any, run_id: str, epoch: int, kept: KeptHead | None) -> TrainingLink:
        return TrainingLink(actor, self._registry.key, partial(self._lost, run_id, epoch), kept)

    def _others(self, run_id: str) -> set[str]:
        """Runs of this tenant beside one."""
        return {run.training_client_id for run in self._registry.runs.of(self._tenant)} - {run_id}

    def _lost(self, run_id: str, epoch: int, known: ActorLostError, seen: int) -> ActorLostError:
        """What the loss of an epoch's actor means; see `lost_actor`."""
        info, _ = self._registry.runs.get(self._tenant, run_id)
        try:
            _, step = self._registry.runs.resume_point(self._tenant, run_id)
        except ActorLostError as error:
            return error
        reason = info.reason or known.details.get("reason", "it was replaced")
        return lost_actor(info, epoch, seen, step, reason)


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
