"""The text of a row as its tokens arrive: stop strings, what is held back, and when the row has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.batch_file.own import _logprob
from llama_jax.convert.gguf_tokenizer import tokenizer_files
from llama_jax.engine.core import Drawn
from llama_jax.generation.answer import Answer
from llama_jax.generation.openai_shapes import CompletionLogprobs, chat_logprobs
from llama_jax.generation.outputs import RowText, TokenLogprob
from llama_jax.sampling import Logprobs, SamplingParams
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

METADATA = Path(__file__).parent / "data" / "tokenizer" / "byte_level_gguf.json"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer_files(json.loads(METADATA.read_text())).items():
        (folder / name).write_text(content)
    return load_tokenizer(folder)


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte: characters of several bytes span tokens."""
    ids = [i for char in text for i in tokenizer.encode(char, add_special_tokens=False)]
    assert tokenizer.decode(ids) == text
    return ids


def feed(
    tokenizer: Tokenizer | None, ids: list[int], *, limit: int = 10_000, stop_ids: Any = (), **fields: Any
) -> tuple[RowText, list[str]]:
    """The row after the tokens, up to its end, and the pieces of text in the order in which they became certain."""
    row = RowText(tokenizer, SamplingParams(max_tokens=None, **fields), frozenset(stop_ids))
    pieces = []
    for token in ids:
        pieces.append(row.add(token, limit=limit))
        if row.finish_reason:
            break
    return row, pieces


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("hello world", ["wor"], "hello "),
        ("hello world", ["hello"], ""),  # the very first token
        ("hello world", ["h"], ""),
        ("hello world", ["lo w", "world"], "hel"),  # spans tokens
        ("hello world", ["d"], "hello worl"),  # the very last token
        ("aaab", ["aab"], "a"),  # overlaps with itself
        ("ababac", ["abac"], "ab"),
        ("a\n\nb", ["\n\n"], "a"),
        ("日本語", ["本"], "日"),  # of three bytes each
        ("x👍🏽y", ["🏽"], "x👍"),
        ("x👍🏽y", ["👍🏽y"], "x"),
        ("abcd", ["bcd", "c"], "ab"),  # the one that is complete first ends the text
        ("STOP STOPPED", ["STOPPED"], "STOP "),
        ("a b", [" ", "a "], ""),  # complete with the same token: the earlier one
    ],
)
def test_stop_strings(tokenizer: Tokenizer, text: str, stop: list[str], want: str) -> None:
    row, pieces = feed(tokenizer, byte_ids(tokenizer, text), stop=stop)
    assert (row.text, row.finish_reason) == (want, "stop")
    assert "".join(pieces) == want


@pytest.mark.parametrize(
    ("stop", "shown"), [("worldly", "hello "), ("dx", "hello worl"), ("lo worldX", "hel"), ("hello world!", "")]
)
def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer, stop: str, shown: str) -> None:
    ids = byte_ids(tokenizer, "hello world")
    row, pieces = feed(tokenizer, ids, limit=len(ids), stop=[stop])
    assert (row.text, row.finish_reason) == ("hello world", "length")
    assert "".join(pieces) == row.text
    held, _ = feed(tokenizer, ids, stop=[stop])
    assert held.text == shown
    ended, _ = feed(tokenizer, [*ids, 2], stop=[stop], stop_ids=[2])
    assert (ended.text, ended.finish_reason) == ("hello world", "stop")


def test_pieces_come_as_soon_as_they_are_certain(tokenizer: Tokenizer) -> None:
    _, pieces = feed(tokenizer, byte_ids(tokenizer, "abcabd"), stop=["abd"])
    assert pieces == ["", "", "abc", "", "", ""]
    _, pieces = feed(tokenizer, byte_ids(tokenizer, "é日"))
    assert "".join(pieces) == "é日"
    assert [p for p in pieces if p] == ["é", "日"]


def test_stop_id_is_kept_in_the_ids_and_has_no_text(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "abc")
    row, _ = feed(tokenizer, ids, stop_ids=[ids[1]])
    assert (row.token_ids, row.text, row.finish_reason) == (ids[:2], "a", "stop")


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "a👍")
    assert len(ids) > 3
    row, _ = feed(tokenizer, ids, limit=len(ids) - 1)
    assert (row.text, row.finish_reason) == ("a\ufffd", "length")
    row, pieces = feed(tokenizer, [*ids[:-1], 2], stop_ids=[2])
    assert (row.text, "".join(pieces)) == ("a\ufffd", "a\ufffd")


