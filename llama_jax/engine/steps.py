"""Steps that the scheduler orders from the device: one dispatch as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_jax.engine.sequence import Draft, Sequence


@dataclass(frozen=True)
class Joining:
    """A sequence gets a row.

    Attributes:
      shared: tokens whose keys and values already exist, a multiple of the page size and fewer than it has.
    """

    row: int
    sequence: Sequence
    shared: int


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. start + count of `sequence.tokens`.

    Attributes:
      draws: whether the next token is drawn after the last of them.
    """

    sequence: Sequence
    row: int
    start: int
    count: int
    draws: bool


@dataclass(frozen=True)
class Step:
    """One dispatch. With chunks it is a mixed step, in which a decoding row has one token; without them, a decode step.

    Attributes:
      number: 1, 2, ...
      joining: sequences that get a row. Rows whose sequence has ended or left are not emptied before: no step computes
        them.
      pages: (row, index in the row, page), written into the page table before the step, including those of joining rows
        and shared ones. A row that does not join has at most ceil(steps / page_size) entries.
      chunks: parts of prompts; chunks may read what another chunk of the same step stores.
      decoding: sequences whose rows compute the token they drew last, which the host may not know yet, and draw the
        next.
      steps: how often they do so; a row that reaches its limit ends earlier.
      drafts: of decoding sequences. In a step with any, each row computes its draft after the last drawn token, and
        draws one token more than it accepts of the draft, in one pass. A row has at most one entry in `pages`.
      remember: sequences with fully known texts, which are sent to the device before the step.
    """

    number: int
    joining: tuple[Joining, ...]
    pages: tuple[tuple[int, int, int], ...]
    chunks: tuple[Chunk, ...]
    decoding: tuple[Sequence, ...]
    steps: int
    drafts: Mapping[Sequence, Draft] = field(default_factory=dict)
    remember: tuple[Sequence, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of one of its steps."""
        drafted = sum(draft.length for draft in self.drafts.values())
        return sum(chunk.count for chunk in self.chunks) + len(self.decoding) + drafted
