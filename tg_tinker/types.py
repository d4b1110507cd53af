"""Results of the public API: plain frozen dataclasses, the seed's fields first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True)
class ForwardBackwardResult:
    """What one `forward_backward` found. Seen by the data owner alone.

    Attributes:
        loss: token-weighted mean over the labelled tokens of the batch, in nats.
        batch_hash: `sha256:` over the normalised rows, or the caller's own string.
        gradient_hash: hash of this call's gradient sum; empty in eval mode.
        num_tokens: kept input tokens, padding not counted.
        latency_ms: time on the actor.
        warnings: rows of a private run that added nothing, and why. Also given as warnings
            when the result is taken.
    """

    loss: float
    batch_hash: str
    gradient_hash: str
    num_tokens: int
    latency_ms: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DPMetrics:
    """Privacy figures of one private step.

    The norms and `num_clipped` depend on the data and lie outside the guarantee: they are for
    the data owner alone (`DPConfig.show_private_metrics`).

    Attributes:
        noise_applied: False only on a data set registered without a limit.
        epsilon_spent: the data set's epsilon after this step minus before.
        total_epsilon: the data set's epsilon after this step, of all its runs.
        delta: of the data set.
        grad_norm_before_clip: median L2 norm over the units of the step; NaN without any.
        grad_norm_after_clip: the same after clipping.
        num_clipped: units whose norm exceeded the bound; 0 where metrics are hidden.
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
    """What one optimizer step did.

    Attributes:
        grad_norm: L2 norm of the gradient handed to the optimizer, before global clipping; in
            a private run that of the noised gradient.
        learning_rate: the rate used in this very step.
        step: optimizer steps completed, this one included.
        dp_metrics: None in a run without differential privacy.
        latency_ms: time on the actor.
        warnings: given when the result is taken, too.
    """

    grad_norm: float
    learning_rate: float
    step: int
    dp_metrics: DPMetrics | None
    latency_ms: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One completion. `finish_reason` is `length`, `stop` (a stop sequence) or `eos`."""

    prompt: str
    completion: str
    num_tokens: int
    finish_reason: str
    latency_ms: float
    token_ids: list[int] = field(default_factory=list, repr=False)
    logprobs: list[float] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class SampleResult:
    """All completions, prompt by prompt; `weights_version` is `run@step`."""

    samples: list[Sample]
    total_tokens: int
    latency_ms: float
    weights_version: str = ""


@dataclass(frozen=True)
class StreamChunk:
    """A piece of a streamed completion: whole characters, never part of a stop sequence.

    The last chunk carries `finish_reason`; its text may be empty. `top_logprobs` (the most probable
    tokens at each token, best first) and `prompt_logprobs` (of the prompt's tokens, with the first
    chunk) are there when asked for.
    """

    text: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    weights_version: str = ""
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class EncryptionInfo:
    """How an artifact is sealed. The key id names a key; it is not the key."""

    algorithm: str
    key_id: str
    key_provider: str
    format_version: int


@dataclass(frozen=True)
class SaveStateResult:
    """A published artifact: it is durable when this object exists. `timestamp` is UTC."""

    artifact_id: str
    size_bytes: int
    encryption: EncryptionInfo
    metadata: dict[str, Any]
    timestamp: datetime


@dataclass(frozen=True)
class LoadStateResult:
    """What was restored. `warnings` names what will differ from an uninterrupted run."""

    artifact_id: str
    step: int
    metadata: dict[str, Any]
    timestamp: datetime
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ArtifactInfo:
    """One row of `ServiceClient.list_artifacts`. `size_bytes` counts ciphertext.

    Attributes:
        labels: as `set_labels` gave them.
        expires_at: UTC; from then on nothing opens it. None is never.
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
        """By this machine's clock; it is the registry's that counts."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


@dataclass(frozen=True)
class Orphan:
    """Files in the store that belong to no artifact, and what a sweep did about them.

    Attributes:
        name: id of the artifact that they would be of, or a file's own name below the tenant.
        state: `waiting` for a later sweep to find them the same; `due`, in a dry run; `removed`;
            `refused` by the store, and tried again by the next sweep; `unknown`: a file that
            TG-Tinker does not name so, and leaves alone; `kept`: maybe what is left of an artifact
            that lost its files.
        problem: what the store said, or what to do; empty unless refused or kept.
    """

    name: str
    files: int
    size_bytes: int
    state: str
    problem: str = ""


@dataclass(frozen=True)
class KeyUses:
    """What the keys of a keyring open, of all tenants.

    Attributes:
        primary: id of the key that new artifacts are wrapped under.
        artifacts: how many artifacts each key opens, by its id, oldest first.
        unreadable: what is wrong with key files that do not say which, by artifact.
        missing: keys that the registry has used and that are newer than all of the keyring: it is
            an older copy.
    """

    primary: str
    artifacts: dict[str, int]
    unreadable: dict[str, str]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class ApiKeyInfo:
    """A key of an HTTP client, without its secret.

    Attributes:
        models: runs and artifacts it may sample from; all of the tenant's when empty.
        expires_at: UTC; None is never.
    """

    key_id: str
    label: str
    models: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None


PARKED = "parked"
"""The `reason` of a run that was saved and has no actor until somebody calls it."""

CLOSED, NOT_STARTED = "closed", "never started"
"""The `reason` of a run that has ended."""


@dataclass(frozen=True)
class TrainingClientInfo:
    """A run as the registry and, where it lives, its actor know it.

    Attributes:
        status: `active`, `completed` or `failed`.
        step: completed optimizer steps.
        epoch: rises when an actor starts for this run, and when the run is closed.
        num_trainable: trainable parameters; 0 where no actor is asked.
        queued: calls waiting on the actor.
        reason: why it has no actor: closed, parked, or how the last one was lost; else empty.
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


