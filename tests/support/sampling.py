"""Defines requests to the sampling engine, and what they got."""

from __future__ import annotations

from collections.abc import Sequence

from actors.engine.model import Base
from actors.sampling.engine import SlotEngine
from actors.sampling.requests import Token, TokenRequest
from tg_tinker.sampling import SamplingParams


class Reader:
    """A request and the tokens that it got."""

    def __init__(self, prompt: list[int], params: SamplingParams) -> None:
        self.tokens: list[Token] = []
        self.request = TokenRequest(prompt, params, self.tokens.append)

    def ids(self, index: int = 0) -> list[int]:
        return [token.token_id for token in self.tokens if token.index == index]

    @property
    def ends(self) -> list[str | None]:
        return [t.finish_reason for t in self.tokens if t.finish_reason]


def finish(engine: SlotEngine) -> int:
    steps = 0
    while engine.step():
        steps += 1
    return steps


def alone(base: Base, prompt: list[int], params: SamplingParams) -> Reader:
    reader, engine = Reader(prompt, params), SlotEngine(base)
    engine.submit(reader.request)
    finish(engine)
    return reader


def cut(text: str, stops: Sequence[str]) -> str:
    """Cuts by the obvious rule, a character at a time: the text ends where a stop is first
    complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text
