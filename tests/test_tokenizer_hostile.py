"""Tokenizers made to harm: each ends as one typed error, in seconds, before the model is converted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_chat_model import write_chat_model

from llama_jax import library
from llama_jax.cli import cli
from llama_jax.errors import LlamaJaxError, TokenizerError
from llama_jax.text.tokenizer import added as added_tokens
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.text.tokenizer.check import check_tokenizer
from llama_jax.text.tokenizer.tokenizer import call_backend

PANICS = "(a+)+b"  # exponential: the library panics after ten million steps
SLOW = r"(?=(\w+\w+\d))"  # cubic: never as many steps at one place, yet minutes for a few thousand letters


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """A tokenizer of 26 letters."""
    vocab = {chr(ord("a") + i): i for i in range(26)}
    model = {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []}
    return {"version": "1.0", "added_tokens": [], "model": model} | changes


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def added(*tokens: tuple[int, str]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": content, **flags} for i, content in tokens]


def with_model(**changes: Any) -> dict[str, Any]:
    content = tokenizer_json()
    content["model"] |= changes
    return content


HARMFUL: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "panic in the split": (lambda: tokenizer_json(pre_tokenizer=split(PANICS)), "retry-limit"),
    "panic in the normaliser": (lambda: tokenizer_json(normalizer=replace({"Regex": PANICS}, "x")), "retry-limit"),
    "slow split": (lambda: tokenizer_json(pre_tokenizer=split(SLOW)), "more than 2 s"),
    "panic on loading": (lambda: with_model(merges=["a b"], continuing_subword_prefix="##"), "cannot be read"),
    "text grows without bound": (
        lambda: tokenizer_json(
            normalizer={"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 1000)] * 4}
        ),
        "more than 1024 MiB of memory",
    ),
    "ids leap": (lambda: with_model(vocab={"a": 0, "b": 1, "c": 2**32 - 1}), "leaps to id 4294967295"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_tokenizers_are_refused(name: str) -> None:
    content, says = HARMFUL[name]
    # A machine may be busy: only where time is the point is there little of it.
    seconds = 2 if "slow" in name else 20
    began = time.monotonic()
    with pytest.raises(TokenizerError, match=says) as e:
        check_tokenizer({"tokenizer.json": json.dumps(content())}, 10**6, seconds=seconds, memory_bytes=1 << 30)
    assert e.value.hint
    assert "/tmp" not in e.value.message
    assert time.monotonic() - began < 60


def test_harmful_tokenizers_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    folder = write_chat_model(tmp_path / "hf")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(pre_tokenizer=split(PANICS))))
    (folder / "tokenizer_config.json").unlink()
    said: list[str] = []
    with pytest.raises(TokenizerError, match="retry-limit"):
        library.resolve(folder, notify=said.append)
    assert said == []
    assert not (tmp_path / "cache").exists()
    result = CliRunner().invoke(cli, ["convert", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": "{"},
        {"tokenizer.json": json.dumps(tokenizer_json())},
        {"tokenizer.json": json.dumps(tokenizer_json(added_tokens=added((26, "<s>"), (40, "<x>"))))},
        {"tokenizer.json": "{}"},
        {"tokenizer.json": b"\xff" * 100},
        {"tokenizer.json": json.dumps(tokenizer_json(pre_tokenizer=split("(a")))},
        {"tokenizer.model": b"\x0a" * 1000},
        {"tokenizer.json": "[" * 100_000},
    ],
)
def test_harmless_tokenizers_pass(files: dict[str, bytes | str]) -> None:
    """Also those that do not load: that is said when they are loaded."""
    check_tokenizer(files, 10**6)


def test_sound_tokenizers_pass(data: Path, tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "hf")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if "tokenizer" in p.name or p.suffix == ".jinja"}
    check_tokenizer(files | {"additional_chat_templates/rag.jinja": "x"}, 10**6)
    check_tokenizer({"tokenizer.model": (data / "tokenizer" / "sentencepiece.model").read_bytes()}, 10**6)


# --- In this process: what load_tokenizer itself holds ----------------------------------------------------------------


def write(folder: Path, content: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def test_a_panic_is_an_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_json(pre_tokenizer=split(PANICS))))
    with pytest.raises(TokenizerError, match="retry-limit"):
        tokenizer.encode("a" * 100)
    assert tokenizer.encode("b") == [1]


def test_a_panic_on_loading_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(write(tmp_path, with_model(merges=["a b"], continuing_subword_prefix="##")))


def test_what_is_no_error_of_the_library_passes() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def ours() -> None:
        raise LlamaJaxError("ours")

    with pytest.raises(KeyboardInterrupt):
        call_backend("x", interrupt)
    with pytest.raises(LlamaJaxError, match="ours"):
        call_backend("x", ours)


def test_ten_million_added_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the size of the file, before it is parsed; fewer by their number."""
    (tmp_path / "tokenizer.json").touch()
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(10_000_000 * 130)  # what they take up; a file with a hole
    began = time.monotonic()
    with pytest.raises(TokenizerError, match="1,300,000,000 bytes"):
        load_tokenizer(tmp_path)
    assert time.monotonic() - began < 1
    monkeypatch.setattr(added_tokens, "MAX_ADDED_TOKENS", 1000)
    many = added(*((26 + i, f"<t{i}>") for i in range(1001)))
    with pytest.raises(TokenizerError, match="adds 1,001 tokens"):
        load_tokenizer(write(tmp_path, tokenizer_json(added_tokens=many)))
    listed = {str(token.pop("id")): token for token in many}
    with pytest.raises(TokenizerError, match="adds 1,001 tokens"):
        load_tokenizer(write(tmp_path, tokenizer_json(), {"added_tokens_decoder": listed}))


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**64, 1.5, "1", None])
def test_ids_that_are_none(tmp_path: Path, token_id: Any) -> None:
    with pytest.raises(TokenizerError):
        load_tokenizer(write(tmp_path, with_model(vocab={"a": 0, "b": token_id})))


@pytest.mark.parametrize("token_id", [30, 2**31, 2**32 - 1])
def test_gaps_before_added_tokens(tmp_path: Path, token_id: int) -> None:
    """The library numbers them on; a config that insists on other ids is refused."""
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_json(added_tokens=added((token_id, "<x>")))))
    assert tokenizer.encode("<x>") == [tokenizer.token_id("<x>")]
    assert tokenizer.vocab_size == tokenizer.largest_id + 1
    config = {"added_tokens_decoder": {str(token_id + 5): {"content": "<x>", "special": True}}}
    with pytest.raises(TokenizerError, match="gives '<x>' the id"):
        load_tokenizer(write(tmp_path, tokenizer_json(), config))
