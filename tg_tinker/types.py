"""Defines the results of the public API: plain frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True)
class ForwardBackwardResult:
    """The result of one `forward_backward` call. It is for the data owner alone.

    Attributes:
        loss: the token-weighted mean over the labeled tokens of the batch, in nats; NaN in a
            private run that hides its metrics.
        batch_hash: `sha256:` over the normalized rows, or the caller's own string.
        gradient_hash: the hash of this call's gradient sum; empty in eval mode, and in a private
            run that hides its metrics.
        num_tokens: the number of input tokens without padding.
        latency_ms: the time on the actor, in milliseconds.
        warnings: the rows of a private run that added nothing, and the reasons; in the first calls,
            the rows that another dataset of the tenant knows. They are also issued as Python
            warnings when the result is first taken.
    """

    loss: float
    batch_hash: str
    gradient_hash: str
    num_tokens: int
    latency_ms: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DPMetrics:
    """The privacy figures of one private step.

    The norms and `num_clipped` depend on the data and lie outside the guarantee: they are for
    the data owner alone. `DPConfig(show_private_metrics=False)` hides them.

    Attributes:
        noise_applied: False only on a dataset that is registered without a limit.
        epsilon_spent: the dataset's epsilon after this step minus its epsilon before this step.
        total_epsilon: the dataset's epsilon after this step, over all runs on the dataset.
        delta: the delta of the dataset.
        grad_norm_before_clip: the median L2 norm over the units of the step; NaN if the step has
            no units or the metrics are hidden.
        grad_norm_after_clip: the same median after clipping.
        num_clipped: the number of units whose norm exceeded the bound; 0 if the metrics are hidden.
    """

    noise_applied: bool
    epsilon_spent: float
    total_epsilon: float
    delta: float
    grad_norm_before_clip: float
    grad_norm_after_clip: float
    num_clipped: int


@dataclass(frozen=True)
class OptimStepResult:
    """The result of one optimizer step.

    Attributes:
        grad_norm: the L2 norm of the gradient handed to the optimizer, before global clipping. In
            a private run this is the norm of the noised gradient.
        learning_rate: the rate used in this step.
        step: the number of completed optimizer steps, including this step.
        dp_metrics: the privacy figures; None in a run without differential privacy.
        latency_ms: the time on the actor, in milliseconds.
        warnings: messages about the step. They are also issued as Python warnings when the result
            is first taken.
    """

    grad_norm: float
    learning_rate: float
    step: int
    dp_metrics: DPMetrics | None
    latency_ms: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrivateEvalResult:
    """A held-out loss that was released with noise, and its cost.

    The value is covered by the guarantee of the held-out dataset: you may stop, or choose a
    checkpoint, by it.

    Attributes:
        value: the mean over the held-out units of the loss of the present weights minus that of the
            base model, each clipped to two nats per token, plus noise. It is below 0 if the weights
            predict the units better than the base model.
        std: the standard deviation of the noise in `value`.
        num_units: the public number of units that the sum was divided by.
        dataset_id: the held-out dataset, which paid.
        epsilon_before, epsilon_after: the epsilon spent by the held-out dataset before and after
            this call.
        delta: the delta of the held-out dataset.
        warnings: the rows that added nothing, and the reasons; empty in a run that hides its
            metrics. They depend on the data and are for the data owner alone.
    """

    value: float
    std: float
    num_units: int
    dataset_id: str
    epsilon_before: float
    epsilon_after: float
    delta: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One completion.

    `finish_reason` is `length`, `stop` (a stop sequence) or `eos`. `num_tokens` counts the tokens
    of the completion; `latency_ms` is the generation time in milliseconds.
    """

    prompt: str
    completion: str
    num_tokens: int
    finish_reason: str
    latency_ms: float
    token_ids: list[int] = field(default_factory=list, repr=False)
    logprobs: list[float] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class SampleResult:
    """All completions, grouped by prompt.

    `total_tokens` counts the generated tokens; `latency_ms` is the total time in milliseconds;
    `weights_version` is `run@step`.
    """

    samples: list[Sample]
    total_tokens: int
    latency_ms: float
    weights_version: str = ""


@dataclass(frozen=True)
class StreamChunk:
    """A piece of a streamed completion: whole characters, never part of a stop sequence.

    The last chunk carries `finish_reason`; its text may be empty. `top_logprobs` lists the most
    probable tokens for each token of the chunk, best first. `prompt_logprobs` scores the tokens of
    the prompt and comes with the first chunk, as does `prompt_top_logprobs`, which lists the most
    probable tokens at each place of the prompt; none at the first. They are filled only on request.
    """

    text: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    weights_version: str = ""
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None


