"""Training data: lines, masks, packing, settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat_model import write_chat_model

from llama_jax.errors import DataError, RequestError
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.training import Rows, Text, chat_tokens, read_settings, read_texts, settings_from

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "fine <|im_end|> day"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "\n\nthat is all"},
]
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role != 'assistant' else 'said' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that shortens earlier answers, as those of reasoning models do."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def learned_text(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of each run of learned tokens."""
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask.astype(int))) + 1)
    return [tokenizer.decode(ids[run].tolist(), skip_special_tokens=False) for run in runs if mask[run[0]]]


# --- Lines ------------------------------------------------------------------------------------------------------------


def test_turns_of_the_assistant_are_learned_with_their_end(tokenizer: Tokenizer) -> None:
    first, last = "fine <|im_end|> day<|im_end|>\n", "that is all<|im_end|>\n"
    found = learned_text(tokenizer, *chat_tokens(tokenizer, CHAT))
    assert found[0] == first
    # The line break of the prompt is in one token with those of the answer, which is learned.
    assert found[1].strip("\n") == last.strip("\n")
    (only,) = learned_text(tokenizer, *chat_tokens(tokenizer, CHAT, "last"))
    assert only == found[1]
    ids, mask = chat_tokens(tokenizer, CHAT, "all")
    assert mask.all()
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False).count("<|im_start|>") == 4


def test_text_of_messages_is_no_control_token(tokenizer: Tokenizer) -> None:
    ids, _ = chat_tokens(tokenizer, CHAT)
    assert np.sum(ids == tokenizer.token_id("<|im_end|>")) == 4  # and not five


