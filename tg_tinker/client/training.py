"""Provides `TrainingClient`: the operations of a training loop on one run, checked before sending.

`calls` sends the calls in order and recovers a lost run; `ServiceClient` creates the clients.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Self, get_args

from tg_tinker.client.calls import OrderedCalls
from tg_tinker.client.future import FutureHandle
from tg_tinker.client.recovery import Reached
from tg_tinker.cluster.cluster import SamplerLink
from tg_tinker.cluster.messages import SampleRequest, SnapshotRef
from tg_tinker.config import AverageKind, TrainingConfig
from tg_tinker.data.batch import BatchData, check_bounds, from_examples, normalize, require_ids
from tg_tinker.data.hashing import resolve_batch_hash
from tg_tinker.data.peft_files import PeftFiles
from tg_tinker.data.text import load_tokenizer
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    DPBudgetExceededError,
    InvalidRequestError,
)
from tg_tinker.records.report import PrivacyInfo, dataset_of
from tg_tinker.sampling import NOT_SAMPLED, SamplingParams, as_stops, check_prompts
from tg_tinker.types import (
    ForwardBackwardResult,
    LoadStateResult,
    OptimStepResult,
    PrivateEvalResult,
    SampleResult,
    SaveStateResult,
    StreamChunk,
    TrainingClientInfo,
)


class TrainingClient:
    """A client for training, sampling and checkpoints of one run.

    One Ray actor executes the calls in order. Calls that return a `FutureHandle` may be queued
    without waiting for earlier results. Use the client as a context manager, or call `close()`:
    the actor holds its resources until then.
    """

    def __init__(
        self,
        run_id: str,
        config: TrainingConfig,
        calls: OrderedCalls,
        describe: Callable[[], TrainingClientInfo],
        describe_privacy: Callable[[], PrivacyInfo],
        find_sampler: Callable[[], SamplerLink],
    ) -> None:
        self._id = run_id
        self._config = config
        self._calls = calls
        self._describe = describe
        self._describe_privacy = describe_privacy
        self._find_sampler = find_sampler
        self._training = True

    # --- properties --------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The unique identifier of this training client."""
        return self._id

    @property
    def step(self) -> int:
        """The number of completed optimizer steps; reading it does not wait for queued calls."""
        closed = self._calls.closed
        return self.info().step if closed else self._calls.ask(lambda link: link.info().step)

    @property
    def config(self) -> TrainingConfig:
        """The training configuration."""
        return self._config

    @property
    def status(self) -> str:
        """The status of the run: `active`, `completed` or `failed`.

        A run is `completed` at `max_steps` or when it is closed, and `failed` when its actor is
        gone.
        """
        return self.info().status

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the model, with its chat template."""
        return load_tokenizer(self._calls.ask(lambda link: link.tokenizer_files()))

    def info(self) -> TrainingClientInfo:
        """Returns the description of this run by the registry and its actor.

        If the actor is gone, `reason` says why. This method never recovers a run.
        """
        known = self._describe()
        model = self._calls.model
        values = vars(known) | {
            "num_trainable": model.num_trainable,
            "unit_gradients": model.unit_gradients,
            "slow_because": model.slow_because,
        }
        if not self._calls.closed:
            link = self._calls.link
            try:
                actor = link.info()
                queued = link.waiting()
                values |= {"step": actor.step, "status": actor.status, "queued": queued}
            except (ActorLostError, ClusterUnavailableError) as error:
                # A run that another client closed or parked has not failed.
                gone = known.status == "active" and not known.reason
                values |= {"status": "failed"} if gone else {}
                reason = (link.lost or error).details.get("reason", error.code)
                values |= {} if known.reason else {"reason": reason}
        return TrainingClientInfo(**values)

    # --- training ----------------------------------------------------------------------------

    def forward_backward(
        self,
        batch: BatchData | Mapping[str, Any],
        batch_hash: str | None = None,
    ) -> FutureHandle[ForwardBackwardResult]:
        """Computes the loss of a batch and, in train mode, adds its gradient to the current step.

        Gradients add up until `optim_step`. The split of a step's rows into calls changes only
        rounding. In a private run each unit's gradient is clipped first, and an empty batch is
        allowed. A row of a private run that cannot count (too long, use limit reached, repeated in
        the step) adds nothing, and `warnings` reports it.

        Args:
            batch: the rows of the batch, see `BatchData`; a dict with the same keys works too.
            batch_hash: your own name for the batch, which the result returns. A name that starts
                with ``sha256:`` must equal the hash of the batch.

        Returns:
            The handle of the call. Its result raises `DPBudgetExceededError` if no step, or no use
            of any of these units, is left.

        Raises:
            InvalidRequestError: the batch is malformed or does not fit the model; it was not sent.
        """
        counted = self._config.private and self._training
        examples = normalize(batch, may_be_empty=counted)
        if counted and self._config.dp_config and self._config.dp_config.unit == "id":
            require_ids(examples)
        # In a private run a defective row adds zero, because an error would reveal the row.
        if not counted:
            model = self._calls.model
            check_bounds(examples, model.vocab_size, model.context_length)
        if batch_hash is not None:
            resolve_batch_hash(examples, batch_hash)
        return self._calls.submit(
            "forward_backward", examples=examples, batch_hash=batch_hash, train=self._training
        )

    def optim_step(self, apply_dp_noise: bool = True) -> FutureHandle[OptimStepResult]:
        """Runs one optimizer step on the mean gradient since the last step.

        A private run checks the budget, charges it durably, adds noise, and then steps.

        Args:
            apply_dp_noise: False is refused in a private run, unless its dataset is registered
                without a limit. Then epsilon is infinite from this step on.

        Returns:
            The handle of the call. Its result raises `DPBudgetExceededError` if the budget cannot
            pay for the step; then weights, optimizer, ledger and step are unchanged, and the
            gradients since the last step are dropped.
        """
        return self._calls.submit("optim_step", apply_dp_noise=apply_dp_noise)

    def train(self) -> None:
        """Makes later `forward_backward` calls of this client compute gradients, with dropout."""
        self._training = True

    def eval(self) -> None:
        """Makes later `forward_backward` calls of this client compute only the loss.

        Pending gradients stay unchanged.
        """
        self._training = False

    # --- sampling ----------------------------------------------------------------------------

    def sample(
        self,
        prompts: str | list[str],
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop_sequences: list[str] | None = None,
        num_completions: int = 1,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> SampleResult:
        """Generates completions with the weights after every step that was queued before this call.

        The sampling application of the base model generates the completions beside training; the
        first call starts it. See `SamplingParams` for the parameters and their ranges.

        Raises:
            InvalidRequestError: a parameter is out of range, a prompt is not text, or the
                architecture of the model cannot be sampled.
            WindowSpoiledError, NonFiniteError: the last `optim_step` failed with this error, which
                is raised here once.
        """
        params = SamplingParams(
            max_tokens, temperature, top_p, top_k, as_stops(stop_sequences), num_completions,
            repetition_penalty, presence_penalty, frequency_penalty,
        )  # fmt: skip
        listed = check_prompts(prompts)
        weights = self._snapshot().result()
        result: SampleResult = self._sampler.sample(SampleRequest(weights, listed, params))
        return result

    def sample_stream(
        self,
        prompts: str,
        max_tokens: int = 128,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Iterator[StreamChunk]:
        """Generates completions of one prompt like `sample`, and yields them chunk by chunk.

        Leaving the loop over the chunks stops the generation.

        Args:
            prompts: one prompt, as a string.
            max_tokens, temperature: as in `sample`.
            kwargs: the other parameters of `sample`, or of `SamplingParams`.

        Raises:
            InvalidRequestError: see `sample`.
        """
        if not isinstance(prompts, str):
            raise InvalidRequestError("sample_stream takes one prompt: pass a single string")
        stops = as_stops(kwargs.pop("stop_sequences", None))
        try:
            params = SamplingParams(max_tokens, temperature, stop_sequences=stops, **kwargs)
        except TypeError:
            known = ", ".join(SamplingParams.__dataclass_fields__)
            raise InvalidRequestError(
                f"sample_stream has an unknown parameter among {sorted(kwargs)}; known: {known}"
            ) from None
        return self._chunks(self._snapshot(), prompts, params)

    # --- checkpoints -------------------------------------------------------------------------

    def save_state(
        self,
        include_optimizer: bool = True,
        metadata: dict[str, Any] | None = None,
        *,
        average: AverageKind | None = None,
    ) -> SaveStateResult:
        """Saves the state after the last `optim_step`, encrypted; returns when it is durable.

        Pending gradients are not saved and stay unchanged.

        Args:
            include_optimizer: whether to save the optimizer state, which an exact resume needs.
            metadata: your own data, in any form that JSON supports; it is stored encrypted.
            average: saves an average of the weights that `OptimizerConfig` keeps, ``ema`` or
                ``tail``, instead of the weights of the last step. The artifact is for sampling and
                export; it holds no optimizer state, and `load_state` refuses it. It costs no
                epsilon.

        Raises:
            InvalidRequestError: JSON does not support `metadata`, or this run keeps no such
                average, or no step has entered it yet; nothing was saved.
        """
        return self.save_state_async(include_optimizer, metadata, average=average).result()

    def save_state_async(
        self,
        include_optimizer: bool = True,
        metadata: dict[str, Any] | None = None,
        *,
        average: AverageKind | None = None,
    ) -> FutureHandle[SaveStateResult]:
        """Saves like `save_state`, but returns at once.

        Training pauses only while the state is copied. `close` waits until the artifact is durable.

        Raises:
            InvalidRequestError: JSON does not support `metadata`, or `average` is unknown; nothing
                was saved.
        """
        if average not in (None, *get_args(AverageKind)):
            raise InvalidRequestError(
                f"average={average!r:.80} is unknown: use 'ema', 'tail' or None"
            )
        try:
            copy = json.loads(json.dumps(metadata or {}, allow_nan=True))
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"JSON cannot hold this metadata ({type(error).__name__}): use strings, numbers,"
                " lists, dicts with string keys"
            ) from None
        return self._calls.submit_save(
            include_optimizer=include_optimizer, metadata=copy, average=average
        )

    def load_state(self, artifact_id: str) -> LoadStateResult:
        """Restores the state of an artifact and drops pending gradients.

        Raises:
            NotFoundError: the artifact does not exist or has expired.
            ArtifactMismatchError: the artifact has another model, rank or layer set; nothing was
                changed.
            IntegrityError: the stored bytes differ from the saved bytes; nothing was changed.
            LineageError: a private run may not start from this artifact; nothing was changed.
            LedgerMismatchError: the ledgers are older than when the artifact was saved, or have
                forked; nothing was changed.
        """
        result: LoadStateResult = self._calls.submit("load_state", artifact_id=artifact_id).result()
        return result

    # --- privacy -----------------------------------------------------------------------------

    @property
    def privacy(self) -> PrivacyInfo | None:
        """The contract, the uses or steps left, and epsilon; None in a run without privacy."""
        return self._describe_privacy() if self._config.private else None

    def poisson_batches(self, dataset: BatchData | Mapping[str, Any]) -> Iterator[BatchData]:
        """Yields batches that the server draws: each unit is in each step with the same chance.

        The rows are sent to the actor once, and the actor keeps their keyed hashes. Each batch is
        one complete step; some batches are empty. The iteration ends when no step is left.

            for batch in tc.poisson_batches(dataset):
                tc.forward_backward(batch)
                tc.optim_step()

        Args:
            dataset: all rows as one batch, with `DPConfig.dataset_size` distinct units.

        Raises:
            InvalidRequestError: the run has another contract, or the number of units differs.
        """
        examples, calls = normalize(dataset), self._calls
        reached: Reached | None = None
        while True:
            calls.revive()
            # The new actor of a recovered run does not know the units.
            if reached is not calls.reached:
                reached = calls.reached
                units: list[list[int]] = calls.submit("register_units", examples=examples).result()
            try:
                drawn: list[int] = calls.submit("draw_units").result()
            except DPBudgetExceededError:
                return
            yield from_examples([examples[row] for unit in drawn for row in units[unit]])

    def private_eval(
        self,
        batch: BatchData | Mapping[str, Any],
        dataset_id: str,
        std: float = 0.1,
        num_units: int | None = None,
    ) -> FutureHandle[PrivateEvalResult]:
        """Releases the loss of held-out rows with noise, and charges their dataset for it.

        The value is the mean over the units of the loss minus that of the base model, in nats per
        token, each clipped to [-2, 2]. You may stop, or choose a checkpoint, by it: the weights
        then also carry the epsilon of the held-out dataset, and a chosen checkpoint carries the
        training epsilon of the whole run. One call costs each unit mu = 2 / (std x units).

        A unit that another dataset of the tenant knows, has reached its limit or has no row that
        the model can take adds zero.

        Args:
            batch: the held-out rows. They may be empty if `num_units` is given.
            dataset_id: their dataset, see `ServiceClient.register_dataset`; not that of the run.
            std: the standard deviation of the noise in the value, in nats per token, > 0.
            num_units: the public number to divide by; None counts the units of the batch.

        Returns:
            The handle of the call. Its result raises `DPBudgetExceededError` if the held-out
            dataset cannot pay; then nothing was charged or released.

        Raises:
            InvalidRequestError: the run is not private or trains all weights, or an argument is
                wrong; the call was not sent.
        """
        if not self._config.private:
            raise InvalidRequestError(
                "this run is not private, so it has no private evaluation: call tc.eval(), then"
                " tc.forward_backward(batch), which returns the loss without noise"
            )
        if self._config.lora_config is None:
            raise InvalidRequestError(
                "this run trains all weights, so the base model that losses are compared with is"
                " gone: private_eval needs an adapter (lora_config)"
            )
        if dataset_id == dataset_of(self._config):
            raise InvalidRequestError(
                f"this run trains on dataset {dataset_id!r}: register the held-out rows as a"
                " dataset of their own, with service.register_dataset"
            )
        if not (isinstance(std, int | float) and 0 < std < math.inf):
            raise InvalidRequestError(f"std must be a number above 0, got {std!r}")
        if num_units is not None and not (isinstance(num_units, int) and num_units >= 1):
            raise InvalidRequestError(f"num_units must be a whole number from 1, got {num_units!r}")
        return self._calls.submit(
            "private_eval",
            examples=normalize(batch, may_be_empty=num_units is not None),
            dataset_id=dataset_id,
            std=float(std),
            num_units=num_units,
        )

    # --- life --------------------------------------------------------------------------------

    def recover(self) -> None:
        """Reconnects to the run's actor, or recovers the run if its actor is gone.

        A recovered run continues from the artifact that it saved or loaded last, under a new epoch.
        A run without an artifact starts again with the same initial weights. An actor that has not
        answered for 30 seconds counts as gone. If the actor of this client answers, nothing
        changes.

        Raises:
            ActorLostError: the run cannot be recovered.
            PlacementError: the cluster has no room for the actor.
        """
        self._calls.recover()

    def park(self) -> None:
        """Saves the run after all queued calls, and frees the memory, CPUs and GPUs of its actor.

        The next call of any client object, or `get_training_client`, restores the run under a new
        epoch at the same step, with the same weights and optimizer. On a CPU a non-private run then
        reaches the same bits as without the pause.

        Raises:
            InvalidRequestError: pending gradients wait for an `optim_step`; nothing was changed.
            StorageError: the run could not be saved; nothing was changed.
        """
        self._calls.park()

    def close(self) -> None:
        """Ends the run and frees its resources. Artifacts stay, and a repeated call does nothing.

        Raises:
            StorageError: the registry could not record the last steps; the run stays open.
        """
        self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TrainingClient {self._id} of {self._config.model_ref}>"

    def _repr_html_(self) -> str:
        """Returns a small HTML table for notebooks."""
        info = self.info()
        rows = {
            "id": info.training_client_id, "model": info.model_ref, "status": info.status,
            "step": info.step, "trainable": f"{info.num_trainable:,}", "queued": info.queued,
            "last artifact": info.last_artifact_id or "none",
        }  # fmt: skip
        cells = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in rows.items()
        )
        return f"<table><caption>TrainingClient</caption>{cells}</table>"

    # --- inside ------------------------------------------------------------------------------

    def _snapshot(self) -> FutureHandle[SnapshotRef]:
        """Requests the weights after every call that was queued before this call.

        Raises:
            InvalidRequestError: the architecture of the model cannot be sampled.
        """
        if not self._calls.model.sampling:
            raise InvalidRequestError(NOT_SAMPLED)
        return self._calls.submit("snapshot")

    def _chunks(
        self, taken: FutureHandle[SnapshotRef], prompt: str, params: SamplingParams
    ) -> Iterator[StreamChunk]:
        weights = taken.result()
        yield from self._sampler.stream(SampleRequest(weights, [prompt], params))

    @cached_property
    def _sampler(self) -> SamplerLink:
        return self._find_sampler()


def take_over(client: TrainingClient, files: PeftFiles) -> str:
    """Loads an imported adapter into a new run and saves it; returns the id of the artifact."""
    loading = client._calls.submit("load_adapter", config=files.config, weights=files.weights)
    loading.result()
    return client.save_state(include_optimizer=False).artifact_id