@dataclass(frozen=True)
class EncryptionInfo:
    """The encryption of an artifact. `key_id` names a key; it is not the key."""

    algorithm: str
    key_id: str
    key_provider: str
    format_version: int


@dataclass(frozen=True)
class SaveStateResult:
    """A published artifact, which is durable once this object exists.

    `size_bytes` counts the stored bytes; `timestamp` is the time of the save in UTC.
    """

    artifact_id: str
    size_bytes: int
    encryption: EncryptionInfo
    metadata: dict[str, Any]
    timestamp: datetime


@dataclass(frozen=True)
class LoadStateResult:
    """The state that was restored.

    `step` is the restored step; `timestamp` is the time of the original save in UTC; `warnings`
    describes the differences from an uninterrupted run.
    """

    artifact_id: str
    step: int
    metadata: dict[str, Any]
    timestamp: datetime
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ArtifactInfo:
    """One row of `ServiceClient.list_artifacts`. `size_bytes` counts ciphertext.

    Attributes:
        labels: the labels of the artifact, which `set_labels` replaces.
        expires_at: the time from which the artifact no longer opens, in UTC; None means never.
    """

    artifact_id: str
    training_client_id: str
    step: int
    size_bytes: int
    include_optimizer: bool
    created_at: datetime
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    expires_at: datetime | None = None

    @property
    def expired(self) -> bool:
        """Whether the artifact has expired by this machine's clock.

        The registry decides by its own clock whether the artifact opens.
        """
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


@dataclass(frozen=True)
class Orphan:
    """Files in the store that belong to no artifact, and the action of a sweep on them.

    Attributes:
        name: the id of the artifact that the files would belong to, or the name of a single file
            below the folder of the tenant.
        files: the number of files.
        size_bytes: the total size of the files, in bytes.
        state: the result of the sweep. `waiting`: a later sweep removes the files if they are
            unchanged. `due`: a sweep that is not a dry run would remove the files. `removed`: the
            files are gone. `refused`: the store refused to remove the files, and the next sweep
            tries again. `unknown`: TG-Tinker does not use this name and leaves the file alone.
            `kept`: the files may be the rest of an artifact that lost its other files.
        problem: the answer of the store, or what to do; empty unless `refused` or `kept`.
    """

    name: str
    files: int
    size_bytes: int
    state: str
    problem: str = ""


@dataclass(frozen=True)
class KeyUses:
    """The number of artifacts that each key of a keyring opens, over all tenants.

    Attributes:
        primary: the id of the key that wraps the data keys of new artifacts.
        artifacts: the number of artifacts that each key opens, by key id, oldest key first.
        unreadable: the problem of each key file that does not show its key, by artifact id.
        missing: the ids of keys that the registry has used and that are newer than every key of
            the keyring. If there are any, the keyring is an older copy.
    """

    primary: str
    artifacts: dict[str, int]
    unreadable: dict[str, str]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class ApiKeyInfo:
    """An API key of an HTTP client, without its secret.

    Attributes:
        models: the runs and artifacts that the key may sample from, beside the base model; all
            runs and artifacts of the tenant if empty.
        created_at: the time of creation, in UTC.
        expires_at: the time from which the key is refused, in UTC; None means never.
    """

    key_id: str
    label: str
    models: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None


PARKED = "parked"
"""The `reason` of a run that was saved and has no actor until the next call."""

CLOSED, NOT_STARTED = "closed", "never started"
"""The two values of `reason` for a run that has ended."""


@dataclass(frozen=True)
class TrainingClientInfo:
    """A run as the registry knows it, and as its actor knows it if there is an actor.

    Attributes:
        status: `active`, `completed` or `failed`.
        step: the number of completed optimizer steps.
        epoch: a number that rises when an actor starts for this run, and when the run is parked or
            ends.
        created_at: the time of creation, in UTC.
        last_artifact_id: the id of the run's last saved artifact that still opens; None if there is
            none.
        num_trainable: the number of trainable parameters; 0 if no actor was asked.
        queued: the number of calls that wait on the actor.
        reason: why the run has no actor: closed, parked, or how the last actor was lost; empty if
            the run has an actor.
        unit_gradients, slow_because: how a private run computes the gradients of single units, as
            in `ModelInfo`; empty if no actor was asked.
    """

    training_client_id: str
    status: str
    step: int
    epoch: int
    model_ref: str
    created_at: datetime
    last_artifact_id: str | None = None
    num_trainable: int = 0
    queued: int = 0
    reason: str = ""
    unit_gradients: str = ""
    slow_because: str = ""


