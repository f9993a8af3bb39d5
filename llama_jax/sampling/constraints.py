"""The protocol of token-by-token constraints on the host: grammars, bad words, other packages' rules."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The tokens that may come next in one text, given what has been generated of it."""

    def mask(self, out: np.ndarray) -> None:
        """Clears the bits of forbidden next tokens in `out`, a mask of `sampling.token_mask`; sets none.

        Other constraints may have cleared bits before.
        """

    def accept(self, token: int) -> None:
        """Takes note of the token that was drawn."""

    @property
    def ended(self) -> bool:
        """Whether nothing may follow: the text ends."""

    @property
    def error(self) -> str | None:
        """Why the constraint cannot go on, for people; None as long as it can."""
