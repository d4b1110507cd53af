"""`TrainingClient`: all that a training loop may ask of one run, and what it checks before sending.

`calls` sends each call in its turn and brings a lost run back; `ServiceClient` makes the clients.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Self

from tg_tinker.client.calls import OrderedCalls
from tg_tinker.client.future import FutureHandle
from tg_tinker.client.recovery import Reached
from tg_tinker.cluster.cluster import SamplerLink
from tg_tinker.cluster.messages import SampleRequest, SnapshotRef
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
)
from tg_tinker.records.report import PrivacyInfo
from tg_tinker.sampling import NOT_SAMPLED, SamplingParams, as_stops, check_prompts
from tg_tinker.types import (
    ForwardBackwardResult,
    LoadStateResult,
    OptimStepResult,
    SampleResult,
    SaveStateResult,
    StreamChunk,
    TrainingClientInfo,
)


class TrainingClient:
    """Training, sampling and checkpoints of one run, which one Ray actor executes in order.

    Calls that return a `FutureHandle` may be queued ahead without waiting. Use it as a context
    manager, or `close()` it: the actor holds its resources until then.
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
        """Unique identifier of this training client."""
        return self._id

    @property
    def step(self) -> int:
        """Optimizer steps completed; does not wait behind queued calls."""
        closed = self._calls.closed
        return self.info().step if closed else self._calls.ask(lambda link: link.info().step)

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
        return load_tokenizer(self._calls.ask(lambda link: link.tokenizer_files()))

    def info(self) -> TrainingClientInfo:
        """What registry and actor know of this run. Where its actor is gone, `reason` says how.

        To ask brings no run back.
        """
        known = self._describe()
        values = {**vars(known), "num_trainable": self._calls.model.num_trainable}
        if not self._calls.closed:
            link = self._calls.link
            try:
                actor = link.info()
                queued = link.waiting()
                values |= {"step": actor.step, "status": actor.status, "queued": queued}
            except (ActorLostError, ClusterUnavailableError) as error:
                # Another client of this run may have closed it: then it ended well.
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
            model = self._calls.model
            check_bounds(examples, model.vocab_size, model.context_length)
        if batch_hash is not None:
            resolve_batch_hash(examples, batch_hash)
        return self._calls.submit(
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
        return self._calls.submit("optim_step", apply_dp_noise=apply_dp_noise)

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
        return self._calls.submit_save(include_optimizer=include_optimizer, metadata=copy)

    def load_state(self, artifact_id: str) -> LoadStateResult:
        """Restores an artifact; pending gradients are dropped.

        Raises:
            NotFoundError: no such artifact.
            ArtifactMismatchError: of another model, rank or layer set; nothing was changed.
            IntegrityError: stored bytes are not what was saved; nothing was changed.
        """
        result: LoadStateResult = self._calls.submit("load_state", artifact_id=artifact_id).result()
        return result

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
        examples, calls = normalise(dataset), self._calls
        reached: Reached | None = None
        while True:
            calls.revive()
            if reached is not calls.reached:  # an actor that brings a run back knows no units
                reached = calls.reached
                units: list[list[int]] = calls.submit("register_units", examples=examples).result()
            try:
                drawn: list[int] = calls.submit("draw_units").result()
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
        self._calls.recover()

    def park(self) -> None:
        """Saves the run after the calls queued before, and frees its actor's memory, CPUs and GPUs.

        The next call of any client object, or `get_training_client`, brings it back under a new
        epoch, at the same step, to the bit where it is not private.

        Raises:
            InvalidRequestError: gradients wait for their `optim_step`; nothing was changed.
            StorageError: it could not be saved; nothing was changed.
        """
        self._calls.park()

    def close(self) -> None:
        """Ends the run and frees its resources; saved artifacts stay. Safe to repeat.

        Raises:
            StorageError: the registry takes no notes of the last steps; the run stays open.
        """
        self._calls.close()

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

    def _snapshot(self) -> FutureHandle[SnapshotRef]:
        """Asks for the weights after every call queued before this one."""
        if not self._calls.model.flat_stream:
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
    """Loads an adapter from elsewhere into a new run and saves it; the artifact's id."""
    loading = client._calls.submit("load_adapter", config=files.config, weights=files.weights)
    loading.result()
    return client.save_state(include_optimizer=False).artifact_id
