"""Starts, finds and ends the runs of one tenant, and creates their `TrainingClient` objects.

`recovery` reaches and replaces the actors, `placement` determines their resources, and the registry
stores the state of each run.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

from tg_tinker.client.actor_link import TrainingLink
from tg_tinker.client.calls import OrderedCalls
from tg_tinker.client.placement import Placement, with_absolute_path
from tg_tinker.client.recovery import Progress, Reached, Recover, Recovery, check_recover
from tg_tinker.client.training import TrainingClient, take_over
from tg_tinker.cluster.cluster import Cluster, SamplerLink
from tg_tinker.cluster.messages import Request
from tg_tinker.cluster.named_actors import living_actors
from tg_tinker.cluster.remote_registry import RemoteRegistry
from tg_tinker.config import TrainingConfig
from tg_tinker.data.peft_files import PeftFiles
from tg_tinker.errors import (
    ActorLostError,
    FutureTimeoutError,
    InvalidRequestError,
    StorageError,
    TGTinkerError,
)
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import dataset_of
from tg_tinker.texts import check_path
from tg_tinker.types import PARKED, ArtifactInfo, TrainingClientInfo

_log = logging.getLogger("tg_tinker")

NO_ACTOR = "no actor on this cluster: get_training_client recovers it"
"""The `reason` of a run that is listed as failed although it was not ended."""


class Runs:
    """The part of `ServiceClient` about runs; `ServiceClient` documents each method."""

    def __init__(
        self,
        registry: RemoteRegistry,
        tenant: str,
        cluster: Cluster,
        placement: Placement,
        recovery: Recovery,
    ) -> None:
        self._registry, self._tenant, self._cluster = registry, tenant, cluster
        self._placement, self._recovery = placement, recovery

    def create(
        self, config: TrainingConfig, progress: Progress | None, recover: Recover
    ) -> TrainingClient:
        check_recover(recover)
        kept = self._recovery.met(config)
        if config.private:
            self.release_reservations_of_the_dead(dataset_of(config))
        elif config.dataset_id and self._registry.ledgers.entries(self._tenant, config.dataset_id):
            raise InvalidRequestError(
                f"dataset {config.dataset_id!r} has a privacy ledger: a run without dp_config may"
                " not train on it. Add a DPConfig, or leave out dataset_id if this is other data"
            )
        config = with_absolute_path(config)
        run_id = self._registry.runs.create(self._tenant, config.model_dump_json())
        epoch = self._registry.runs.claim(run_id)
        try:
            reached = self._recovery.open(run_id, epoch, config, progress, kept)
            client = self._client(run_id, config, reached, recover)
        except BaseException:
            self._registry.runs.finish(run_id, epoch, "failed")
            raise
        if client.privacy is not None:
            _log.warning("%s", client.privacy.message)
        for warning in reached.model.warnings:
            warnings.warn(warning, stacklevel=3)
        return client

    def get(
        self, training_client_id: str, progress: Progress | None, recover: Recover
    ) -> TrainingClient:
        check_recover(recover)
        info, stored = self._registry.runs.get(self._tenant, training_client_id)
        config = TrainingConfig.model_validate_json(stored)
        try:
            reached = self._recovery.reach(training_client_id, config, progress)
        except BaseException:
            # An error of the warning must not replace the original error.
            with contextlib.suppress(TGTinkerError):
                self._recovery.warn_of_loss(info)
            raise
        self._recovery.warn_of_loss(info)
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
            return  # the run has already ended
        self._finish(training_client_id, info.epoch, link)

    def import_adapter(
        self, path: Path, model_ref: str, dtype: str, progress: Progress | None
    ) -> ArtifactInfo:
        files = PeftFiles.read(check_path(path))
        config = TrainingConfig(model_ref=model_ref, dtype=dtype, lora_config=files.lora)
        with self.create(config, progress, recover="manual") as client:
            artifact_id = take_over(client, files)
        imported: ArtifactInfo = self._registry.catalogue.get(self._tenant, artifact_id)
        return imported

    # --- inside ------------------------------------------------------------------------------

    def _found(
        self, training_client_id: str
    ) -> tuple[TrainingClientInfo, str, TrainingLink | None]:
        """Returns a run, its configuration as JSON, and the link to its actor, or None."""
        info, stored = self._registry.runs.get(self._tenant, training_client_id)
        actor = self._cluster.find_training(training_client_id, info.epoch)
        if actor is None:
            return info, stored, None
        return info, stored, self._recovery.link(actor, training_client_id, info.epoch, None)

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
            reach=partial(self._recovery.reach, run_id, config),
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
            return  # the actor ended with its cluster, or it outlives this connection
        if link is not None:
            with contextlib.suppress(ActorLostError, FutureTimeoutError):
                if not link.settle():
                    raise StorageError(
                        f"the registry could not record the last steps, so {run_id} stays open:"
                        " its actor has the only record of them. Check that the registry's database"
                        " accepts changes, then close the run again"
                    )
                known = link.info()
                self._registry.runs.record(run_id, epoch, known.step, known.status)
        self._registry.runs.finish(run_id, epoch, "completed")
        # By name: the actor may be alive and only silent.
        self._cluster.kill_training(run_id, epoch)

    def release_reservations_of_the_dead(self, dataset: str) -> None:
        """Releases the reserved budget of runs without an actor, which a killed script leaves.

        This process cannot see whether a run of another embedded cluster is alive, so that run
        keeps its reservation.
        """
        entries = self._registry.ledgers.entries(self._tenant, dataset)
        accounts = Ledger.replay(entries).accounts
        reserving = [run for run, account in accounts.items() if account.reserved]
        for run_id in filter(self._cluster.would_see, reserving):
            info, _ = self._registry.runs.get(self._tenant, run_id)
            if self._cluster.find_training(run_id, info.epoch) is None:
                self._registry.ledgers.release(self._tenant, dataset, run_id)

    def _sampler(self, config: TrainingConfig) -> SamplerLink:
        return self._cluster.sampler(self._registry.key, **self._placement.of_sampler(config))


def _as_it_is(run: TrainingClientInfo, living: set[str]) -> TrainingClientInfo:
    """Returns the run as it is listed: without its actor, an active run counts as failed.

    Args:
        living: the names of all living actors.
    """
    if run.reason or f"{run.training_client_id}@{run.epoch}" in living:
        return run
    return replace(run, status="failed" if run.status == "active" else run.status, reason=NO_ACTOR)
