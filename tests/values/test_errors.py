"""Tests the error tree: complete, as drawn, and the same on both sides of a wire."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

import tg_tinker
from tg_tinker import errors
from tg_tinker.errors import (
    FutureTimeoutError,
    IntegrityError,
    InvalidRequestError,
    TGTinkerError,
    from_wire,
)


def family(root: type[TGTinkerError]) -> Iterator[type[TGTinkerError]]:
    yield root
    for child in root.__subclasses__():
        yield from family(child)


CLASSES = list(family(TGTinkerError))
BRANCH = re.compile(r"^    ([│├└─ ]*)(\w+Error)\b(?: \((\w+)\))?")


def drawn() -> list[tuple[int, str, str | None]]:
    """Returns (depth, class, built-in base) for every line of the tree in the docstring."""
    lines = (BRANCH.match(line) for line in (errors.__doc__ or "").splitlines())
    return [(len(m[1]) // 4, m[2], m[3]) for m in lines if m]


def test_the_drawn_tree_names_every_class_exactly_once() -> None:
    assert sorted(name for _, name, _ in drawn()) == sorted(cls.__name__ for cls in CLASSES)


def test_the_drawn_tree_has_the_real_branches() -> None:
    path: list[str] = []
    for depth, name, builtin in drawn():
        path[depth:] = [name]
        cls = getattr(errors, name)
        if depth:
            assert cls.__bases__[0].__name__ == path[depth - 1], name
        assert [base.__name__ for base in cls.__bases__[1:]] == ([builtin] if builtin else [])


def test_every_error_is_offered_by_the_package() -> None:
    for cls in CLASSES:
        assert getattr(tg_tinker, cls.__name__) is cls


def test_every_class_has_a_code_of_its_own() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("code", [None, "special"])
@pytest.mark.parametrize("details", [None, {"row": 3, "names": ["a", "b"]}])
class TestRoundTrips:
    def test_over_the_wire(
        self, cls: type[TGTinkerError], code: str | None, details: dict[str, object] | None
    ) -> None:
        error = cls("row 3 is wrong", code, details)
        wire = pickle.loads(pickle.dumps(error.to_wire()))  # noqa: S301
        assert_same(from_wire(wire), error)
        assert wire == error.to_wire(), "reading a reply changed it"

    def test_by_pickle(
        self, cls: type[TGTinkerError], code: str | None, details: dict[str, object] | None
    ) -> None:
        error = cls("row 3 is wrong", code, details)
        assert_same(pickle.loads(pickle.dumps(error)), error)  # noqa: S301


def assert_same(one: TGTinkerError, other: TGTinkerError) -> None:
    assert type(one) is type(other)
    assert str(one) == str(other) == one.message == "row 3 is wrong"
    assert one.code == other.code
    assert one.details == other.details


def test_the_wire_holds_plain_values_and_no_traceback() -> None:
    try:
        raise IntegrityError("changed", details={"segment": 1})
    except IntegrityError as error:
        error.add_note("a local variable held this")
        wire = error.to_wire()
    assert wire == ("IntegrityError", "changed", {"segment": 1, "code": "integrity"})


def test_a_class_this_sdk_does_not_know_arrives_as_the_root_with_its_code() -> None:
    error = from_wire(("QuantumError", "from a newer actor", {"code": "quantum", "n": 1}))
    assert type(error) is TGTinkerError
    assert (error.message, error.code, error.details) == (
        "from a newer actor", "quantum", {"n": 1},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SystemExit", "ValueError", "os.system", "", "__class__"])
def test_a_forged_reply_makes_no_class_outside_the_tree(name: str) -> None:
    assert type(from_wire((name, "m", {}))) is TGTinkerError


def test_two_errors_do_not_share_their_details() -> None:
    one, other = TGTinkerError("a"), TGTinkerError("b")
    one.details["x"] = 1
    assert other.details == {}


def test_a_timeout_is_caught_as_a_builtin_timeout() -> None:
    with pytest.raises(TimeoutError, match=r"^not yet$"):
        raise FutureTimeoutError("not yet", details={"timeout_s": 3})


def test_a_wrong_value_is_caught_as_a_value_error() -> None:
    for cls in family(InvalidRequestError):
        assert issubclass(cls, ValueError)
    assert not issubclass(IntegrityError, ValueError)
