"""Bad words against the rule itself, spelled out over whole texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import RequestError
from llama_jax.model.loaded import Model
from llama_jax.sampling import BadWords, Constraint, token_mask
from llama_jax.text.tokenizer import Tokenizer

VOCAB = 40
WORDS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=4)


def bits(constraint: Constraint, vocab: int = VOCAB) -> np.ndarray:
    """bool [vocab], what may come next."""
    mask = token_mask.all_allowed(vocab)
    constraint.mask(mask)
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab].astype(bool)


@given(words=WORDS, text=st.lists(st.integers(0, 3), max_size=12))
def test_no_text_ever_holds_a_bad_word(words: list[list[int]], text: list[int]) -> None:
    """A next token is forbidden exactly where the text would end with a word."""
    constraint = BadWords(words)
    for n in range(len(text) + 1):
        want = [not any([*text[:n], t][-len(w) :] == w for w in words) for t in range(VOCAB)]
        assert bits(constraint).tolist() == want
        assert not constraint.ended
        assert constraint.error is None
        if n < len(text):
            constraint.accept(text[n])


@given(st.sets(st.integers(0, VOCAB - 1)), st.sets(st.integers(0, VOCAB - 1)))
def test_masks_only_narrow(allowed: set[int], words: set[int]) -> None:
    mask = token_mask.only(allowed, VOCAB)
    BadWords([[w] for w in words]).mask(mask)
    assert mask.tolist() == token_mask.only(allowed - words, VOCAB).tolist()


def encode_as(table: dict[str, list[int]]) -> Callable[[str], list[int]]:
    return table.__getitem__


@pytest.mark.parametrize(
    ("table", "text", "barred"),
    [
        ({"ab": [1], " ab": [2]}, [], {1, 2}),  # two tokens for one word
        ({"ab": [1, 2], " ab": [3, 2]}, [3], {2}),
        ({"ab": [1, 2], " ab": [3, 2]}, [1], {2}),
        ({"ab": [1, 2], " ab": [3, 2]}, [2], set()),
        ({"ab": [1, 2], " ab": [3]}, [], set()),  # vLLM leaves out what has another number of tokens,
        ({"ab": [1], " ab": [9, 1]}, [], {1}),  # which is no loss where the space is a token of its own
        ({"ab": [1], " ab": [1]}, [], {1}),
    ],
)
def test_words_at_the_beginning_and_behind_a_space(table: dict[str, Any], text: list[int], barred: set[int]) -> None:
    constraint = BadWords.of([" ab"], encode_as(table), VOCAB)
    for token in text:
        constraint.accept(token)
    assert set(np.flatnonzero(~bits(constraint)).tolist()) == barred


@pytest.mark.slow
def test_words_of_a_tokenizer(smollm2: tuple[Model, Tokenizer]) -> None:
    """At the beginning and behind a space, whatever the tokenizer cuts the word into."""
    model, tokenizer = smollm2
    vocab, encode = model.config.vocab_size, partial(tokenizer.encode, add_special_tokens=False)
    for word in ("hello", "unlikeliness", "é", "two words"):
        for text in (word, f" {word}"):
            constraint = BadWords.of([word], encode, vocab)
            *before, last = encode(text)
            for token in before:
                assert bits(constraint, vocab)[token]
                constraint.accept(token)
            if len(before) + 1 == len(encode(word)):
                assert not bits(constraint, vocab)[last], text


@pytest.mark.parametrize("word", ["", "  ", 5, None, b"ab"])
def test_what_is_no_word(word: Any) -> None:
    with pytest.raises(RequestError, match="bad_words") as caught:
        BadWords.of([word], lambda text: [1], VOCAB)
    assert caught.value.param == "bad_words"
    assert caught.value.hint


@pytest.mark.parametrize("ids", [[], [VOCAB], [1, -1]])
def test_words_that_the_model_cannot_write(ids: list[int]) -> None:
    with pytest.raises(RequestError, match="'ab'") as caught:
        BadWords.of(["ab"], lambda text: ids, VOCAB)
    assert caught.value.param == "bad_words"
