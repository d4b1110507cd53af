"""`TrainingClient`: the training loop's side of one run. Created by `ServiceClient`."""

from __future__ import annotations

import html
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Self, TypeVar

from tg_tinker.client.actor_link import TrainingLink
from tg_tinker.client.future import FutureHandle
from tg_tinker.client.recovery import Reach, Reached, Recover
from tg_tinker.cluster.cluster import SamplerLink
from tg_tinker.cluster.messages import Request, SampleRequest, SnapshotRef
from tg_tinker.config import TrainingConfig
from tg_tinker.data.batch import BatchData, check_bounds, from_examples, normalise, require_ids
from tg_tinker.data.hashing import resolve_batch_hash
from tg_tinker.data.peft_files import PeftFiles
from tg_tinker.data.text import load_tokenizer
from tg_tinker.errors import (
    ActorLostError,
    ClusterUnavailableError,
    DPBudgetExceededError,
    InvalidRequestError,
    QueueFullError,
)
from tg_tinker.records.report import PrivacyInfo
from tg_tinker.sampling import NOT_SAMPLED, SamplingParams, as_stops, check_prompts
from tg_tinker.types import (
    PARKED,
    ForwardBackwardResult,
    LoadStateResult,
    ModelInfo,
    OptimStepResult,
    SampleResult,
    SaveStateResult,
    StreamChunk,
    TrainingClientInfo,
)

_Sent = TypeVar("_Sent")

MAX_QUEUED = 1000
"""Calls of one client that may wait on its actor."""


