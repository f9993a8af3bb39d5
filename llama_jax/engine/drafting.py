"""Drafts: tokens that are likely to come next, guessed from the text itself or by a smaller model.

A draft decides nothing: the model computes all of it in one step, each token is drawn as without it, and the draft is
kept as far as it equals the draws. Where drafts come from is a `Source`; `draft_model` is another one.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol

from llama_jax.engine.lookup import LENGTHS
from llama_jax.engine.sequence import Sequence

PAUSE = 32
"""Tokens for which a text whose drafts gain nothing is left alone; each time in a row twice as many."""

LEAST = 0.25
"""Tokens that a draft has to gain beyond its cost in the mean of the last steps."""

NEWS = 0.1
"""Weight of a step's gain in their mean. Were it 0.25, chance would often end drafts that gain a third."""

RECENT = 0.8
"""Weight of what is known about a text's drafts, beside its next one, in how often they are right."""


@dataclass(frozen=True)
class Cost:
    """Cost of drafts, in steps of the model that draw one token of each row.

    Attributes:
      token: of each token that is tried. On an H200 a step of 8 rows of Llama-3.1-8B takes 6 % longer than one of one.
      step: of a step with drafts, besides.
    """

    token: float = 0.01
    step: float = 0.0

    def of(self, length: int) -> float:
        """Cost of a draft of that length."""
        return self.step + self.token * length


class Pace:
    """How many tokens to try behind a text, as long as drafts gain something there.

    Attributes:
      cost: of its drafts.
      length: tokens of the next draft, at most.
      gain: tokens that a step gains by a draft, less its cost, in the mean of the last steps.
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
        """Whether to draft behind a text of `count` tokens."""
        return count >= self._resumes

    def drawn(self, drafted: int, count: int, text: int) -> None:
        """Takes note of a step that drew `count` tokens where `drafted` were tried; the text has `text` tokens now."""
        kept = count - 1
        if drafted:
            self._right = RECENT * self._right + kept
            self._tried = RECENT * self._tried + min(kept + 1, drafted)
            # One token more is worth its cost as long as it is likely that it comes, and all before it.
            right, self.length = self._right / self._tried, 1
            while self.length < self._most and right ** (self.length + 1) > self.cost.token:
                self.length += 1
        self._note(kept - self.cost.of(drafted), text)

    def nothing(self, text: int) -> None:
        """Takes note that there was nothing to propose behind a text of `text` tokens."""
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
      paces: of rows that have a draft; others: rows without, which draw one token in either step.
    """
    return sum(pace.gain for pace in paces) > others * max((pace.cost.of(pace.length) for pace in paces), default=0.0)


@dataclass(frozen=True)
class Wanted:
    """A sequence that a draft is wanted for, all of whose tokens are known; `most`: tokens of it that there is room
    for, at least 1."""

    sequence: Sequence
    pace: Pace
    most: int


class Source(Protocol):
    """Where the drafts of an engine come from.

    Attributes:
      on_device: whether the device can find them by itself (`lookup`): then the host only says whether it is to look,
        and proposes tokens where it has a say in them.
    """

    on_device: bool

    def ready(self) -> None:
        """Takes the memory that it needs; every program is compiled."""
        ...

    def begin(self) -> Pace:
        """Paces a new sequence."""
        ...

    def propose(self, wanted: ListOf[Wanted]) -> list[tuple[int, ...]]:
        """A draft for each, possibly none. The tokens of a sequence are those of the last call, continued."""
        ...

    def ended(self, number: int) -> None:
        """Tells that a sequence has ended."""
        ...


class NGrams:
    """Drafts out of the text itself, one `Drafter` for each sequence."""

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
    """Drafts for one sequence out of what it has had before: `lookup.find` on the host, from call to call."""

    def __init__(self, most: int):
        """A drafter of at most `most` tokens at a time."""
        super().__init__(most)
        self._behind: dict[tuple[int, ...], int] = {}  # where the tokens are that followed these, the last time
        self._seen = 0

    def propose(self, tokens: ListOf[int], most: int) -> tuple[int, ...]:
        """Proposes at most `most` tokens to follow a text, often none. The text is that of the last call, continued."""
        found = self.find(tokens, min(self.length, most))
        if not found:
            self.nothing(len(tokens))
        return found

    def find(self, tokens: ListOf[int], most: int) -> tuple[int, ...]:
        """The same, however many tokens have been worth it so far."""
        # The last tokens themselves are left out until another one follows.
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
