"""Speculative decoding: likely next tokens, guessed from the text itself or by a smaller model.

A draft never changes the result: the model computes all of it in one step, each token is drawn as it would be without
the draft, and the draft is kept as far as it equals the draws. Drafts come from a `Source`; `draft_model` is another.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol

from llama_jax.engine.lookup import LENGTHS
from llama_jax.engine.sequence import Sequence

PAUSE = 32
"""Tokens without drafts after drafts gained nothing; doubles each consecutive time."""

LEAST = 0.25
"""Tokens that a draft must gain beyond its cost, averaged over recent steps."""

NEWS = 0.1
"""Weight of a step's gain in that average. At 0.25, chance would often end drafts that gain a third."""

RECENT = 0.8
"""Weight of the past, against a text's next draft, in the estimate of how often its drafts are right."""


@dataclass(frozen=True)
class Cost:
    """Cost of drafts, in model steps that draw one token per row.

    Attributes:
      token: per token tried. On an H200 a step of 8 rows of Llama-3.1-8B takes 6 % longer than one of one row.
      step: extra cost per step with drafts.
    """

    token: float = 0.01
    step: float = 0.0

    def of(self, length: int) -> float:
        """Cost of a draft of that length."""
        return self.step + self.token * length


class Pace:
    """Adapts a text's draft length, and pauses drafts that gain nothing.

    Attributes:
      cost: of its drafts.
      length: most tokens of the next draft.
      gain: tokens that a step gains by a draft, less its cost, averaged over recent steps.
    """

    def __init__(self, most: int, cost: Cost | None = None):
        """Args: the most tokens of a draft, and their cost."""
        self._most = self.length = most
        self.cost = cost or Cost()
        self.gain = 1.0
        self._right, self._tried = 3.0, 4.0
        self._resumes = 0
        self._pause = PAUSE

    def active(self, count: int) -> bool:
        """Whether to draft after a text of `count` tokens."""
        return count >= self._resumes

    def drawn(self, drafted: int, count: int, text: int) -> None:
        """Records a step that tried `drafted` tokens and drew `count`; the text now has `text` tokens."""
        kept = count - 1
        if drafted:
            self._right = RECENT * self._right + kept
            self._tried = RECENT * self._tried + min(kept + 1, drafted)
            # One more token is worth its cost while it is likely that it and all before it are drawn.
            right, self.length = self._right / self._tried, 1
            while self.length < self._most and right ** (self.length + 1) > self.cost.token:
                self.length += 1
        self._note(kept - self.cost.of(drafted), text)

    def nothing(self, text: int) -> None:
        """Records that there was nothing to propose after a text of `text` tokens."""
        self._note(0, text)

    def _note(self, gained: float, text: int) -> None:
        self.gain += NEWS * (gained - self.gain)
        if gained > 0:
            self._pause = PAUSE
        if self.gain < LEAST:
            self._resumes, self.gain, self._pause = text + self._pause, 1.0, 2 * self._pause


def worthwhile(paces: ListOf[Pace], others: int) -> bool:
    """Whether a step with drafts gains more than one without.

    Args:
      paces: of rows that have a draft; others: number of rows without one, which draw one token in either step.
    """
    return sum(pace.gain for pace in paces) > others * max((pace.cost.of(pace.length) for pace in paces), default=0.0)


@dataclass(frozen=True)
class Wanted:
    """A sequence, all of whose tokens are known, that wants a draft; `most`: room for draft tokens, at least 1."""

    sequence: Sequence
    pace: Pace
    most: int


class Source(Protocol):
    """Source of an engine's drafts.

    Attributes:
      on_device: whether the device can find them by itself (`lookup`): then the host only tells it whether to look,
        and proposes tokens only for sequences that it constrains.
    """

    on_device: bool

    def ready(self) -> None:
        """Allocates its memory; called once every program is compiled."""
        ...

    def begin(self) -> Pace:
        """Returns the pace of a new sequence."""
        ...

    def propose(self, wanted: ListOf[Wanted]) -> list[tuple[int, ...]]:
        """Proposes a draft for each, possibly none. A sequence's tokens extend those of the last call."""
        ...

    def ended(self, number: int) -> None:
        """Notifies that a sequence has ended."""
        ...


class NGrams:
    """Drafts from the text itself, with one `Drafter` per sequence."""

    on_device = True

    def __init__(self, most: int):
        """Args: the most tokens of a draft."""
        self._most = most

    def ready(self) -> None:
        """See `Source`."""

    def begin(self) -> Pace:
        """See `Source`."""
        return Drafter(self._most)

    def propose(self, wanted: ListOf[Wanted]) -> list[tuple[int, ...]]:
        """See `Source`."""
        drafts = []
        for each in wanted:
            assert isinstance(each.pace, Drafter)
            drafts.append(each.pace.propose(each.sequence.tokens, each.most))
        return drafts

    def ended(self, number: int) -> None:
        """See `Source`."""


class Drafter(Pace):
    """Drafts for one sequence from its earlier tokens: an incremental `lookup.find` on the host."""

    def __init__(self, most: int):
        """Makes a drafter of at most `most` tokens at a time."""
        super().__init__(most)
        self._behind: dict[tuple[int, ...], int] = {}  # last position of the tokens that followed each n-gram
        self._seen = 0

    def propose(self, tokens: ListOf[int], most: int) -> tuple[int, ...]:
        """Proposes at most `most` tokens to follow a text, often none. The text extends that of the last call."""
        found = self.find(tokens, min(self.length, most))
        if not found:
            self.nothing(len(tokens))
        return found

    def find(self, tokens: ListOf[int], most: int) -> tuple[int, ...]:
        """The same, regardless of the pace."""
        # The last tokens themselves are not recorded until another token follows.
        for end in range(max(self._seen, 1), len(tokens)):
            for length in LENGTHS:
                if length <= end:
                    self._behind[tuple(tokens[end - length : end])] = end
        self._seen = len(tokens)
        for length in LENGTHS:
            at = self._behind.get(tuple(tokens[-length:])) if length <= len(tokens) else None
            if at is not None:
                return tuple(tokens[at : at + most])
        return ()