class TrainingClient:
    """Training, sampling and checkpoints of one run, which one Ray actor executes in order.

    Calls that return a `FutureHandle` may be queued ahead without waiting. Use it as a context
    manager, or `close()` it: the actor holds its resources until then.
    """

    def __init__(
        self,
        run_id: str,
        config: TrainingConfig,
        reached: Reached,
        recover: Recover,
        describe: Callable[[], TrainingClientInfo],
        describe_privacy: Callable[[], PrivacyInfo],
        find_sampler: Callable[[], SamplerLink],
        reach: Reach,
        finish: Callable[[int, TrainingLink], None],
    ) -> None:
        self._id = run_id
        self._config = config
        self._recover = recover
        self._describe = describe
        self._describe_privacy = describe_privacy
        self._find_sampler = find_sampler
        self._reach = reach
        self._finish = finish
        self._training = True
        self._closed = False
        self._saves: list[FutureHandle[SaveStateResult]] = []
        self._lock = threading.Lock()
        self._recovering = threading.RLock()
        self._reached = reached
        self._used = time.monotonic()
        self._renumber()

    # --- properties --------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Unique identifier of this training client."""
        return self._id

    @property
    def step(self) -> int:
        """Optimizer steps completed; does not wait behind queued calls."""
        return self.info().step if self._closed else self._asked(lambda link: link.info().step)

    @property
    def config(self) -> TrainingConfig:
        """The training configuration."""
        return self._config

    @property
    def status(self) -> str:
        """`active`; `completed` at `max_steps` or when closed; `failed` when its actor is gone."""
        return self.info().status

    @cached_property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer, with its chat template."""
        return load_tokenizer(self._asked(lambda link: link.tokenizer_files()))

    def info(self) -> TrainingClientInfo:
        """What registry and actor know of this run. Where its actor is gone, `reason` says how.

        To ask brings no run back.
        """
        known = self._describe()
        values = {**vars(known), "num_trainable": self._model.num_trainable}
        if not self._closed:
            try:
                actor = self._link.info()
                queued = self._link.waiting()
                values |= {"step": actor.step, "status": actor.status, "queued": queued}
            except (ActorLostError, ClusterUnavailableError) as error:
                # Another client of this run may have closed it: then it ended well.
                gone = known.status == "active" and not known.reason
                values |= {"status": "failed"} if gone else {}
                reason = (self._link.lost or error).details.get("reason", error.code)
                values |= {} if known.reason else {"reason": reason}
        return TrainingClientInfo(**values)

    # --- training ----------------------------------------------------------------------------

    def forward_backward(
        self,
        batch: BatchData | Mapping[str, Any],
        batch_hash: str | None = None,
    ) -> FutureHandle[ForwardBackwardResult]:
        """Loss of a batch and, in train mode, its gradient added to the current step.

        Gradients add up until `optim_step`; how a step's rows are split into calls changes
        nothing but rounding. In a private run each unit's gradient is clipped first; a row that
        cannot count (too long, used up, repeated in the step) adds nothing and is reported in
        `warnings`, and an empty batch is allowed.

        Args:
            batch: see `BatchData`; a dict with the same keys works everywhere.
            batch_hash: your own name for the batch, echoed back; one that starts with
                ``sha256:`` is checked.

        Raises:
            InvalidRequestError: the batch is malformed or does not fit the model; it was not sent.
        """
        counted = self._config.private and self._training
        examples = normalise(batch, may_be_empty=counted)
        if counted and self._config.dp_config and self._config.dp_config.unit == "id":
            require_ids(examples)
        if not counted:  # a defect of a private row makes it add zero: an error would tell of it
            check_bounds(examples, self._model.vocab_size, self._model.context_length)
        if batch_hash is not None:
            resolve_batch_hash(examples, batch_hash)
        return self._submit(
            "forward_backward", examples=examples, batch_hash=batch_hash, train=self._training
        )

    def optim_step(self, apply_dp_noise: bool = True) -> FutureHandle[OptimStepResult]:
        """One optimizer step on the mean gradient since the last one.

        In a private run: checks the budget, charges it durably, adds noise, then steps.

        Args:
            apply_dp_noise: False is refused in a private run, unless its data set was registered
                without a limit; then epsilon is infinite from this step on.

        The result raises `DPBudgetExceededError` when the budget cannot pay; nothing has changed.
        """
        return self._submit("optim_step", apply_dp_noise=apply_dp_noise)

    def train(self) -> None:
        """Later `forward_backward` calls of this handle compute gradients, with dropout."""
        self._training = True

    def eval(self) -> None:
        """Later `forward_backward` calls of this handle only compute the loss.

        Pending gradients stay as they are.
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
        """Completions by the weights after every step queued before this call.

        They are drawn beside training, by the sampling application of the base model, which the
        first call starts. A step that failed since the last call raises its error here, once.
        See `SamplingParams` for the parameters and their ranges.
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
        """Like `sample` for one prompt, chunk by chunk; leaving the loop stops the generation.

        Args:
            kwargs: the other parameters of `sample`.
        """
        if not isinstance(prompts, str):
            raise InvalidRequestError("sample_stream takes one prompt, a string")
        stops = as_stops(kwargs.pop("stop_sequences", None))
        try:
            params = SamplingParams(max_tokens, temperature, stop_sequences=stops, **kwargs)
        except TypeError:
            known = ", ".join(SamplingParams.__dataclass_fields__)
            raise InvalidRequestError(
                f"sample_stream got unknown parameters among {sorted(kwargs)}; known: {known}"
            ) from None
        return self._chunks(self._snapshot(), prompts, params)

    # --- checkpoints -------------------------------------------------------------------------

    def save_state(
        self, include_optimizer: bool = True, metadata: dict[str, Any] | None = None
    ) -> SaveStateResult:
        """Saves the state after the last `optim_step`, sealed; returns when it is durable.

        Args:
            include_optimizer: needed to resume exactly.
            metadata: anything JSON can hold; stored encrypted.
        """
        return self.save_state_async(include_optimizer, metadata).result()

    def save_state_async(
        self, include_optimizer: bool = True, metadata: dict[str, Any] | None = None
    ) -> FutureHandle[SaveStateResult]:
        """Like `save_state`, without waiting: training is held up while the state is copied.

        `close` waits for it.
        """
        try:
            copy = json.loads(json.dumps(metadata or {}, allow_nan=True))
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"metadata must be what JSON can hold ({type(error).__name__}): strings, numbers,"
                " lists, dicts with string keys"
            ) from None
        save: FutureHandle[SaveStateResult] = self._submit(
            "save_state", include_optimizer=include_optimizer, metadata=copy
        )
        self._saves = [*(other for other in self._saves if not other.done()), save]
        return save

    def load_state(self, artifact_id: str) -> LoadStateResult:
        """Restores an artifact; pending gradients are dropped.

        Raises:
            NotFoundError: no such artifact.
            ArtifactMismatchError: of another model, rank or layer set; nothing was changed.
            IntegrityError: stored bytes are not what was saved; nothing was changed.
        """
        result: LoadStateResult = self._submit("load_state", artifact_id=artifact_id).result()
        return result

    def _import(self, files: PeftFiles) -> str:
        """Takes over an adapter from elsewhere and saves it; the artifact's id."""
        self._submit("load_adapter", config=files.config, weights=files.weights).result()
        return self.save_state(include_optimizer=False).artifact_id

    # --- privacy -----------------------------------------------------------------------------

    @property
    def privacy(self) -> PrivacyInfo | None:
        """Contract, uses or steps left, and epsilon; None in a run without privacy."""
        return self._describe_privacy() if self._config.private else None

    def poisson_batches(self, dataset: BatchData | Mapping[str, Any]) -> Iterator[BatchData]:
        """Batches that the server draws: each unit is in each step with the same chance.

        The rows go to the actor once, which keeps their keyed hashes. Each batch is one whole
        step; some are empty. Ends when no step is left.

            for batch in tc.poisson_batches(dataset):
                tc.forward_backward(batch)
                tc.optim_step()

        Args:
            dataset: all rows, as a batch; `DPConfig.dataset_size` distinct units.

        Raises:
            InvalidRequestError: the run's contract is another, or the size differs.
        """
        examples = normalise(dataset)
        reached: Reached | None = None
        while True:
            self._revive()
            if reached is not self._reached:  # an actor that brings a run back knows no units
                reached = self._reached
                units: list[list[int]] = self._submit("register_units", examples=examples).result()
            try:
                drawn: list[int] = self._submit("draw_units").result()
            except DPBudgetExceededError:
                return
            yield from_examples([examples[row] for unit in drawn for row in units[unit]])

    # --- life --------------------------------------------------------------------------------

    def recover(self) -> None:
        """Reaches the run's actor again; where it is gone, brings the run back.

        From what it saved or loaded last, under a new epoch; a run without an artifact begins
        again, with the same first weights. An actor that has not answered for half a minute counts
        as gone. Nothing happens while the actor of this client answers.

        Raises:
            ActorLostError: it cannot come back.
            PlacementError: no room on the cluster.
        """
        self._refuse_closed()
        with self._recovering:
            lost = self._link.expect_loss()
            reached = self._reach()
            if reached.epoch != self._epoch or self._link.told:
                self._attach(reached, lost)

    def park(self) -> None:
        """Saves the run after the calls queued before, and frees its actor's memory, CPUs and GPUs.

        The next call of any client object, or `get_training_client`, brings it back under a new
        epoch, at the same step, to the bit where it is not private.

        Raises:
            InvalidRequestError: gradients wait for their `optim_step`; nothing was changed.
            StorageError: it could not be saved; nothing was changed.
        """
        with self._recovering:
            if not self._link.parked:
                self._submit("park").result()
                self._link.park()

    def close(self) -> None:
        """Ends the run and frees its resources; saved artifacts stay. Safe to repeat.

        Raises:
            StorageError: the registry takes no notes of the last steps; the run stays open.
        """
        if not self._closed:
            for save in self._saves:
                save.exception()  # waits; what it is, its handle tells
            self._finish(self._epoch, self._link)
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TrainingClient {self._id} of {self._config.model_ref}>"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
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

    def _attach(self, reached: Reached, lost: ActorLostError) -> None:
        """From now on calls go to this actor; the last one has nothing to say any more."""
        with self._lock:
            self._link.abandon(lost)
            self._reached = reached
            self._renumber()

    def _renumber(self) -> None:
        self._handle, self._sequence = secrets.token_hex(8), 0

    @property
    def _link(self) -> TrainingLink:
        return self._reached.link

    @property
    def _epoch(self) -> int:
        return self._reached.epoch

    @property
    def _model(self) -> ModelInfo:
        return self._reached.model

    def _revive(self) -> None:
        """Before a call: once its caller knows what was lost, the run comes back."""
        with self._recovering:
            self._notice_parking()
            lost = self._link.lost if self._link.told else None
            if lost is None or self._closed:
                return
            if self._recover == "manual" and not self._link.parked:
                raise lost
            self.recover()

    def _notice_parking(self) -> None:
        """An actor that parks itself tells nobody: after half of its patience it is asked for."""
        patience, now = self._config.resources.park_after_minutes, time.monotonic()
        paused = patience is not None and now - self._used > 30 * patience
        self._used = now
        if paused and not self._closed and self._describe().reason == PARKED:
            self._link.park()

    def _asked(self, question: Callable[[TrainingLink], _Sent]) -> _Sent:
        """Asks the actor something that changes nothing."""
        self._revive()
        link = self._link
        try:
            return question(link)
        except ActorLostError as error:
            raise link.loss(error) from None

    def _snapshot(self) -> FutureHandle[SnapshotRef]:
        """Asks for the weights after every call queued before this one."""
        if not self._model.flat_stream:
            raise InvalidRequestError(NOT_SAMPLED)
        return self._submit("snapshot")

    def _chunks(
        self, taken: FutureHandle[SnapshotRef], prompt: str, params: SamplingParams
    ) -> Iterator[StreamChunk]:
        weights = taken.result()
        yield from self._sampler.stream(SampleRequest(weights, [prompt], params))

    @cached_property
    def _sampler(self) -> SamplerLink:
        return self._find_sampler()

    def _submit(self, operation: str, **arguments: Any) -> FutureHandle[Any]:
        """Sends one call; the lock makes the order of calls the order of their numbers."""
        self._revive()
        with self._lock:
            link = self._link
            if link.unanswered >= MAX_QUEUED and link.waiting() >= MAX_QUEUED:
                raise QueueFullError(
                    f"{MAX_QUEUED} calls are waiting on this client: take the results of earlier"
                    " ones first"
                )
            ref, request = self._send(link.send, operation, arguments)
        return FutureHandle(link, ref, request.request_id, self._id, operation)

    def _send(
        self, send: Callable[[Request], _Sent], operation: str, arguments: dict[str, Any]
    ) -> tuple[_Sent, Request]:
        """Numbers and sends one call. Call it with the lock held."""
        request = self._next_request(operation, **arguments)
        try:
            return send(request), request
        except BaseException:
            # Whether it went out is unknown: later calls start a numbering of their own, since
            # the actor would wait for ever for a number that never arrives.
            self._renumber()
            raise

    def _next_request(self, operation: str, **arguments: Any) -> Request:
        self._refuse_closed()
        number, self._sequence = self._sequence, self._sequence + 1
        return Request(
            request_id=f"{self._handle}-{number}",
            operation=operation,
            epoch=self._epoch,
            handle=self._handle,
            sequence=number,
            arguments=arguments,
            ledger=self._link.ledger_place,
        )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise InvalidRequestError(
                f"client {self._id} is closed: service.get_training_client(id) opens the run again"
            )
