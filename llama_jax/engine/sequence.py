"""One continuation of one prompt, as the scheduler sees it."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from llama_jax.engine.prefixes import Block

Domain = tuple[tuple[str, Hashable], ...]
"""(kind, value) pairs that, besides the tokens, determine keys and values or who may share them."""

GROUP = "group"
"""Kind of the pair whose sequences share pages even without a prefix cache: copies of one request."""


class Phase(enum.Enum):
    """Phase of a sequence."""

    WAITING = enum.auto()
    """Has no row."""
    PROMPT = enum.auto()
    """Has a row, and known tokens not yet in a planned step."""
    DECODING = enum.auto()
    """Draws a token in each step."""
    COMPLETE = enum.auto()
    """Planned steps draw all tokens up to its limit; it keeps its row until it is finished."""


@dataclass(frozen=True)
class Draft:
    """Tokens to try after a text.

    Attributes:
      length: the most tokens.
      tokens: the tokens; None if the device finds them in the text itself (`lookup`).
    """

    length: int
    tokens: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tokens: tuple[int, ...]) -> Self | None:
        """A draft of these tokens; None if there are none."""
        return cls(len(tokens), tokens) if tokens else None

    def cut(self, most: int) -> Draft | None:
        """Its first tokens, at most `most`; None if that leaves none."""
        if self.tokens is not None:
            return Draft.of(self.tokens[: max(most, 0)])
        return Draft(min(self.length, most)) if most > 0 else None


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of one prompt.

    Attributes:
      id: unique among all sequences of a scheduler, including ended ones: steps in flight may still name them.
      tokens: the prompt, then drawn tokens as they become known to the host.
      prompt_length: number of prompt tokens among them.
      limit: most tokens to draw, including those in `tokens`; 0 to compute the prompt only.
      priority: lower ones run first.
      domain: sequences share pages only within one domain.
      draft: tokens for the next step to try; only if its tokens are all known, or `remembered` by the device, which
        then finds the draft itself.
      paced: whether the next token is drawn only once the host knows all before it, since the host constrains them.
      pending: whether the host has yet to decide what may come next: no step draws for it.
      streamed: whether each token is read as it comes: a dispatch then draws no more than one.
      reuse: False computes the whole prompt, as its log-probabilities need; its pages may still serve others.

    The scheduler's own:
      phase, row, pages: its current ones; row -1 and no pages while it waits.
      computed: positions whose keys and values planned steps store.
      drawn: tokens that planned steps draw, known or not; an upper bound, like `computed`, until steps with drafts have
        ended.
      remembered: whether the device has its text, including tokens that planned steps draw.
      cached: tokens found in the prefix cache when it got its row.
      preemptions: how often it lost its row; started: whether it ever had one; passed: how many overtook it while it
        did not fit.
      arrival: its turn among all that were added.
      keys: of its full blocks; blocks: those in the prefix tree that its pages hold; claims: blocks that others may
        wait for it to compute; awaited: the last block that it waits for.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    limit: int
    priority: int = 0
    domain: Domain = ()
    reuse: bool = True
    paced: bool = False
    pending: bool = False
    streamed: bool = False
    draft: Draft | None = None
    remembered: bool = False
    phase: Phase = Phase.WAITING
    row: int = -1
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    drawn: int = 0
    cached: int = 0
    preemptions: int = 0
    started: bool = False
    passed: int = 0
    arrival: int = 0
    keys: list[bytes] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    claims: list[Block] = field(default_factory=list)
    awaited: Block | None = None

    @property
    def held(self) -> bool:
        """Whether it waits for the host to learn its tokens, or to decide what may follow."""
        return self.pending or (self.paced and not self.known)

    @property
    def known(self) -> bool:
        """Whether the host knows all tokens that planned steps draw."""
        return len(self.tokens) == self.prompt_length + self.drawn
