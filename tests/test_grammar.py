"""Grammars over every kind of tokenizer: what a matcher allows is what the tokenizer's own decoder spells."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spelling import EOS, spelling_tokenizer

from llama_jax.convert import meta_tokenizer
from llama_jax.convert.gguf_tokenizer import tokenizer_files
from llama_jax.errors import RequestError
from llama_jax.sampling import Grammar, token_mask
from llama_jax.text.grammar import GrammarMatcher
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
META = DATA.parent / "meta"
KINDS = ("byte_level_gguf", "sentencepiece_gguf", "sentencepiece", "tiktoken", "spelling")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "spelling":
        return spelling_tokenizer()
    if request.param == "sentencepiece":
        (folder / "tokenizer.model").write_bytes((DATA / "sentencepiece.model").read_bytes())
        return load_tokenizer(folder)
    if request.param == "tiktoken":
        ranks = meta_tokenizer.read_ranks((META / "tokenizer.model").read_bytes(), name="tokenizer.model")
        files = meta_tokenizer.tokenizer_files(ranks, llama31=True, context=64)
    else:
        files = tokenizer_files(json.loads((DATA / f"{request.param}.json").read_text()))
    for name, content in files.items():
        (folder / name).write_text(content)
    return load_tokenizer(folder)


def bits(matcher: GrammarMatcher, vocab: int) -> set[int]:
    mask = token_mask.all_allowed(vocab)
    matcher.mask(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab]).tolist())


def eos_of(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos_token_id is not None
    return tokenizer.eos_token_id


TEXTS = {
    "json": '{"a":"b c"}',
    "spaces": "  two  words",
    "lines": "tab\tand\nnewline",
    "characters": "Grüße, 日本 👍🏽",
    "names": "<0x41></s>",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_tokens_of_a_text_are_in_its_grammar(tokenizer: Tokenizer, text: str) -> None:
    """As they stand within a text; special tokens never stand for the letters of their names."""
    eos, vocab = eos_of(tokenizer), tokenizer.vocab_size
    head = len(tokenizer.encode("a", add_special_tokens=False))
    drawn = tokenizer.encode(f"a{text}", add_special_tokens=False, parse_special=False)[head:]
    spelt = b"".join(map(tokenizer.bytes_of, drawn)).decode(errors="replace")
    if not spelt or "\ufffd" in spelt:
        pytest.skip("its vocabulary cannot spell it")
    matcher = GrammarMatcher.of(Grammar.regex(f"({re.escape(spelt)}|(?s:.){{0,90}}!)"), tokenizer, vocab, [eos])
    for token in drawn:
        allowed = bits(matcher, vocab)
        assert token in allowed
        assert not allowed & (tokenizer.special_ids - {eos})
        assert eos not in allowed
        matcher.accept(token)
        assert matcher.error is None
        assert not matcher.ended
    assert eos in bits(matcher, vocab)
    matcher.accept(eos)
    assert matcher.ended
    assert matcher.error is None


def test_what_is_allowed_first_is_what_begins_a_text(tokenizer: Tokenizer) -> None:
    """Every token, held to the bytes that it adds to a text."""
    eos, vocab = eos_of(tokenizer), tokenizer.vocab_size
    matcher = GrammarMatcher.of(Grammar.regex("[a-f0-9 ]{1,40}"), tokenizer, vocab + 70, [eos])
    expected = {
        token
        for token in set(range(vocab)) - tokenizer.special_ids
        if re.fullmatch(rb"[a-f0-9 ]{1,40}", tokenizer.bytes_of(token))
    }
    assert bits(matcher, vocab + 70) == expected
    assert expected


@given(data=st.data(), seed=st.integers(0, 99))
def test_any_walk_through_masks_spells_a_match(data: st.DataObject, seed: int) -> None:
    tokenizer = spelling_tokenizer()
    expression = r"(true|false|\{\"[ab]{0,3}\":[0-9]{1,4}\}|é{0,2})"
    matcher = GrammarMatcher.of(Grammar.regex(expression), tokenizer, 120, [EOS])
    rng, drawn = np.random.default_rng(seed), []
    while not matcher.ended:
        token = int(rng.choice(sorted(bits(matcher, 120))))
        matcher.accept(token)
        drawn += [token] if token != EOS else []
    assert re.fullmatch(expression, tokenizer.decode(drawn))


def test_a_vocabulary_without_an_end(tokenizer: Tokenizer) -> None:
    """A text that may end and may go on goes on; it ends where it must."""
    vocab = tokenizer.vocab_size
    a = next(token for token in range(vocab) if tokenizer.bytes_of(token) == b"a")
    matcher = GrammarMatcher.of(Grammar.regex("a{0,2}"), tokenizer, vocab)
    for _ in range(2):
        assert bits(matcher, vocab) <= {t for t in range(vocab) if tokenizer.bytes_of(t) in (b"a", b"aa")}
        assert not matcher.ended
        matcher.accept(a)
    assert matcher.ended


def test_a_model_with_fewer_rows_than_tokens(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.vocab_size - 3
    matcher = GrammarMatcher.of(Grammar.regex("(?s:.){1,9}"), tokenizer, vocab, [eos_of(tokenizer)])
    mask = token_mask.all_allowed(vocab)
    matcher.mask(mask)
    assert len(mask) == -(-vocab // 32)


def test_matchers_of_one_grammar_are_apart() -> None:
    tokenizer, grammar = spelling_tokenizer(), Grammar.regex("(ab|cd)x")
    first, second = (GrammarMatcher.of(grammar, tokenizer, 120, [EOS]) for _ in range(2))
    c = tokenizer.token_id("c")
    assert c is not None
    before = bits(second, 120)
    first.accept(c)
    assert bits(second, 120) == before != bits(first, 120)


def test_a_token_against_the_grammar_is_an_error() -> None:
    matcher = GrammarMatcher.of(Grammar.regex("ab*"), spelling_tokenizer(), 120, [EOS])
    matcher.accept(EOS)
    assert matcher.error
    assert not matcher.ended


def test_without_white_space_between_the_parts() -> None:
    tokenizer = spelling_tokenizer()
    space, newline = tokenizer.token_id("Ġ"), tokenizer.token_id("Ċ")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    matcher = GrammarMatcher.of(Grammar.json_schema(schema), tokenizer, 120, [EOS])
    for token in tokenizer.encode('{"a":1'):
        assert not bits(matcher, 120) & {space, newline}
        matcher.accept(token)
    assert not bits(matcher, 120) & {space, newline}


@pytest.mark.parametrize("grammar", [Grammar.regex("[" * 50), Grammar.json_schema('{"$ref":"#/nowhere"}')])
def test_messages_are_one_line(grammar: Grammar) -> None:
    with pytest.raises(RequestError) as caught:
        GrammarMatcher.of(grammar, spelling_tokenizer(), 120)
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"the {grammar.kind.replace('_', ' ')} cannot be used: ")
