"""What travels between a `TrainingClient` and its actor: one request form, one reply form.

Both are always sealed (`envelope.seal_payload`) under the transport key that the registry keeps
in memory: Ray spills large values to disk in clear, and many small ones add up to a large one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tg_tinker.errors import Wire, from_wire
from tg_tinker.sampling import SamplingParams

OUT_OF_TURN = "out_of_turn"
"""The code of the `ServiceError` that refuses a call before its turn; `details["due"]` is the
number of the call that is missing. It is not remembered: the same call is taken in its turn."""

NOT_YET = "not_yet"
"""The code of the `ServiceError` by which `saved` says that its call has not come for long."""

TRAINING_OPERATIONS = (
    "forward_backward", "optim_step", "snapshot", "save_state", "load_state", "load_adapter",
    "register_units", "draw_units", "park",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Request:
    """One call, numbered so that the actor can tell a repeat from a new call.

    Attributes:
        request_id: chosen by the SDK, unique; the `future_id` of the handle.
        operation: one of `TRAINING_OPERATIONS`.
        epoch: the actor generation this handle belongs to.
        handle: the id of the `TrainingClient` object; order is kept per handle.
        sequence: 0, 1, 2, ... within the handle.
        arguments: keyword arguments of the operation.
        ledger: where the client last saw the ledger of its data set end, ``SEQ-HASH``.
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
    """Where a sampler gets the weights of one step.

    Attributes:
        name: unique for these very weights.
        version: ``run@step``, as answers carry it.
        actor: the training actor's name in the service's namespace.
        shared: they are a LoRA adapter, which shares the base model with others.
    """

    name: str
    version: str
    actor: str
    shared: bool


@dataclass(frozen=True)
class Saving:
    """What `save_state` answers once the state is copied: the artifact that it will become."""

    artifact_id: str


@dataclass(frozen=True, repr=False)
class SampleRequest:
    """One call of `sample` or `sample_stream`, to a sampler."""

    snapshot: SnapshotRef
    prompts: list[str]
    params: SamplingParams


@dataclass(frozen=True, repr=False)
class Reply:
    """The answer: a value, or an error as plain values (never an exception with a traceback).

    Attributes:
        ledger_head: a private run's `LedgerHead` after its last charge, a line; else empty.
    """

    value: Any = None
    error: Wire | None = None
    ledger_head: str = ""

    @property
    def code(self) -> str:
        """Of the error; empty without one."""
        return "" if self.error is None else str(self.error[2].get("code", ""))

    @property
    def final(self) -> bool:
        """Whether it says what became of the call, not only that it has to come again."""
        return self.code not in (OUT_OF_TURN, NOT_YET)

    def unwrap(self) -> Any:
        """The value; raises the error as a clean local copy."""
        if self.error is not None:
            raise from_wire(self.error) from None
        return self.value
