"""TG-Tinker: private fine-tuning of language models as a service on Ray.

    from tg_tinker import LoRAConfig, ServiceClient, TrainingConfig

    with ServiceClient() as service:
        tc = service.create_training_client(
            TrainingConfig(model_ref="path/or/hub-id", lora_config=LoRAConfig(rank=16))
        )
        tc.forward_backward({"input_ids": [[1, 2, 3]]})
        print(tc.optim_step().result())

The modules at the base import only each other; backend.py also names types of records/:

- config.py, types.py, errors.py: the configuration, the results, and the tree of errors.
- labels.py, sampling.py: the form of a label; the sampling parameters and their ranges.
- hosts.py, texts.py: which hosts are this machine; which texts can be tokenized and stored.
- backend.py: the functions that the upper packages offer to the SDK, which may not import them.

The packages build on the base. Each package imports only packages above it in this list:

- storage/: the URIs of stores, databases and keyrings; the encryption envelope.
- data/: batches, rows, chats and the tokenizer.
- records/: the rules of the ledger and of the audit log.
- cluster/: all access to Ray.
- client/: `ServiceClient`, `TrainingClient`, and the handles of calls.
- demo/: the program behind `make demo`.
- cli/: the command `tg-tinker`.

Importing this package does not load torch, ray or transformers.
"""

from tg_tinker.client.future import FutureHandle
from tg_tinker.client.planning import plan_privacy
from tg_tinker.client.service import ServiceClient
from tg_tinker.client.training import TrainingClient
from tg_tinker.cluster.interrupts import Stopped, exit_status, stop_noted
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
from tg_tinker.records.planning import PlannedEvaluations, PlannedRun, PrivacyPlan
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
    PrivateEvalResult,
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
    "PlannedEvaluations",
    "PlannedRun",
    "PrivacyInfo",
    "PrivacyPlan",
    "PrivacyReport",
    "PrivateEvalResult",
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
    "Stopped",
    "StorageError",
    "StreamChunk",
    "TGTinkerError",
    "TrainingClient",
    "TrainingClientInfo",
    "TrainingConfig",
    "VersionGoneError",
    "WindowSpoiledError",
    "batch_hash",
    "exit_status",
    "plan_privacy",
    "stop_noted",
]