@pytest.mark.parametrize(
    ("min_tokens", "want"), [(0, "x"), (1, "x"), (2, "xabx"), (3, "xabx"), (4, "xabx"), (5, "xabxabx")]
)
def test_no_stop_string_before_min_tokens(tokenizer: Tokenizer, min_tokens: int, want: str) -> None:
    """A stop string counts once it is complete after min_tokens tokens; one that was passed is not looked for again."""
    row, _ = feed(
        tokenizer, byte_ids(tokenizer, "xabxabxabx"), stop=["ab"], min_tokens=min_tokens + 1 if min_tokens else 0
    )
    assert row.text == want


def test_no_stop_id_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "aaaa")
    row, _ = feed(tokenizer, ids, stop_ids=[ids[0]], min_tokens=3)
    assert len(row.token_ids) == 3
    assert row.finish_reason == "stop"


def test_without_a_tokenizer_there_are_ids_only() -> None:
    row, pieces = feed(None, [5, 6, 7, 8], limit=3)
    assert (row.token_ids, row.text, row.finish_reason) == ([5, 6, 7], "", "length")
    assert pieces == ["", "", ""]
    row, _ = feed(None, [5, 6, 7, 8], stop_ids=[6])
    assert (row.token_ids, row.finish_reason) == ([5, 6], "stop")


@given(
    text=st.text(st.sampled_from("ab\n é日👍"), max_size=40),
    stop=st.lists(st.text(st.sampled_from("ab\n é日👍"), min_size=1, max_size=5), max_size=3),
    whole=st.booleans(),
)
def test_any_stop_strings(tokenizer: Tokenizer, text: str, stop: list[str], whole: bool) -> None:
    """Nothing of a stop string leaks, nothing else is lost, however the text falls into tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False) if whole else byte_ids(tokenizer, text)
    row, pieces = feed(tokenizer, ids, limit=max(len(ids), 1), stop=stop)
    assert "".join(pieces) == row.text
    assert not any(s in row.text for s in stop)
    # The text up to the first token that completes a stop string, cut where the earliest stop string starts.
    stream = tokenizer.detokenizer()
    seen = ""
    for count, token in enumerate(ids, 1):
        seen += stream.add(token)
        if starts := [seen.find(s) for s in stop if s in seen]:
            assert (row.text, row.finish_reason, len(row.token_ids)) == (seen[: min(starts)], "stop", count)
            return
    assert row.text == text
    assert row.finish_reason == ("length" if ids else None)


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer: Tokenizer) -> None:
    """The vocabulary of some models is padded: their tokenizer does not know the last ids."""
    ids = byte_ids(tokenizer, "ab")
    row, _ = feed(tokenizer, [ids[0], tokenizer.vocab_size, ids[1]], limit=3)
    assert row.text == "ab"
    assert row.token_ids[1] == tokenizer.vocab_size


def test_an_end_without_a_token_repeats_none() -> None:
    found = Logprobs(np.zeros(1), np.full((1, 1), 7), np.zeros((1, 1)))
    answer = Answer(None, [1, 2], SamplingParams(max_tokens=4, logprobs=1), 4, ())
    answer.take(0, Drawn(0, (7,), found))
    step = answer.stream_output("", 1)
    assert (step.token, step.logprobs and step.logprobs.token_id, len(step.new_logprobs)) == (7, 7, 1)
    answer.take(0, Drawn(0, (), ending="failed", error="its logits were not finite"))
    last = answer.stream_output("", 0)
    assert (last.token, last.logprobs, last.new_logprobs) == (-1, None, ())
    assert (last.finish_reason, last.generation_tokens) == ("error", 1)


def test_scores_that_json_lacks(tokenizer: Tokenizer) -> None:
    """Those of a damaged model."""
    entry = TokenLogprob(40, float("nan"), {40: float("nan"), 41: float("-inf"), 42: -0.5})
    assert _logprob(entry) == {"token_id": 40, "logprob": None, "top": {"40": None, "41": None, "42": -0.5}}
    (of,) = chat_logprobs(tokenizer, [entry], 3)["content"]
    assert [of["logprob"], *(top["logprob"] for top in of["top_logprobs"])] == [-9999, -9999, -9999, -0.5]
    found = CompletionLogprobs(tokenizer, 3)([40], [entry])
    assert [found["token_logprobs"], [*found["top_logprobs"][0].values()]] == [[-9999], [-9999, -9999, -0.5]]
