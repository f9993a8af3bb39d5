"""Words that a text must not contain, with vLLM's meaning of `bad_words`."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import numpy as np

from llama_jax.errors import RequestError
from llama_jax.sampling.token_mask import forbid


class BadWords:
    """A `Constraint` that forbids the last token of a bad word when the generated text ends with its other tokens.

    Prompt tokens do not count, nor do other tokenizations of the same letters.
    """

    ended = False
    error = None

    def __init__(self, words: Iterable[Sequence[int]]) -> None:
        """`words`: the token ids of each, at least one a word."""
        self._words = [(tuple(word[:-1]), word[-1]) for word in words]
        self._text: deque[int] = deque(maxlen=max((len(before) for before, _ in self._words), default=0))

    @classmethod
    def of(cls, words: Iterable[str], encode: Callable[[str], Sequence[int]], vocab_size: int) -> BadWords:
        """Bad words from a request.

        Args:
          encode: token ids of a text, without special tokens.

        Raises:
          RequestError: a word is not text, has no tokens, or has one outside the vocabulary.
        """
        return cls([ids for word in words for ids in _spellings(word, encode, vocab_size)])

    def mask(self, out: np.ndarray) -> None:
        text = tuple(self._text)
        for before, last in self._words:
            if text[len(text) - len(before) :] == before:
                forbid(out, last)

    def accept(self, token: int) -> None:
        self._text.append(token)

    def fork(self) -> Self:
        other = copy.copy(self)
        other._text = self._text.copy()
        return other

    def forced(self) -> Sequence[int]:
        return ()


def _spellings(word: str, encode: Callable[[str], Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Token ids of the word at the beginning of a text, and within one, after a space.

    As in vLLM, the latter counts only if it has the same number of tokens and a different first one: a space that is a
    separate token leaves the word's tokens unchanged.
    """
    if not isinstance(word, str) or not word.strip():
        raise _bad(f"bad_words must be texts of more than spaces; got {word!r}")
    alone, within = (list(encode(space + word.lstrip())) for space in ("", " "))
    spellings = [alone]
    if len(within) == len(alone) and within[:1] != alone[:1]:
        spellings.append(within)
    if not alone or not all(0 <= token < vocab_size for ids in spellings for token in ids):
        raise _bad(f"bad_words has {word!r}, which is {alone} in tokens; the model has ids from 0 to {vocab_size - 1}")
    return spellings


def _bad(message: str) -> RequestError:
    return RequestError(message, param="bad_words", hint="name words that the model can write")
