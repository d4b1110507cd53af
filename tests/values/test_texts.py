"""Tests which texts can be tokenized, stored and sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tg_tinker.config import LoRAConfig, TrainingConfig
from tg_tinker.data.hashing import resolve_batch_hash
from tg_tinker.errors import InvalidRequestError
from tg_tinker.sampling import SamplingParams, check_prompts
from tg_tinker.storage.databases import check_database
from tg_tinker.texts import check_path, check_text, check_texts

CANARY = "patient 4711"
HALF = f"{CANARY}\ud83d"
BROKEN = [HALF, "\udcff", "\ude00\ud83d", "\ud83d\ude00"]  # the last are two halves, no emoji


@pytest.mark.parametrize("text", ["", "a\n\0\ufffd\ufeff", "\U0001f600", "\ufdd0"])
def test_whole_characters_are_text(text: str) -> None:
    assert check_text(text, "it") == text


@pytest.mark.parametrize("text", BROKEN)
def test_half_a_character_is_no_text_and_is_not_repeated(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="the prompt contains a lone surro") as caught:
        check_text(text, "the prompt")
    assert CANARY not in str(caught.value)
    assert caught.value.__context__ is None  # Python's error carries the text
    assert text[caught.value.details["position"]] in "\ud83d\udcff\ude00"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (HALF, "it contains"), ([1, {"a": ("b", HALF)}], "it contains"),
        ({HALF: 1}, "a key of it contains"), ({"a": {HALF: 1}}, "a key of it contains"),
    ],
)  # fmt: skip
def test_texts_are_found_at_any_depth(value: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{named}"):
        check_texts(value, "it")
    check_texts([1, None, b"\xff", {"a": ["b"]}], "it")


@pytest.mark.parametrize("path", ["a\0b", HALF])
def test_a_path_that_no_file_has_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequestError, match="the path contains"):
        check_path(Path(path))
    for name in ("a", "\udcff"):  # Python's name for a file whose name is the byte FF
        assert check_path(Path(name)) == Path(name)


def test_every_door_of_the_values_refuses_half_a_character() -> None:
    doors: list[Any] = [
        lambda: check_prompts(HALF),
        lambda: check_prompts(["a", HALF]),
        lambda: SamplingParams(stop_sequences=("a", HALF)),
        lambda: TrainingConfig(model_ref="m", metadata={"note": [HALF]}),
        lambda: TrainingConfig(model_ref="m", metadata={HALF: 1}),
        lambda: TrainingConfig(model_ref=HALF),
        lambda: LoRAConfig(target_modules=(HALF,)),
        lambda: resolve_batch_hash([], HALF),
        lambda: check_database(f"sqlite:////{HALF}"),
    ]
    for door in doors:
        with pytest.raises(InvalidRequestError) as caught:
            door()
        assert CANARY not in str(caught.value)
    with pytest.raises(InvalidRequestError, match=r"^prompt 1 contains a lone surrogate"):
        check_prompts(["a", HALF])