@dataclass(frozen=True)
class ClusterStatus:
    """What a cluster has and what it does.

    Attributes:
        address: ``host:port`` of its head.
        machines: resources of each machine, by its address: CPUs, GPUs, bytes of memory.
        free: what is not reserved, of all machines together.
        clients: runs whose training actor lives, of all tenants.
        encrypted: whether Ray's own connections are under TLS.
    """

    address: str
    machines: dict[str, dict[str, float]]
    free: dict[str, float]
    clients: tuple[str, ...]
    encrypted: bool


@dataclass(frozen=True)
class ModelInfo:
    """What the SDK must know of a loaded model to check a batch before it is sent.

    Attributes:
        warnings: what a run that comes back has to say.
    """

    vocab_size: int
    context_length: int
    num_trainable: int
    base_digest: str
    dtype: str
    device: str
    flat_stream: bool
    num_threads: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RegistryCheck:
    """How a registry's database stands to what its store, and this home, know of one tenant.

    Attributes:
        rows: of the audit log.
        stored: number of the newest row that a head in the store is of, and that the log knows; 0
            where there is none. Of later rows an older copy may be put back unnoticed.
        heads: of the log that were found and that it knows.
        missing: those that it does not know, by object in the store or file of the home: the
            number of their row. The database is an older copy, or another one.
        foreign: objects in the store that are no heads of this log, and why. They count for
            nothing here; a sweep refuses to start beside the heads of another registry.
        damaged: what the home keeps of the log and is no head of it, and why: its evidence is lost.
        ledgers: what is wrong with the ledgers of data sets, by data set; by pseudonym where the
            database has lost the data set itself.
        accepted: numbers of the rows that accepted an older copy.
    """

    rows: int
    stored: int
    heads: int
    missing: dict[str, int]
    foreign: dict[str, str]
    damaged: dict[str, str]
    ledgers: dict[str, str]
    accepted: tuple[int, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is refused, and no evidence is damaged."""
        return not (self.missing or self.damaged or self.ledgers or self.unfinished)

    @property
    def unfinished(self) -> bool:
        """Whether the store has not taken the head of an acceptance: accept again."""
        return self.stored < max(self.accepted, default=0)


@dataclass(frozen=True)
class RegistryAcceptance:
    """What going on from an older copy of the database means.

    Attributes:
        row: of the audit log, which says so; 0 where nothing had to be accepted.
        openable: artifacts that the copy knows and whose files are there, also under the name that
            a later reseal gave them. Which of them had been deleted meanwhile it cannot know:
            delete those again.
        lost: artifacts that the copy knows and that do not open, and why: mostly, their files are
            gone.
    """

    row: int
    openable: tuple[str, ...]
    lost: Mapping[str, str]


@dataclass(frozen=True)
class ArtifactQuery:
    """What `list_artifacts` asks the registry for; None is no condition.

    Attributes:
        label: name and value.
        newer_than, older_than: by `created_at`, neither included.
        after: the last artifact of the page before; it may have been deleted since.
    """

    run: str | None = None
    label: tuple[str, str] | None = None
    newer_than: datetime | None = None
    older_than: datetime | None = None
    after: str | None = None
    limit: int | None = None
