"""Starts the runs of one tenant, finds them, brings them back, and ends them.

Makes the `TrainingClient` of each, and what its calls need to reach an actor again. What an actor
occupies is for `placement`, starting it for `cluster`; what is known of a run is in the registry.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tg_tinker.client.actor_link import TrainingLink
from tg_tinker.client.calls import OrderedCalls
from tg_tinker.client.placement import Placement, with_absolute_path
from tg_tinker.client.records import Records
from tg_tinker.client.recovery import Reached, Recover, check_recover, lost_actor
from tg_tinker.client.training import TrainingClient, take_over
from tg_tinker.cluster.cluster import Cluster, SamplerLink
from tg_tinker.cluster.messages import Request
from tg_tinker.cluster.named_actors import living_actors
from tg_tinker.cluster.ray_calls import kill
from tg_tinker.config import TrainingConfig
from tg_tinker.data.peft_files import PeftFiles
from tg_tinker.errors import (
    ActorLostError,
    FutureTimeoutError,
    InvalidRequestError,
    StorageError,
    TGTinkerError,
)
from tg_tinker.records.files import KeptHead
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import dataset_of
from tg_tinker.types import PARKED, ArtifactInfo, ModelInfo, TrainingClientInfo

Progress = Callable[[str], None]

NO_ACTOR = "no actor on this cluster: get_training_client brings it back"
"""Why a run that nobody ended is listed as failed."""

_WAIT_FOR_ANOTHER_S = 180.0
"""How long a client waits for another one that brings the same run back."""

_log = logging.getLogger("tg_tinker")


class Runs:
    """See `ServiceClient` for what each method promises."""

    def __init__(
        self,
        registry: Any,
        store: str,
        tenant: str,
        home: Path,
        cluster: Cluster,
        records: Records,
        placement: Placement,
    ) -> None:
        self._registry, self._store, self._tenant = registry, store, tenant
        self._home, self._cluster = home, cluster
        self._records, self._placement = records, placement

    def create(
        self, config: TrainingConfig, progress: Progress | None, recover: Recover
    ) -> TrainingClient:
        check_recover(recover)
        kept = self._met(config)
        if config.private:
            self.release_reservations_of_the_dead(dataset_of(config))
        elif config.dataset_id and self._registry.ledgers.entries(self._tenant, config.dataset_id):
            raise InvalidRequestError(
                f"data set {config.dataset_id!r} has a privacy ledger: a run without dp_config may"
                " not train on it. Add a DPConfig, or leave out dataset_id if this is other data"
            )
        config = with_absolute_path(config)
        run_id = self._registry.runs.create(self._tenant, config.model_dump_json())
        epoch = self._registry.runs.claim(run_id)
        try:
            reached = self._open(run_id, epoch, config, progress, kept)
            client = self._client(run_id, config, reached, recover)
        except BaseException:
            self._registry.runs.finish(run_id, epoch, "failed")
            raise
        if client.privacy is not None:
            _log.warning("%s", client.privacy.message)
        return client

    def get(
        self, training_client_id: str, progress: Progress | None, recover: Recover
    ) -> TrainingClient:
        check_recover(recover)
        info, stored = self._registry.runs.get(self._tenant, training_client_id)
        config = TrainingConfig.model_validate_json(stored)
        try:
            reached = self._reach(training_client_id, config, progress)
        except BaseException:
            with contextlib.suppress(TGTinkerError):  # or it would take the place of what failed
                self._warn_of_loss(info)
            raise
        self._warn_of_loss(info)
        return self._client(training_client_id, config, reached, recover)

    def all(self) -> list[TrainingClientInfo]:
        living = living_actors(self._cluster.namespace)
        runs: list[TrainingClientInfo] = self._registry.runs.of(self._tenant)
        return [_as_it_is(run, living) for run in runs]

    def describe(self, training_client_id: str) -> TrainingClientInfo:
        info, _ = self._registry.runs.get(self._tenant, training_client_id)
        return _as_it_is(info, living_actors(self._cluster.namespace))

    def park(self, training_client_id: str) -> None:
        info, _, link = self._found(training_client_id)
        if info.reason == PARKED:
            return
        if link is None:
            reason = info.reason or NO_ACTOR
            raise ActorLostError(f"{training_client_id} has no actor to park: {reason}")
        name = secrets.token_hex(8)
        request = Request(f"{name}-0", "park", info.epoch, name, 0)
        link.open(link.send(request), request.request_id).unwrap()
        link.park()

    def close(self, training_client_id: str) -> None:
        info, _, link = self._found(training_client_id)
        if info.reason and info.reason != PARKED:
            return  # it was ended before
        self._finish(training_client_id, info.epoch, link)

    def import_adapter(
        self, path: Path, model_ref: str, dtype: str, progress: Progress | None
    ) -> ArtifactInfo:
        files = PeftFiles.read(path)
        config = TrainingConfig(model_ref=model_ref, dtype=dtype, lora_config=files.lora)
        with self.create(config, progress, recover="manual") as client:
            artifact_id = take_over(client, files)
        imported: ArtifactInfo = self._registry.catalogue.get(self._tenant, artifact_id)
        return imported

    # --- inside ------------------------------------------------------------------------------

    def _met(self, config: TrainingConfig) -> KeptHead | None:
        """What this home knows of a private run's ledger, after it was held against all heads."""
        return self._records.meet_ledger(dataset_of(config)) if config.private else None

    def _warn_of_loss(self, before: TrainingClientInfo) -> None:
        """Says what was lost since a run was described. Also where its model then did not load: the
        next try finds the run at the step that it comes back in, and nothing lost."""
        now, _ = self._registry.runs.get(self._tenant, before.training_client_id)
        if now.epoch != before.epoch and before.step > now.step:
            warnings.warn(
                f"steps lost after the last artifact: {before.step - now.step}; the run goes on"
                f" from step {now.step}",
                stacklevel=4,
            )

    def _found(
        self, training_client_id: str
    ) -> tuple[TrainingClientInfo, str, TrainingLink | None]:
        """A run, its configuration, and its actor if it has one."""
        info, stored = self._registry.runs.get(self._tenant, training_client_id)
        actor = self._cluster.find_training(training_client_id, info.epoch)
        if actor is None:
            return info, stored, None
        return info, stored, self._link(actor, training_client_id, info.epoch, None)

    def _reach(
        self, run_id: str, config: TrainingConfig, progress: Progress | None = None
    ) -> Reached:
        """The living actor of a run; where there is none, a new one in its last saved state."""
        kept = self._met(config)
        deadline = time.monotonic() + _WAIT_FOR_ANOTHER_S
        while time.monotonic() < deadline:
            epoch = self._registry.runs.get(self._tenant, run_id)[0].epoch
            actor = self._cluster.find_training(run_id, epoch)
            if actor is None:
                reached = self._bring_back(run_id, epoch, config, progress, kept)
            else:
                link = self._link(actor, run_id, epoch, kept)
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
        self._registry.runs.resume_point(
            self._tenant, run_id
        )  # there is one, before anything changes
        epoch = 0
        try:
            epoch = self._registry.runs.claim(run_id, last)
            resume, _ = self._registry.runs.resume_point(
                self._tenant, run_id
            )  # nobody saves any more
            self._cluster.kill_training(run_id, last)  # it may only be silent
            reached = self._open(run_id, epoch, config, progress, kept, resume)
        except ActorLostError:
            if self._registry.runs.get(self._tenant, run_id)[0].epoch == epoch:
                raise
            return None
        for warning in reached.model.warnings:
            warnings.warn(warning, stacklevel=5)
        return reached

    def _open(
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
        link = self._link(actor, run_id, epoch, kept)
        try:
            model: ModelInfo = link.load(tell)
        except BaseException:
            kill(actor)
            raise
        return Reached(epoch, link, model)

    def _others(self, run_id: str) -> set[str]:
        """Runs of this tenant beside one."""
        return {run.training_client_id for run in self._registry.runs.of(self._tenant)} - {run_id}

    def _link(self, actor: Any, run_id: str, epoch: int, kept: KeptHead | None) -> TrainingLink:
        return TrainingLink(actor, self._registry.key, partial(self._lost, run_id, epoch), kept)

    def _lost(self, run_id: str, epoch: int, known: ActorLostError, seen: int) -> ActorLostError:
        """What the loss of an epoch's actor means; see `lost_actor`."""
        info, _ = self._registry.runs.get(self._tenant, run_id)
        try:
            _, step = self._registry.runs.resume_point(self._tenant, run_id)
        except ActorLostError as error:
            return error
        reason = info.reason or known.details.get("reason", "it was replaced")
        return lost_actor(info, epoch, seen, step, reason)

    def _client(
        self, run_id: str, config: TrainingConfig, reached: Reached, recover: Recover
    ) -> TrainingClient:
        def describe() -> TrainingClientInfo:
            info: TrainingClientInfo = self._registry.runs.get(self._tenant, run_id)[0]
            return info

        calls = OrderedCalls(
            run_id,
            reached,
            recover,
            describe=describe,
            reach=partial(self._reach, run_id, config),
            finish=partial(self._finish, run_id),
            park_after_minutes=config.resources.park_after_minutes,
        )
        return TrainingClient(
            run_id,
            config,
            calls,
            describe=describe,
            describe_privacy=lambda: self._registry.ledgers.privacy_info(
                self._tenant, dataset_of(config), run_id
            ),
            find_sampler=partial(self._sampler, config),
        )

    def _finish(self, run_id: str, epoch: int, link: TrainingLink | None) -> None:
        if not self._cluster.connected:
            return  # the actor ended with its cluster, or outlives this connection to it
        if link is not None:
            with contextlib.suppress(ActorLostError, FutureTimeoutError):
                if not link.settle():
                    raise StorageError(
                        f"the registry could not be told of the last steps, so {run_id} stays open:"
                        " the notes of them would end with its actor. See that its database takes"
                        " changes, then close it again"
                    )
                known = link.info()
                self._registry.runs.record(run_id, epoch, known.step, known.status)
        self._registry.runs.finish(run_id, epoch, "completed")
        self._cluster.kill_training(run_id, epoch)  # by name: it may only be silent

    def release_reservations_of_the_dead(self, dataset: str) -> None:
        """A script that was killed could not give back what it had planned. Whether a run of
        another embedded cluster lives cannot be seen from here, so that one stays."""
        entries = self._registry.ledgers.entries(self._tenant, dataset)
        accounts = Ledger.replay(entries).accounts
        reserving = [run for run, account in accounts.items() if account.reserved]
        for run_id in filter(self._cluster.would_see, reserving):
            info, _ = self._registry.runs.get(self._tenant, run_id)
            dead = self._cluster.find_training(run_id, info.epoch) is None
            if dead and info.reason != PARKED:
                self._registry.ledgers.release(self._tenant, dataset, run_id)

    def _sampler(self, config: TrainingConfig) -> SamplerLink:
        return self._cluster.sampler(self._registry.key, **self._placement.of_sampler(config))


def _as_it_is(run: TrainingClientInfo, living: set[str]) -> TrainingClientInfo:
    """The registry's word on a run, and that its actor is gone where nobody has told it."""
    if run.reason or f"{run.training_client_id}@{run.epoch}" in living:
        return run
    return replace(run, status="failed" if run.status == "active" else run.status, reason=NO_ACTOR)
