"""Drafts: tokens that are likely to come next, guessed from the text itself.

"Prompt lookup decoding" (https://github.com/apoorvumang/prompt-lookup-decoding): where the last tokens have occurred
before, what followed them then is likely to follow now. A draft costs no second model, and decides nothing: the model
computes all of it in one step, each token is drawn as without it, and the draft is kept as far as it equals the draws.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (4, 3, 2)
"""Tokens that have to occur again, the most first."""

PAUSE = 32
"""Tokens for which a text that repeats nothing is left alone; each time in a row twice as many."""

LEAST = 0.25
"""Tokens that a draft has to gain in the mean of the last few steps: a step with drafts waits for the host."""


class Drafter:
    """Drafts for one sequence, as long as they gain something."""

    def __init__(self, most: int):
        """A drafter of at most `most` tokens at a time."""
        self._most = self._length = most
        self._behind: dict[tuple[int, ...], int] = {}  # where the tokens are that followed these, the last time
        self._seen = 0
        self._gain = 1.0
        self._resumes = 0
        self._pause = PAUSE

    def active(self, count: int) -> bool:
        """Whether to draft behind a text of `count` tokens."""
        return count >= self._resumes

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Proposes at most `most` tokens to follow a text, often none. The text is that of the last call, continued."""
        # The last tokens themselves are left out until another one follows.
        for end in range(max(self._seen, 1), len(tokens)):
            for length in LENGTHS:
                if length <= end:
                    self._behind[tuple(tokens[end - length : end])] = end
        self._seen = len(tokens)
        for length in LENGTHS:
            at = self._behind.get(tuple(tokens[-length:])) if length <= len(tokens) else None
            if at is not None:
                return tuple(tokens[at : at + min(self._length, most)])
        self._note(0, len(tokens))
        return ()

    def drawn(self, draft: Sequence[int], count: int, text: int) -> None:
        """Takes note of a step that drew `count` tokens where `draft` was proposed; the text has `text` tokens now."""
        kept = count - 1
        self._length = min(self._most, self._length + 2) if kept >= len(draft) else max(1, kept + 1)
        self._note(kept, text)

    def _note(self, gained: int, text: int) -> None:
        self._gain += 0.25 * (gained - self._gain)
        if gained:
            self._pause = PAUSE
        if self._gain < LEAST:
            self._resumes, self._gain, self._pause = text + self._pause, 1.0, 2 * self._pause