@dataclass(frozen=True)
class ClusterStatus:
    """The machines of a cluster, its free resources, and its training clients.

    Attributes:
        address: ``host:port`` of the head node.
        machines: the resources of each machine, by address: CPUs, GPUs, bytes of memory.
        free: the resources that are not reserved, summed over all machines.
        clients: the ids of all runs with a living training actor, of all tenants.
        encrypted: whether Ray's own connections use TLS.
    """

    address: str
    machines: dict[str, dict[str, float]]
    free: dict[str, float]
    clients: tuple[str, ...]
    encrypted: bool


@dataclass(frozen=True)
class ModelInfo:
    """The properties of a loaded model that the SDK needs to check a batch before sending it.

    Attributes:
        flat_stream: whether the model can process several rows as one stream of tokens.
        sampling: how the model is sampled: ``slots``, ``cache``, ``cache-prompts``, ``whole``, from
            fast to slow; empty if it can only be trained.
        unit_gradients: how a private run computes the gradients of units: ``fast``, in the one
            backward pass of a micro-batch, or ``row by row``; empty in a run without privacy.
        slow_because: why they are computed row by row; empty if they are not.
        warnings: messages about the model, and about the restored state of a recovered run.
    """

    vocab_size: int
    context_length: int
    num_trainable: int
    base_digest: str
    dtype: str
    device: str
    flat_stream: bool
    sampling: str
    num_threads: int
    unit_gradients: str = ""
    slow_because: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RegistryCheck:
    """A comparison of the registry's database with the heads that store and home keep of a tenant.

    Attributes:
        rows: the number of rows of the audit log.
        stored: the number of the newest row in the audit log that a head in the store attests; 0 if
            there is none. An older copy that lacks only later rows may go undetected.
        heads: the number of heads that were found and that match the audit log.
        missing: the heads that the audit log does not contain. The object in the store or the file
            of the home maps to the row number of its head. If there are any, the database is an
            older copy, or another database.
        foreign: objects in the store that are not heads of this audit log, with the reason. They do
            not count here, but a sweep refuses to start beside the heads of another registry.
        damaged: files of the home that should be heads of the audit log and are not, with the
            reason. Their evidence is lost.
        ledgers: the problem of each ledger, by dataset; by pseudonym if the database has lost the
            dataset itself.
        accepted: the numbers of the rows that accepted an older copy.
        api_keys: the API keys, by id, whose rows in the database are not as the registry wrote them
            last, with the reason. They open nothing.
    """

    rows: int
    stored: int
    heads: int
    missing: dict[str, int]
    foreign: dict[str, str]
    damaged: dict[str, str]
    ledgers: dict[str, str]
    accepted: tuple[int, ...]
    api_keys: dict[str, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether no head is missing, no ledger or API key has a problem, and no evidence is
        damaged.

        It is also False while an acceptance is `unfinished`.
        """
        return not (
            self.missing or self.damaged or self.ledgers or self.api_keys or self.unfinished
        )

    @property
    def unfinished(self) -> bool:
        """Whether the store still lacks the head of an acceptance; `accept_registry` writes it."""
        return self.stored < max(self.accepted, default=0)


@dataclass(frozen=True)
class RegistryAcceptance:
    """The consequences of accepting an older copy of the database.

    Attributes:
        row: the number of the audit log row that records the acceptance; 0 if there was nothing to
            accept.
        openable: the artifacts that the copy knows and whose files are in the store, including
            files that a later reseal stored under another name. The copy cannot know which of these
            artifacts were deleted after it was made: delete them again.
        lost: the artifacts that the copy knows and that do not open, with the reason. In most cases
            their files are gone.
    """

    row: int
    openable: tuple[str, ...]
    lost: Mapping[str, str]


@dataclass(frozen=True)
class ArtifactQuery:
    """The conditions that `list_artifacts` sends to the registry; None means no condition.

    Attributes:
        run: the id of the training client that saved the artifacts.
        label: the name and the value of a label.
        newer_than, older_than: exclusive bounds on `created_at`.
        after: the id of the last artifact of the previous page; it may be deleted by now.
        limit: the maximum number of artifacts.
    """

    run: str | None = None
    label: tuple[str, str] | None = None
    newer_than: datetime | None = None
    older_than: datetime | None = None
    after: str | None = None
    limit: int | None = None
