"""TG-Tinker: private fine-tuning of language models as a service on Ray.

    from tg_tinker import LoRAConfig, ServiceClient, TrainingConfig

    with ServiceClient() as service:
        tc = service.create_training_client(
            TrainingConfig(model_ref="path/or/hub-id", lora_config=LoRAConfig(rank=16))
        )
        tc.forward_backward({"input_ids": [[1, 2, 3]]})
        print(tc.optim_step().result())

The ground, which imports nothing else of ours:

- config.py, types.py, errors.py: configuration, results, the tree of errors.
- labels.py, sampling.py: what a label may be; parameters of sampling and their ranges.
- backend.py: what the packages above offer to the SDK, which may not import them.

And on it, each importing those before it that it names:

- storage/: what URIs of stores, databases and keyrings mean; the envelope.
- data/: batches, rows, chats, tokenizer.
- records/: the rules of ledger and audit log.
- cluster/: the door to Ray.
- client/: `ServiceClient`, `TrainingClient`, handles of calls.
- demo/: what `make demo` does.
- cli/: the command `tg-tinker`.

Importing the package loads neither torch, ray nor transformers.
"""

from tg_tinker.client.future import FutureHandle
from tg_tinker.client.service import ServiceClient
from tg_tinker.client.training import TrainingClient
from tg_tinker.config import (
    CheckpointConfig,
    DPConfig,
    LoRAConfig,
    OptimizerConfig,
    ResourceConfig,
    TrainingConfig,
)
from tg_tinker.data.batch import BatchData
from tg_tinker.data.hashing import batch_hash
from tg_tinker.errors import (
    AccessDeniedError,
    ActorLostError,
    ArtifactMismatchError,
    ClusterUnavailableError,
    DeadlineExceededError,
    DPBudgetExceededError,
    FutureCancelledError,
    FutureTimeoutError,
    IntegrityError,
    InternalError,
    InvalidRequestError,
    LedgerMismatchError,
    LineageError,
    NonFiniteError,
    NotFoundError,
    PlacementError,
    QueueFullError,
    RollbackError,
    ServiceError,
    StorageError,
    TGTinkerError,
    VersionGoneError,
    WindowSpoiledError,
)
from tg_tinker.records.audit_log import AuditRow
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.report import PrivacyInfo, PrivacyReport
from tg_tinker.types import (
    ApiKeyInfo,
    ArtifactInfo,
    ClusterStatus,
    DPMetrics,
    EncryptionInfo,
    ForwardBackwardResult,
    KeyUses,
    LoadStateResult,
    OptimStepResult,
    Orphan,
    RegistryAcceptance,
    RegistryCheck,
    Sample,
    SampleResult,
    SaveStateResult,
    StreamChunk,
    TrainingClientInfo,
)

__version__ = "0.1.0"

__all__ = [
    "AccessDeniedError",
    "ActorLostError",
    "ApiKeyInfo",
    "ArtifactInfo",
    "ArtifactMismatchError",
    "AuditHead",
    "AuditRow",
    "BatchData",
    "CheckpointConfig",
    "ClusterStatus",
    "ClusterUnavailableError",
    "DPBudgetExceededError",
    "DPConfig",
    "DPMetrics",
    "DeadlineExceededError",
    "EncryptionInfo",
    "ForwardBackwardResult",
    "FutureCancelledError",
    "FutureHandle",
    "FutureTimeoutError",
    "IntegrityError",
    "InternalError",
    "InvalidRequestError",
    "KeyUses",
    "LedgerMismatchError",
    "LineageError",
    "LoRAConfig",
    "LoadStateResult",
    "NonFiniteError",
    "NotFoundError",
    "OptimStepResult",
    "OptimizerConfig",
    "Orphan",
    "PlacementError",
    "PrivacyInfo",
    "PrivacyReport",
    "QueueFullError",
    "RegistryAcceptance",
    "RegistryCheck",
    "ResourceConfig",
    "RollbackError",
    "Sample",
    "SampleResult",
    "SaveStateResult",
    "ServiceClient",
    "ServiceError",
    "StorageError",
    "StreamChunk",
    "TGTinkerError",
    "TrainingClient",
    "TrainingClientInfo",
    "TrainingConfig",
    "VersionGoneError",
    "WindowSpoiledError",
    "batch_hash",
]
