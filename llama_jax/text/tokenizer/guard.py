"""Protection of text that must never become a control token.

A tokenizer matches its control tokens ("<|im_end|>") anywhere in a text, no matter who wrote it. To encode such a
string as plain text, a sentinel character is inserted, so that it no longer matches. The tokenizer's first normaliser
removes the sentinel again; control tokens are matched before normalisation, so the rest is encoded as ordinary text,
with the same merges across its edges as any other text.

The sentinel is U+FDD0, one of the 66 code points that Unicode reserves for internal use by programs (Unicode 17,
section 23.7). A sentinel in the text itself is escaped with U+FDD1; the same normaliser undoes that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from llama_jax.errors import TokenizerError

SENTINEL = "\ufdd0"
_ESCAPE = "\ufdd1"
RESTORED = ((SENTINEL, ""), (_ESCAPE + "0", SENTINEL), (_ESCAPE + "1", _ESCAPE))
"""Replacements, in order, that turn guarded text into plain text."""


def escape(text: str) -> str:
    """Escape sentinels in the text itself; the result contains none."""
    return text.replace(_ESCAPE, _ESCAPE + "1").replace(SENTINEL, _ESCAPE + "0")


def strip_sentinels(text: str) -> str:
    """The text as its author wrote it: sentinels removed, escaped ones restored."""
    for old, new in RESTORED:
        text = text.replace(old, new)
    return text


def _alternation(strings: Iterable[str]) -> str:
    """A pattern that prefers the longest of several strings, as the tokenizer does."""
    return "|".join(re.escape(s) for s in sorted(strings, key=len, reverse=True))


@dataclass(frozen=True)
class ControlGuard:
    """Breaks up control tokens in text that must not contain any.

    Attributes:
      controls: the control tokens' strings.
      others: added tokens that are not control tokens ("<think>"), which are left whole.
    """

    controls: frozenset[str]
    others: frozenset[str] = frozenset()

    @cached_property
    def _matcher(self) -> re.Pattern[str]:
        return re.compile(_alternation(self.controls | self.others) or "(?!)")

    @cached_property
    def _breaks(self) -> re.Pattern[str]:
        """Pattern that matches (empty) inside the first two and the last two characters of any control token.

        Breaking fragments, not only whole tokens, prevents two strings that a template joins from forming a token: of
        two pieces of a token of three or more characters, one contains its first two or its last two.
        """
        followers: dict[str, set[str]] = {}
        for token in self.controls:
            for pair in (token[:2], token[-2:]):
                if len(pair) == 2:
                    followers.setdefault(pair[0], set()).add(pair[1])
        pairs = [
            f"(?<={re.escape(a)})(?=[{''.join(map(re.escape, sorted(bs)))}])" for a, bs in sorted(followers.items())
        ]
        whole = f"({_alternation(self.others)})" if self.others else "((?!))"
        return re.compile("|".join([whole, *pairs]))

    def protect(self, text: str) -> str:
        """The same text, such that it contains no control token and none can form at its edges.

        `strip_sentinels(protect(text)) == text`.

        Raises:
          TokenizerError: the text contains a control token of a single character, which cannot be broken up.
        """
        for token in self.controls:
            if len(token) == 1 and token in text:
                raise TokenizerError(
                    f"the text holds {token!r}, which is a control token by itself", hint="take it out of the text"
                )
        text = self._breaks.sub(lambda match: match[1] or SENTINEL, escape(text))
        # A single character of a token at either end, where a template may join it to the rest. Templates strip white
        # space, so the ends are those of the stripped text.
        head = text.lstrip()
        if head and head[0] in self._last_characters:
            text = text[: len(text) - len(head)] + SENTINEL + head
        tail = text.rstrip()
        if tail and tail[-1] in self._first_characters:
            text = tail + SENTINEL + text[len(tail) :]
        return text

    @cached_property
    def _first_characters(self) -> frozenset[str]:
        return frozenset(token[0] for token in self.controls)

    @cached_property
    def _last_characters(self) -> frozenset[str]:
        return frozenset(token[-1] for token in self.controls)

    def count(self, text: str) -> int:
        """Number of control tokens that the tokenizer will find in a text."""
        return sum(match[0] in self.controls for match in self._matcher.finditer(text))
