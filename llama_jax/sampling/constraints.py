"""The protocol of token-by-token constraints on the host: grammars, bad words, other packages' rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from llama_jax.plugins import Plugin
    from llama_jax.sampling.params import SamplingParams


class Constraint(Protocol):
    """The tokens that may come next in one text, given its generated tokens."""

    def mask(self, out: np.ndarray) -> None:
        """Clears the bits of forbidden next tokens in `out`, a mask of `sampling.token_mask`; sets none.

        Other constraints may already have cleared bits.
        """

    def accept(self, token: int) -> None:
        """Records the token that was drawn."""

    @property
    def ended(self) -> bool:
        """Whether nothing may follow: the text ends."""

    @property
    def error(self) -> str | None:
        """The reason, for people, why the constraint cannot continue; None while it can."""


@runtime_checkable
class Forkable(Constraint, Protocol):
    """A constraint that can look ahead. If all of a text's constraints can, drafts are tried under them."""

    def fork(self) -> Self:
        """An independent constraint in the same state."""

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, as far as known; a hint, which `mask` need not confirm."""


class LogitsProcessor(Protocol):
    """An object of the group `llama_jax.logits_processors`: it makes the constraint of one continuation."""

    def __call__(self, tokenizer: Any, prompt: Sequence[int], params: SamplingParams) -> Constraint:
        """A constraint at the start of a continuation, for it alone.

        Args:
          tokenizer: the model's `llama_jax.text.tokenizer.Tokenizer`, or None if it has none.
          prompt: its token ids.

        Raises:
          RequestError: it cannot serve the request.
        """


def plugin_problem(plugin: Plugin, earlier: Sequence[Plugin]) -> str:
    """The problem with a plugin of the group; "" if none."""
    if not callable(plugin.value):
        return f"it is {type(plugin.value).__name__}, and not a function that makes a constraint"
    if any(plugin.name == other.name for other in earlier):
        return f"the logits processor {plugin.name!r} exists already"
    return ""
