from __future__ import annotations

from dataclasses import dataclass

from llama_jax.engine.sequence import Sequence


@dataclass(frozen=True)
class Joining:
    row: int
    sequence: Sequence
    shared: int


@dataclass(frozen=True)
class Chunk:
    sequence: Sequence
    row: int
    start: int
    count: int
    draws: bool


@dataclass(frozen=True)
class Step:
    number: int
    leaving: tuple
    joining: tuple
    pages: tuple
    chunks: tuple
    decoding: tuple
    steps: int