def test_templates_that_rewrite_earlier_turns_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_chat_model(tmp_path / "hf", template=FORGETFUL))
    with pytest.raises(DataError, match="writes message 1 in another way") as caught:
        chat_tokens(tokenizer, CHAT)
    assert "last" in caught.value.hint
    (only,) = learned_text(tokenizer, *chat_tokens(tokenizer, CHAT, "last"))
    assert "that is all" in only


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 3: it is not JSON"),
        ("[1]", 'line 3: it has neither "text" nor "messages"'),
        ('{"mesages": []}', 'line 3: it has neither "text" nor "messages" (hint: did you mean messages?)'),
        ('{"text": "a", "messages": []}', 'line 3: it has both "text" and "messages"'),
        ('{"text": 3}', 'line 3: "text" is int'),
        ('{"messages": []}', "line 3: this is not a list of messages"),
        ('{"messages": [{"role": "asistant", "content": "a"}]}', "line 3: message 0 has the unknown role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 3: no token of the conversation is learned"),
    ],
)
def test_bad_lines_are_named(tokenizer: Tokenizer, tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        read_texts([path], tokenizer, length=64)
    assert f"{path}, {says}" in str(caught.value)
    assert caught.value.hint


def test_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        read_texts([tmp_path / "none.jsonl"], tokenizer, length=64)
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        read_texts([tmp_path], tokenizer, length=64)


def test_long_texts_are_cut_up_and_long_conversations_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    text = "one two three four five six seven eight nine ten " * 4
    path.write_text("".join(json.dumps(x) + "\n" for x in ({"text": text}, {"messages": CHAT})))
    found = read_texts([path], tokenizer, length=32)
    ids = tokenizer.encode(text)
    assert np.concatenate([t.tokens for t in found.texts[:-1]]).tolist() == [*ids, tokenizer.eos_token_id]
    assert found.pieces == len(found.texts) - 2 > 0
    assert found.cut == 1
    whole, mask = chat_tokens(tokenizer, CHAT)
    assert found.texts[-1].tokens.tolist() == whole[:32].tolist()
    assert found.texts[-1].learned.tolist() == mask[:32].tolist()
    short = read_texts([path], tokenizer, length=8)
    assert short.dropped == 1
    assert found.digest == read_texts([path], tokenizer, length=32).digest != short.digest


# --- Rows -------------------------------------------------------------------------------------------------------------


def texts_of(lengths: list[int]) -> list[Text]:
    """Texts of distinct tokens, so that each can be told."""
    starts = np.cumsum([0, *lengths])
    return [Text(np.arange(a, a + n, dtype=np.int32), np.ones(n, bool)) for a, n in zip(starts, lengths, strict=False)]


@given(st.lists(st.integers(2, 16), min_size=1, max_size=90), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_each_epoch_has_each_text_once_in_an_order_of_the_seed(
    lengths: list[int], rows: int, seed: int, pack: bool
) -> None:
    texts = texts_of(lengths)
    made = Rows(texts, length=16, rows=rows, seed=seed, pack=pack)
    steps = made.steps(2)
    batches = [made.batch(step) for step in range(steps)]
    seen = np.zeros(sum(lengths), int)
    of_two = made.packing(0).rows + made.packing(1).rows
    assert 0 <= steps * rows - of_two < rows
    number = 0
    for batch, members in batches:
        real = batch.labels != -100
        assert real.sum() == sum(members)
        for tokens, segments, labels in zip(batch.tokens, batch.segments, batch.labels, strict=True):
            if (number := number + 1) <= of_two:
                np.add.at(seen, tokens[labels != -100], 1)
            for segment in np.unique(segments):
                here = segments == segment
                if (labels[here] != -100).all():
                    first = int(tokens[here][0])
                    assert np.array_equal(tokens[here], np.arange(first, first + here.sum()))  # whole and in order
                else:
                    assert segment == segments.max()  # padding, behind all
    assert (seen == 2).all()
    once = [made.once(step) for step in range(made.steps(1))]
    measured = np.concatenate([batch.tokens[batch.labels != -100] for batch in once])
    assert np.array_equal(np.sort(measured), np.arange(sum(lengths)))
    again = Rows(texts, length=16, rows=rows, seed=seed, pack=pack)
    for step in reversed(range(steps)):  # whatever was asked before
        assert np.array_equal(again.batch(step)[0].tokens, batches[step][0].tokens)


def test_packing_says_how_full_rows_are() -> None:
    found = Rows(texts_of([8, 8, 12, 4]), length=16, rows=1).packing()
    assert (found.rows, found.tokens, found.learned, found.filled) == (2, 32, 28, 1.0)
    alone = Rows(texts_of([8, 8, 12, 4]), length=16, rows=1, pack=False).packing()
    assert (alone.rows, alone.filled) == (4, 0.5)
    with pytest.raises(RequestError, match="a text has 17 tokens, and rows have 16"):
        Rows(texts_of([17]), length=16, rows=1)
    with pytest.raises(RequestError, match="holds no text"):
        Rows([], length=16, rows=1)


# --- Settings ---------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"model": "a", "output": "b", "data": {"files": ["c"]}}


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"modle": "a"}, "modle", "did you mean model"),
        ({"data": {"files": ["c"], "lerned": "all"}}, "data.lerned", "did you mean learned"),
        ({"rows": {"rows": "8"}}, "rows.rows", "Expected `int`"),
        ({"rows": {"rows": 8, "parts": 3}}, "rows.parts", "8 rows cannot be computed in 3"),
        ({"rows": {"length": 0}}, "rows.length", "too small"),
        ({"method": "qlora"}, "method", "did you mean lora"),
        ({"optimizer": {"name": "adam"}}, "name", "did you mean adamw"),
        ({"optimizer": {"learning_rate": 0.0}}, "learning_rate", "must be positive"),
        ({"optimizer": {"learning_rate": math.nan}}, "learning_rate", "must be positive"),
        ({"optimizer": {"warmup": -1}}, "warmup", "must not be negative"),
        ({"optimizer": {"max_grad_norm": 0}}, "max_grad_norm", "inf is no limit"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas", "below 1"),
        ({"lora": {"alpha": 0}}, "lora.alpha", "must be positive"),
        ({"dpo": {"beta": math.nan}}, "dpo.beta", "must be positive"),
        ({"seed": -1}, "seed", "out of range"),
        ({"compute": {"remat": "xyz"}}, "compute.remat", "there are none, products"),
        ({"data": {"files": ["c"], "template": {"tools": []}}}, "data.template.tools", "cannot be set"),
        ({"data": {"files": []}}, "data.files", "names no file"),
        ({"data": {}}, "data", "missing required field `files`"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        settings_from(GOOD | changes)
    assert caught.value.param == param
    assert says in str(caught.value)


def test_settings_are_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "a"\noutput = "b"\n[data]\nfiles = ["c"]\n[optimizer]\nbetas = [0.9, 0.95]\n')
    found = read_settings(path)
    assert found.optimizer.betas == (0.9, 0.95)
    assert found == settings_from(GOOD | {"optimizer": {"betas": [0.9, 0.95]}})
    assert found.digest != settings_from(GOOD).digest
    assert settings_from(GOOD | {"output": "d", "compute": {"mesh": "fsdp=2"}}).digest == settings_from(GOOD).digest
    path.write_text(path.read_text() + "[data.template]\ndate_string = 2024-07-26\n")  # a date of TOML, unquoted
    with pytest.raises(RequestError, match=r"data\.template: .* date .* quotation marks"):
        read_settings(path)
    for text in ("model = ", None):
        bad = tmp_path / "bad.toml"
        if text is not None:
            bad.write_text(text)
        with pytest.raises(RequestError, match="cannot read"):
            read_settings(bad if text is not None else tmp_path / "none.toml")
