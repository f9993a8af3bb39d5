"""Which of a model's files decide what, and one vocabulary in three formats; ids by the sentencepiece library 0.2.3 and
transformers 5.24."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMA, write_hf

from llama_jax import batch_generate, load
from llama_jax.convert import convert, export_gguf
from llama_jax.convert.gguf_tokenizer import tokenizer_files
from llama_jax.errors import CheckpointError, TokenizerError
from llama_jax.text.chat import encode_chat
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
IM = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role=='user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def folder_of(folder: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A folder with the small tokenizer.model; keyword arguments are further JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / "sentencepiece.model", folder / "tokenizer.model")
    for name, content in {"tokenizer_config": config, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def model_of(folder: Path, rows: int, **kwargs: Any) -> Path:
    """A tiny model of that many rows with that tokenizer."""
    folder_of(folder, **kwargs)
    write_hf(folder, LLAMA | {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2})
    (folder / "tokenizer.json").unlink()
    return folder


def tokens(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.token(i) for i in tokenizer.encode(text, **options)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" one", ["▁", "▁one"]),
        ("one", ["▁one"]),
        (" \n b", ["▁", "▁", "<0x0A>", "▁b"]),
        ("   ", ["▁"] * 4),
        ("▁x", ["▁", "▁", "x"]),
    ],
)
@pytest.mark.parametrize("config", [None, NAMES, NAMES | {"legacy": True}])
def test_a_text_keeps_its_own_leading_space(
    text: str, expected: list[str], config: dict[str, Any] | None, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, config))
    assert tokens(tokenizer, text, add_special_tokens=False) == expected
    assert tokenizer.encode("    def f", add_special_tokens=False) == [835, 835, 835, 835, 338, 855, 280]
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_legacy(tmp_path: Path) -> None:
    """Text after a control token gets a space too, as in Meta's own code, which encodes each turn by itself."""
    legacy = load_tokenizer(folder_of(tmp_path / "a", NAMES | {"legacy": True, "chat_template": LLAMA2}))
    assert tokens(legacy, "a</s>b") == ["<s>", "▁a", "</s>", "▁b"]
    assert tokens(legacy, "</s>start") == ["<s>", "</s>", "▁st", "ar", "t"]
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "ok"},
    ]
    # fmt: off
    assert encode_chat(legacy, chat) == [
        1, 835, 96, 889, 892, 888, 890, 98, 336, 843, 835, 96, 871, 889, 892, 888, 890, 98, 835, 858, 841, 2, 1, 835,
        96, 889, 892, 888, 890, 98, 300, 864, 835, 96, 871, 889, 892, 888, 890, 98,
    ]
    # fmt: on
    for i, config in enumerate((NAMES, NAMES | {"legacy": False}, None)):
        other = load_tokenizer(folder_of(tmp_path / str(i), config))
        assert tokens(other, "a</s>b") == ["<s>", "▁a", "</s>", "b"]
        assert tokens(other, "</s>start", add_special_tokens=False)[1] != "▁st"


def test_no_prefix_space(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, NAMES | {"add_prefix_space": False}))
    assert tokens(tokenizer, "the", add_special_tokens=False)[0][0] == "t"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_added_tokens_json(tmp_path: Path) -> None:
    """Folders as transformers before 4.34 saved them."""
    config = NAMES | {"eos_token": IM[1], "chat_template": CHATML}
    added = {IM[0]: 900, IM[1]: 901}
    path = model_of(tmp_path / "m", 902, config=config, added_tokens=added, special_tokens_map={"eos_token": IM[1]})
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 900, 346, 262, 15, 848, 843, 901]
    assert tokenizer.special_tokens[IM[1]] == tokenizer.eos_token_id == 901
    assert IM[0] not in tokenizer.special_tokens  # no file calls it special
    chat = encode_chat(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert chat == [900, 346, 262, 15, 848, 843, 901, 15, 900, 456, 586, 413, 15]
    export_gguf(convert(path, tmp_path / "c"), tmp_path / "m.gguf")
    again = load_tokenizer(convert(tmp_path / "m.gguf", tmp_path / "again"))
    assert [again.token(i) for i in (900, 901)] == list(IM)
    assert (again.vocab_size, again.eos_token_id) == (902, 901)


def test_malformed_added_tokens_json(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"added_tokens\.json gives '<x>' the id -1"):
        load_tokenizer(folder_of(tmp_path, NAMES, added_tokens={"<x>": -1}))
    with pytest.raises(TokenizerError, match=r"added_tokens\.json gives '<x>' the id 950, the tokenizer 900"):
        load_tokenizer(folder_of(tmp_path, NAMES, added_tokens={"<x>": 950}))


def test_a_decoder_in_the_configuration_replaces_the_older_files(tmp_path: Path) -> None:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config = NAMES | {"added_tokens_decoder": {"900": {"content": "<new>", **flags}}}
    older = {"added_tokens": {"<old>": 900}, "special_tokens_map": {"eos_token": "<old>"}}
    tokenizer = load_tokenizer(folder_of(tmp_path, config, **older))
    assert (tokenizer.token(900), tokenizer.eos_token) == ("<new>", "</s>")
    del config["added_tokens_decoder"]
    tokenizer = load_tokenizer(folder_of(tmp_path, config, **older))
    assert (tokenizer.token(900), tokenizer.eos_token) == ("<old>", "<old>")


@pytest.mark.parametrize("flags", [(None, None), (True, None), (False, False), (True, True)])
def test_a_tokenizer_json_says_itself_what_goes_around_a_text(flags: tuple[bool | None, ...], tmp_path: Path) -> None:
    """add_bos_token and add_eos_token count beside tokenizer.model alone, as in transformers 5."""
    files = tokenizer_files(json.loads((DATA / "sentencepiece_gguf.json").read_text()) | {ADD_EOS: True})
    (tmp_path / "tokenizer.json").write_text(files["tokenizer.json"])
    config = NAMES | dict(zip(("add_bos_token", "add_eos_token"), flags, strict=True))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = load_tokenizer(tmp_path).encode("hello world")
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 9)


