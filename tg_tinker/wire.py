"""What travels between a `TrainingClient` and its actor: one request form, one reply form.

Both are always sealed (`envelope.seal_payload`) under the transport key that the registry keeps
in memory: Ray spills large values to disk in clear, and many small ones add up to a large one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tg_tinker.errors import Wire, from_wire

TRAINING_OPERATIONS = (
    "forward_backward", "optim_step", "sample", "save_state", "load_state", "register_units",
    "draw_units",
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
    """

    request_id: str
    operation: str
    epoch: int
    handle: str
    sequence: int
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Reply:
    """The answer: a value, or an error as plain values (never an exception with a traceback)."""

    value: Any = None
    error: Wire | None = None

    def unwrap(self) -> Any:
        """The value; raises the error as a clean local copy."""
        if self.error is not None:
            raise from_wire(self.error) from None
        return self.value
