"""Defines how a signing key follows another: statements that both keys sign.

    signers = Signers(pinned, successions)
    head.check(signers.at(head.seq))      # raises unless the key in force there signed the head

A statement names the older and the newer key. The older key's signature leads whoever pinned the
older key on to the newer one. The newer key's signature shows whoever pinned the newer key which
key was in force before. Each audit log holds the statement in a row: the newer key is in force from
this row on, and a head of this row or a later one that the older key signed is refused. So a
replaced key that is stolen later signs nothing that counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tg_tinker.errors import IntegrityError
from tg_tinker.storage.envelope import (
    check_signature,
    public_key_from,
    public_key_of,
    raw_public_key,
    sign,
)

SUCCEED = "audit_key.rotate"
"""The event of the row that holds a statement."""

_DOMAIN = b"tg-tinker audit key succession v1\n"
_FORMS = {
    "countersignature": re.compile(r"[0-9a-f]{128}"),
    "key": re.compile(r"[0-9a-f]{64}"),
    "previous": re.compile(r"[0-9a-f]{64}"),
    "signature": re.compile(r"[0-9a-f]{128}"),
}


@dataclass(frozen=True)
class Succession:
    """A statement that a signing key follows another.

    Attributes:
        previous: the older public key, 32 bytes in hex.
        key: the newer public key, 32 bytes in hex.
        signature: the Ed25519 signature by the older key, hex.
        countersignature: the Ed25519 signature by the newer key over the same text, hex.
    """

    previous: str
    key: str
    signature: str
    countersignature: str

    @classmethod
    def of(cls, older: bytes, newer: bytes) -> Succession:
        """Returns the statement about two signing keys."""
        previous, key = (raw_public_key(public_key_of(one)) for one in (older, newer))
        message = _message(previous, key)
        return cls(previous, key, sign(older, message).hex(), sign(newer, message).hex())

    @classmethod
    def parse(cls, text: str) -> Succession:
        """Returns the statement that canonical JSON holds, after checking both signatures.

        Raises:
            IntegrityError: the text is no such statement, or a signature does not verify.
        """
        try:
            found = cls(**json.loads(text))
            sound = all(
                type(getattr(found, name)) is str and form.fullmatch(getattr(found, name))
                for name, form in _FORMS.items()
            )
            sound = sound and found.line() == text
        except (ValueError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise IntegrityError("this is no statement that a signing key follows another")
        found._check()
        return found

    def line(self) -> str:
        """Returns the statement as canonical JSON, without a line end."""
        return json.dumps(vars(self), sort_keys=True, separators=(",", ":"))

    def _check(self) -> None:
        message = _message(self.previous, self.key)
        for key, signature in (
            (self.previous, self.signature), (self.key, self.countersignature),
        ):  # fmt: skip
            check_signature(public_key_from(key), bytes.fromhex(signature), message)


class Signers:
    """The keys that sign the heads of one log, and from which row on each of them is in force.

    Args:
        pinned: the public key that the caller trusts, as PEM.
        found: the statements in the log, in order, each with the number of its row.
    """

    def __init__(self, pinned: bytes, found: Iterable[tuple[int, Succession]] = ()) -> None:
        rows: dict[Succession, int] = {}
        for row, step in found:
            rows.setdefault(step, row)  # a row that is repeated changes nothing
        steps = [(row, step) for step, row in rows.items()]
        self._first = pinned
        first = last = raw_public_key(pinned)
        after: list[tuple[int, bytes]] = []
        for row, step in steps:
            if step.previous == last:
                last = step.key
                after.append((row, public_key_from(last)))
        before: list[tuple[int, bytes]] = []
        for row, step in reversed(steps):
            if step.key == first:
                before.insert(0, (row, self._first))
                first = step.previous
                self._first = public_key_from(first)
        self._from = [*before, *after]

    @property
    def newest(self) -> bytes:
        """The public key in force at the end of the log."""
        return self._from[-1][1] if self._from else self._first

    def at(self, row: int) -> bytes:
        """Returns the public key that is in force at a row: a head of this row must have its
        signature."""
        key = self._first
        for begins, newer in self._from:
            if begins <= row:
                key = newer
        return key


def chain_to(public_key: bytes, steps: Iterable[Succession]) -> list[Succession]:
    """Returns those statements, oldest first, that lead to a key."""
    by_key = {step.key: step for step in steps}
    found: list[Succession] = []
    key = raw_public_key(public_key)
    while (step := by_key.pop(key, None)) is not None:
        found.insert(0, step)
        key = step.previous
    return found


def _message(previous: str, key: str) -> bytes:
    body = {"key": key, "previous": previous}
    return _DOMAIN + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
