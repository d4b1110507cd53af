"""Every error that TG-Tinker raises, one tree, grouped by who can mend it.

    TGTinkerError
    ├── InvalidRequestError (ValueError)   the caller: a value is wrong; nothing was changed
    │   ├── NotFoundError                  no such client, artifact or model
    │   ├── VersionGoneError               a run is at another step than the one asked for
    │   ├── ArtifactMismatchError          an artifact of another model, rank or layer set
    │   └── LineageError                   a private run may not start from these weights
    ├── AccessDeniedError                  an API key or a capability that opens nothing
    ├── NonFiniteError                     loss or gradient is NaN or infinite; weights as before
    ├── WindowSpoiledError                 an earlier call of this step failed; it is dropped
    ├── DPBudgetExceededError              the privacy budget cannot pay for the step
    ├── FutureTimeoutError (TimeoutError)  no answer within the timeout; the call goes on
    ├── FutureCancelledError               the call was cancelled before it changed anything
    ├── IntegrityError                     stored bytes were changed, or the key is another
    │   ├── LedgerMismatchError            a ledger is behind what is known of it, or another one
    │   └── RollbackError                  the registry's database is behind what its store knows
    └── ServiceError                       the service, not the request
        ├── ActorLostError                 the training actor is gone
        ├── ClusterUnavailableError        no Ray cluster answers
        ├── PlacementError                 no node has room for the client
        ├── QueueFullError                 too many calls are waiting on this client
        ├── DeadlineExceededError          a sample over HTTP took longer than the server allows
        ├── StorageError                   the disk or the store refused
        └── InternalError                  a defect of ours; named by type and request id only

A message names the value, the bound and the next step. It never holds training text, tokens
(other than ids that lie outside the vocabulary), keys, or another tenant's names. The training
actor returns errors as values (`to_wire`) and the SDK raises a clean local copy (`from_wire`),
so that no traceback with data ever passes through Ray.
"""

from __future__ import annotations

from typing import Any

Wire = tuple[str, str, dict[str, Any]]


class TGTinkerError(Exception):
    """Root of the tree.

    Attributes:
        message: what went wrong, the bound, and what to do next.
        code: a stable name for programs, such as ``invalid_request``.
        details: plain values (numbers, ids, names) that the message mentions.
    """

    code = "error"

    def __init__(
        self, message: str, code: str | None = None, details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.details = details or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.code, self.details)

    def to_wire(self) -> Wire:
        """The error as plain values, for a reply that crosses processes."""
        return type(self).__name__, self.message, {**self.details, "code": self.code}


class InvalidRequestError(TGTinkerError, ValueError):
    code = "invalid_request"


class NotFoundError(InvalidRequestError):
    code = "not_found"


class VersionGoneError(InvalidRequestError):
    code = "version_gone"


class ArtifactMismatchError(InvalidRequestError):
    code = "artifact_mismatch"


class LineageError(InvalidRequestError):
    code = "lineage"


class AccessDeniedError(TGTinkerError):
    code = "access_denied"


class NonFiniteError(TGTinkerError):
    code = "non_finite"


class WindowSpoiledError(TGTinkerError):
    code = "window_spoiled"


class DPBudgetExceededError(TGTinkerError):
    code = "dp_budget_exceeded"


class FutureTimeoutError(TGTinkerError, TimeoutError):
    code = "timeout"


class FutureCancelledError(TGTinkerError):
    code = "cancelled"


class IntegrityError(TGTinkerError):
    code = "integrity"


class LedgerMismatchError(IntegrityError):
    code = "ledger_mismatch"


class RollbackError(IntegrityError):
    code = "rollback"


class ServiceError(TGTinkerError):
    code = "service"


class ActorLostError(ServiceError):
    code = "actor_lost"


class ClusterUnavailableError(ServiceError):
    code = "cluster_unavailable"


class PlacementError(ServiceError):
    code = "no_place"


class QueueFullError(ServiceError):
    code = "queue_full"


class DeadlineExceededError(ServiceError):
    code = "deadline_exceeded"


class StorageError(ServiceError):
    code = "storage"


class InternalError(ServiceError):
    code = "internal"


def _subclasses(cls: type[TGTinkerError]) -> dict[str, type[TGTinkerError]]:
    return {cls.__name__: cls} | {
        k: v for sub in cls.__subclasses__() for k, v in _subclasses(sub).items()
    }


def from_wire(wire: Wire) -> TGTinkerError:
    """The error that `to_wire` described; a class unknown to this SDK becomes its root class."""
    name, message, details = wire
    details = dict(details)
    code = details.pop("code", None)
    return _subclasses(TGTinkerError).get(name, TGTinkerError)(message, code, details)