ADD_EOS = "tokenizer.ggml.add_eos_token"


def test_flags_beside_tokenizer_model(tmp_path: Path) -> None:
    for bos, eos, ends in ((True, True, [1, 2]), (False, True, [2]), (None, None, [1])):
        config = NAMES | {"add_bos_token": bos, "add_eos_token": eos}
        ids = load_tokenizer(folder_of(tmp_path, config)).encode("a")
        assert [i for i in ids if i in (1, 2)] == ends


# --- tokens that only one of model and tokenizer has


@pytest.mark.slow
def test_ids_that_only_the_model_has(tmp_path: Path) -> None:
    path = model_of(tmp_path, 964, config=NAMES)
    model, tokenizer = load(path, convert=False)
    only = dict.fromkeys(range(910, 964), 100.0)
    output = batch_generate(model, tokenizer, ["a"], max_tokens=4, logit_bias=only)[0].outputs[0]
    assert set(output.token_ids) <= set(only)
    assert tokenizer.decode(output.token_ids) == output.text == ""
    assert tokenizer.decode([*tokenizer.encode("a"), 950]) == "a"
    for bad in (964, -1, 1.5, True, "1"):
        with pytest.raises(TokenizerError, match="not in the vocabulary of 964"):
            tokenizer.decode([bad])  # type: ignore[list-item]


def test_a_token_without_a_row(tmp_path: Path) -> None:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    config = NAMES | {"added_tokens_decoder": {"900": {"content": IM[0], **flags}}, "chat_template": CHATML}
    path = model_of(tmp_path / "m", 900, config=config)
    said: list[str] = []
    _, tokenizer = load(path, convert=False, notify=said.append)
    assert [line for line in said if "'<|im_start|>' (id 900): added to the tokenizer" in line]
    assert tokenizer.encode("hi")
    with pytest.raises(TokenizerError, match=r"'<\|im_start\|>' \(id 900\) was added.* 900 rows and no embedding") as e:
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}])
    assert "resized" in e.value.hint
    said.clear()
    load(path, notify=said.append)
    assert [line for line in said if "'<|im_start|>' (id 900)" in line]


def test_more_pieces_than_rows(tmp_path: Path) -> None:
    """Also where the vocabulary is in a tokenizer.model."""
    with pytest.raises(CheckpointError, match="ids up to 899, the model's vocabulary ends at 879"):
        convert(model_of(tmp_path / "m", 880, config=NAMES), tmp_path / "c")


# --- one vocabulary in three formats


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """As Meta's folders have it, as Hugging Face's with "legacy", and as a GGUF file."""
    folder = tmp_path_factory.mktemp("formats")
    made = {"gguf": folder / "gguf", "hf": folder_of(folder / "hf", NAMES | {"legacy": True})}
    made["gguf"].mkdir()
    for name, content in tokenizer_files(json.loads((DATA / "sentencepiece_gguf.json").read_text())).items():
        (made["gguf"] / name).write_text(content)
    made["meta"] = folder_of(folder / "meta")
    return {name: load_tokenizer(path) for name, path in made.items()}


HOSTILE = st.text() | st.text(alphabet=" \n\t\r▁abthe<s>|/_1\x00\u200bé日👍🏽\u200d\ufeff", max_size=40)


@settings(deadline=None, max_examples=300)
@given(text=HOSTILE)
def test_three_formats_give_equal_ids(formats: dict[str, Tokenizer], text: str) -> None:
    """And each gives the text back: all its bytes have tokens, and a space is spelled by one character of its own."""
    ids = {name: tokenizer.encode(text, parse_special=False) for name, tokenizer in formats.items()}
    assert ids["gguf"] == ids["hf"] == ids["meta"]
    for tokenizer in formats.values():
        assert tokenizer.decode(ids["meta"]) == text.replace("▁", " ")
