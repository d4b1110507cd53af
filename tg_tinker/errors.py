"""Defines every error that TG-Tinker raises, as one tree, grouped by who can correct the error.

    TGTinkerError
    ├── InvalidRequestError (ValueError)   a value of the caller is wrong; nothing was changed
    │   ├── NotFoundError                  the client, artifact or model does not exist
    │   ├── VersionGoneError               the run is at another step than the requested one
    │   ├── ArtifactMismatchError          the artifact has another model, rank or layer set
    │   └── LineageError                   a private run may not start from these weights
    ├── AccessDeniedError                  the API key or capability grants no access
    ├── NonFiniteError                     a loss or gradient is NaN or infinite; weights unchanged
    ├── WindowSpoiledError                 an earlier call of this step failed; the step is dropped
    ├── DPBudgetExceededError              the privacy budget cannot pay for the step
    ├── FutureTimeoutError (TimeoutError)  no answer within the timeout; the call continues
    ├── FutureCancelledError               the call was canceled before it changed anything
    ├── IntegrityError                     stored bytes were changed, or another key sealed them
    │   ├── LedgerMismatchError            a ledger is behind one of its known heads, or has forked
    │   └── RollbackError                  the registry's database is behind a head in its store
    └── ServiceError                       the service failed, not the request
        ├── ActorLostError                 the training actor is gone
        ├── ClusterUnavailableError        no Ray cluster answers
        ├── PlacementError                 no node has room for the client
        ├── QueueFullError                 too many calls are waiting on this client
        ├── DeadlineExceededError          an HTTP sample took longer than the server allows
        ├── StorageError                   a disk, a store or a database refused an operation
        └── InternalError                  a defect of TG-Tinker; shows only type and request id

A message states the wrong value, the bound and the next step. It never contains training text,
tokens (except ids that lie outside the vocabulary), keys, or another tenant's names. The training
actor returns errors as values (`to_wire`), and the SDK raises a clean local copy (`from_wire`).
So no traceback with data ever passes through Ray.
"""

from __future__ import annotations

from typing import Any

Wire = tuple[str, str, dict[str, Any]]


class TGTinkerError(Exception):
    """The root of the tree.

    Attributes:
        message: the problem, the bound, and the next step.
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
        """Returns the error as plain values, for a reply that crosses processes."""
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
    """Returns the error that `to_wire` described.

    A class that this SDK does not know becomes `TGTinkerError`.
    """
    name, message, details = wire
    details = dict(details)
    code = details.pop("code", None)
    return _subclasses(TGTinkerError).get(name, TGTinkerError)(message, code, details)
