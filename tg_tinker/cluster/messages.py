"""Defines the messages between a `TrainingClient` and its actor: requests and replies.

Both are always sealed (`envelope.seal_payload`) with the transport key that the registry keeps in
memory. Ray spills large values to disk in clear, and many small values add up to a large value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tg_tinker.errors import Wire, from_wire
from tg_tinker.sampling import SamplingParams

OUT_OF_TURN = "out_of_turn"
"""The code of the `ServiceError` that refuses a call out of order.

`details["due"]` is the number of the missing call. The actor does not store this reply, so it runs
the same call when the call is due."""

NOT_YET = "not_yet"
"""The code of the `ServiceError` of `saved` if its call has not arrived within the timeout."""

TRAINING_OPERATIONS = (
    "forward_backward", "optim_step", "snapshot", "save_state", "load_state", "load_adapter",
    "register_units", "draw_units", "private_eval", "park",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Request:
    """One call, with a number by which the actor distinguishes a repeat from a new call.

    Attributes:
        request_id: a unique id that the SDK chooses; the `future_id` of the handle.
        operation: one of `TRAINING_OPERATIONS`.
        epoch: the epoch of the actor that this handle belongs to.
        handle: the id of the sending client object; calls are ordered per handle.
        sequence: the number of the call within the handle: 0, 1, 2, ...
        arguments: the keyword arguments of the operation.
        ledger: the last head position of the dataset's ledger that the client saw, ``SEQ-HASH``;
            empty without a private run.
    """

    request_id: str
    operation: str
    epoch: int
    handle: str
    sequence: int
    arguments: dict[str, Any] = field(default_factory=dict)
    ledger: str = ""


@dataclass(frozen=True)
class SnapshotRef:
    """A reference by which a sampler fetches the weights of one step.

    Attributes:
        name: a name that is unique for these weights.
        version: ``run@step``, as in the answers of the sampler.
        actor: the training actor's name in the service's namespace.
        shared: whether the weights are a LoRA adapter, which shares the base model.
        tenant: the tenant of the run, as the training actor was told at its start.
    """

    name: str
    version: str
    actor: str
    shared: bool
    tenant: str = ""


@dataclass(frozen=True)
class Saving:
    """The answer of `save_state` once the state is copied: the id of the future artifact."""

    artifact_id: str


@dataclass(frozen=True, repr=False)
class SampleRequest:
    """One call of `sample` or `sample_stream` to a sampler."""

    snapshot: SnapshotRef
    prompts: list[str]
    params: SamplingParams


@dataclass(frozen=True, repr=False)
class Reply:
    """The answer to a request: a value, or an error as plain values without a traceback.

    Attributes:
        value: the result of the call; None for an error.
        error: the error in the form of `to_wire`; None for a result.
        ledger_head: the `LedgerHead` line of a private run after its last charge; else empty.
    """

    value: Any = None
    error: Wire | None = None
    ledger_head: str = ""

    @property
    def code(self) -> str:
        """The code of the error; empty without an error."""
        return "" if self.error is None else str(self.error[2].get("code", ""))

    @property
    def final(self) -> bool:
        """Whether the reply is the outcome of the call, and not a request to repeat the call."""
        return self.code not in (OUT_OF_TURN, NOT_YET)

    def unwrap(self) -> Any:
        """Returns the value, or raises the error as a clean local copy."""
        if self.error is not None:
            raise from_wire(self.error) from None
        return self.value
