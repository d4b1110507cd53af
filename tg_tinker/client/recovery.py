"""Reaches the actor of a run, and replaces a lost actor by a new one under the next epoch.

The new actor continues from the artifact that its run saved or loaded last. This module also builds
the error that tells a training loop which steps to repeat. `runs` starts and ends runs.
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
"""A function that receives messages about the start of a client: what it is waiting for."""

_WAIT_FOR_ANOTHER_S = 180.0
"""The maximum wait for another client that recovers the same run, in seconds."""

_log = logging.getLogger("tg_tinker")

Recover = Literal["auto", "manual"]
"""Whether the next call after an `ActorLostError` recovers the run (auto) or `recover()` does."""


@dataclass(frozen=True)
class Reached:
    """The living actor of a run, with the connection of one client to it."""

    epoch: int
    link: TrainingLink
    model: ModelInfo


Reach = Callable[[], Reached]


def check_recover(recover: str) -> None:
    """Raises InvalidRequestError unless `recover` is a value of `Recover`."""
    if recover not in get_args(Recover):
        raise InvalidRequestError(f"recover={recover!r:.80} is unknown: use 'auto' or 'manual'")


class Recovery:
    """The access to the actors of one tenant's runs, with recovery of lost actors."""

    def __init__(
        self, registry: RemoteRegistry, store: str, tenant: str, home: Path, cluster: Cluster,
        records: Records, placement: Placement,
    ) -> None:  # fmt: skip
        self._registry, self._store, self._tenant = registry, store, tenant
        self._home, self._cluster = home, cluster
        self._records, self._placement = records, placement

    def warn_of_loss(self, before: TrainingClientInfo) -> None:
        """Warns about the steps that a run has lost since it was described.

        A failed recovery warns too: the next attempt finds the run at its restored step and no
        longer sees the loss.
        """
        now, _ = self._registry.runs.get(self._tenant, before.training_client_id)
        if now.epoch != before.epoch and before.step > now.step:
            warnings.warn(
                f"steps lost after the last artifact: {before.step - now.step}; the run continues"
                f" from step {now.step}",
                stacklevel=4,
            )

    def met(self, config: TrainingConfig) -> KeptHead | None:
        """Compares a private run's ledger with all its known heads.

        Returns the head that this home keeps; None for a run without privacy.
        """
        return self._records.meet_ledger(dataset_of(config)) if config.private else None

    def reach(
        self, run_id: str, config: TrainingConfig, progress: Progress | None = None
    ) -> Reached:
        """Returns the living actor of a run, or starts a new actor in the last saved state.

        Raises:
            ActorLostError: the run cannot be recovered, or its model is still loading after
                `_WAIT_FOR_ANOTHER_S`.
            LedgerMismatchError: the ledger of a private run is behind a known head, or has forked.
        """
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
            time.sleep(0.3)  # another client creates or recovers the run
        raise ActorLostError(f"{run_id} is still loading its model: try again in a moment")

    def _bring_back(
        self,
        run_id: str,
        last: int,
        config: TrainingConfig,
        progress: Progress | None,
        kept: KeptHead | None,
    ) -> Reached | None:
        """Starts a new actor in the epoch after `last`, the last known epoch.

        Returns None if another client was faster.

        Raises:
            ActorLostError: the run cannot be recovered.
        """
        # Before anything changes: raises if the run cannot be recovered.
        self._registry.runs.resume_point(self._tenant, run_id)
        epoch = 0
        try:
            epoch = self._registry.runs.claim(run_id, last)
            # Asked again: after the claim no earlier actor can save.
            resume, _ = self._registry.runs.resume_point(self._tenant, run_id)
            # The last actor may be alive and only silent.
            self._cluster.kill_training(run_id, last)
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
        """Starts an actor in a newly claimed epoch, and loads the model.

        Args:
            resume: the id of the artifact to load; None starts from the base model.
        """
        tell = progress or partial(_log.info, "%s: %s", run_id)
        tell("waiting for room on the cluster")
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
        """Returns the ids of the other runs of this tenant."""
        return {run.training_client_id for run in self._registry.runs.of(self._tenant)} - {run_id}

    def _lost(self, run_id: str, epoch: int, known: ActorLostError, seen: int) -> ActorLostError:
        """Builds the error for the loss of an epoch's actor; see `lost_actor`."""
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
    """Returns the common error of all calls that were lost with the actor of an epoch.

    Args:
        run: the registry's current description of the run; another client may already have
            recovered the run.
        epoch: the epoch of the lost actor.
        seen: the last step that the client has seen.
        resume_step: the step of the state that the run resumes from.
        reason: why the actor is gone.
    """
    if run.epoch != epoch and not run.reason:  # the run already continues elsewhere
        resume_step = run.step
    lost = max(0, max(run.step, seen) - resume_step)
    steps = f"steps lost after it: {lost}" if lost else "no step is lost"
    return ActorLostError(
        f"the actor of {run.training_client_id} is gone ({reason}), and its unanswered calls are"
        f" lost. The run resumes at step {resume_step}; {steps}."
        f" Repeat from step {resume_step + 1}: the next call recovers the run; with"
        ' recover="manual", call tc.recover() or service.get_training_client(id)',
        details={
            "resume_step": resume_step, "lost_steps": lost, "epoch": epoch, "reason": reason,
        },
    )  # fmt: skip
