"""Files that are no model, or not what their names say: each error says what they are, and what to do with that."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import LLAMA, assert_equal, refusal, write_gguf, write_hf
from torch_writer import state_dict, write_archive

from llama_jax.convert import convert
from llama_jax.convert.gguf_file import GgufFile
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.library import locate

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4915916176\n"


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF files of these tests have no tokenizer."""
    monkeypatch.setattr("llama_jax.convert.gguf_tokenizer.tokenizer_files", lambda metadata: {})


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize("parts", [0, 8])
def test_a_folder_with_one_gguf_model(tmp_path: Path, parts: int, config: bool) -> None:
    """As repositories of GGUF files are, config.json or not."""
    (tmp_path / "g").mkdir()
    leaves = write_gguf(tmp_path / "g" / "m.gguf", LLAMA, tensors_a_part=parts)
    (tmp_path / "g" / "README.md").write_text("A model.")
    if config:
        (tmp_path / "g" / "config.json").write_text(json.dumps(LLAMA))
    assert len(list(tmp_path.glob("g/*.gguf"))) == (3 if parts else 1)
    assert_equal(convert(tmp_path / "g", tmp_path / "out"), leaves)
    assert locate(tmp_path / "g").suffix == ".gguf"


@pytest.mark.usefixtures("plain")
def test_parts_with_other_names(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, tensors_a_part=12)
    for n in (1, 2):
        (tmp_path / f"m-{n:05}-of-00002.gguf").rename(tmp_path / f"model.part{n}of2.gguf")
    first = refusal(tmp_path / "model.part1of2.gguf", CheckpointError)
    assert "is the first of 2 parts of a GGUF model by its metadata, but not by its name" in first.message
    assert first.hint == "gguf-split names it NAME-00001-of-00002.gguf"
    second = refusal(tmp_path / "model.part2of2.gguf", CheckpointError)
    assert "is part 2 of 2 of a GGUF model by its metadata, but not by its name" in second.message
    assert "NAME-00002-of-00002.gguf" in second.hint
    assert "give NAME-00001-of-00002.gguf" in second.hint
    # A first part that is another by its metadata.
    (tmp_path / "model.part2of2.gguf").rename(tmp_path / "m-00001-of-00002.gguf")
    assert "is part 2 of 2" in refusal(tmp_path / "m-00001-of-00002.gguf", CheckpointError).message


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("ending", ["part{}of2", "split-{}"])
def test_pieces_that_were_cut_anywhere(tmp_path: Path, ending: str) -> None:
    """They are put together by the command that the hint gives."""
    leaves = write_gguf(tmp_path / "m.gguf", LLAMA)
    data = (tmp_path / "m.gguf").read_bytes()
    joint = "." if "of" in ending else "-"
    pieces = [tmp_path / f"m.gguf{joint}{ending.format(name)}" for name in ("12" if joint == "." else "ab")]
    (tmp_path / "m.gguf").unlink()
    for piece, part in zip(pieces, (data[:5000], data[5000:]), strict=True):
        piece.write_bytes(part)
    for piece in pieces:
        error = refusal(piece, CheckpointError)
        assert "is a piece of m.gguf" in error.message
    subprocess.run(error.hint.split("`")[1], shell=True, check=True)
    assert_equal(convert(tmp_path / "m.gguf", tmp_path / "out"), leaves)


@pytest.mark.parametrize(
    ("number", "name", "hint"),
    [
        (4, "Q4_2", "quantise the model again"),
        (5, "Q4_3", "quantise the model again"),
        (31, "Q4_0_4_4", "use the model's Q4_0 file"),
        (32, "Q4_0_4_8", "use the model's Q4_0 file"),
        (33, "Q4_0_8_8", "use the model's Q4_0 file"),
        (36, "IQ4_NL_4_4", "use the model's IQ4_NL file"),
        (38, "IQ4_NL_8_8", "use the model's IQ4_NL file"),
    ],
)
def test_types_that_llama_cpp_has_removed(tmp_path: Path, number: int, name: str, hint: str) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA)
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    data[at : at + 4] = number.to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    error = refusal(tmp_path / "m.gguf", UnsupportedModel)
    assert f"the GGML type {name} ({number}), which llama.cpp has removed" in error.message
    assert hint in error.hint
    assert "upgrade" not in error.hint


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.attention.head_count": 0}, "llama.attention.head_count must be"),
        ({"llama.block_count": 0}, "GGUF metadata: llama.block_count must be an integer"),
        (
            {"llama.attention.head_count_kv": 3},
            "head_count_kv must be a divisor of llama.attention.head_count",
        ),
        (
            {"llama.attention.layer_norm_rms_epsilon": 0.0},
            "layer_norm_rms_epsilon must be a finite number",
        ),
        ({"llama.attention.key_length": 7}, "llama.attention.key_length must be even"),
        ({"llama.context_length": 0}, "llama.context_length must be"),
        ({"llama.rope.freq_base": 0.5}, "llama.rope.freq_base must be greater than 1"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -1.0}, "llama.rope.scaling.factor must be"),
        ({"tokenizer.ggml.bos_token_id": 0x80000000}, "tokenizer.ggml.bos_token_id must be a token id"),
        ({"tokenizer.ggml.padding_token_id": 0xFFFFFFFE}, "tokenizer.ggml.padding_token_id must be a token id"),
    ],
)
def test_keys_of_gguf_have_their_own_names(
    tmp_path: Path, keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA)
    parsed = GgufFile._parse

    def changed(self: GgufFile) -> Any:
        metadata, tensors = parsed(self)
        return metadata | keys, tensors

    monkeypatch.setattr(GgufFile, "_parse", changed)
    error = refusal(tmp_path / "m.gguf", UnsupportedModel)
    assert message in error.message
    assert "config.json" not in str(error)


@pytest.mark.parametrize("none", [-1, 0xFFFFFFFF])
def test_ids_that_say_none(tmp_path: Path, none: int) -> None:
    """GGUF has them as -1 or as the same unsigned; config.json as -1."""
    metadata = json.loads((Path(__file__).parent / "data" / "tokenizer" / "byte_level_gguf.json").read_text())
    hf = LLAMA | {"vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    extra = {k: v for k, v in metadata.items() if k.startswith("tokenizer.") and "token_id" not in k}
    pad = np.int32(none) if none < 0 else none
    write_gguf(tmp_path / "m.gguf", hf, extra=extra | {"tokenizer.ggml.padding_token_id": int(pad) & 0xFFFFFFFF})
    path = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((path / "config.json").read_text())["pad_token_id"] is None
    write_hf(tmp_path / "hf", LLAMA | {"bos_token_id": -1, "eos_token_id": [-1, 2], "pad_token_id": -1})
    config = json.loads((convert(tmp_path / "hf", tmp_path / "out2") / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 2, None)


# --- Files that are something else ------------------------------------------------------------------------------------

PAGE = b"<!DOCTYPE html>\n<html><head><title>org/name at main</title></head></html>"
BOTH: dict[str, tuple[bytes, str, str]] = {
    "pointer": (POINTER, r"is a pointer of Git LFS, which stands for a file of 4,915,916,176 bytes", "git lfs pull"),
    "empty": (b"", "is empty (0 bytes)", "get the file again"),
    "page": (PAGE, "is a web page", "hf download"),
    "xml": (
        b'<?xml version="1.0"?><Error></Error>',
        "is a web page (HTML or XML)",
        "hf download",
    ),
}
WEIGHTS: dict[str, tuple[bytes, str, str]] = {
    "answer": (b"Entry not found", "is a text of 15 bytes, not weights: 'Entry not found'", "hf download"),
    "zeros": (bytes(4096), "begins with 1024 zeros", "get the file again"),
    "gzip": (b"\x1f\x8b" + bytes(range(200)), "is compressed (gzip)", "unpack it"),
    "ggml": (b"tjgg" + bytes(range(200)), "is a file of llama.cpp's old format GGML", "GGUF in August 2023"),
}
JSON: dict[str, tuple[bytes, str, str]] = {
    "mark": (b"\xef\xbb\xbf{}", "begins with a byte order mark (BOM)", "UTF-8 without a byte order mark"),
    "utf-16": ("{}".encode("utf-16"), "is UTF-16", "iconv"),
}
CASES = [
    *((n, case) for n in ("model.safetensors", "pytorch_model.bin", "m.gguf") for case in (BOTH | WEIGHTS).values()),
    *(
        (n, case)
        for n in ("config.json", "generation_config.json", "tokenizer.json")
        for case in (BOTH | JSON).values()
    ),
    *((n, case) for n in ("tokenizer_config.json", "model.safetensors.index.json") for case in (BOTH | JSON).values()),
    *(("tokenizer.model", case) for case in BOTH.values()),
    *((n, BOTH["pointer"]) for n in ("chat_template.jinja", "LICENSE", "special_tokens_map.json")),
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_files_that_are_something_else(tmp_path: Path, name: str, case: tuple[bytes, str, str]) -> None:
    data, message, hint = case
    folder = tmp_path / "hf"
    write_hf(folder, LLAMA, shards=2 if "index" in name else 1)
    if name in ("pytorch_model.bin", "m.gguf"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)
    error = refusal(folder, CheckpointError)
    assert f"{folder / name} {message}" in error.message
    assert hint in error.hint
    assert "convert it again" not in error.hint


def test_one_format_under_the_name_of_another(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    write_archive(tmp_path / "hf" / "model.safetensors", state_dict({}), {})
    assert "is a zip archive, perhaps one of torch.save" in refusal(tmp_path / "hf", CheckpointError).message
    write_gguf(tmp_path / "hf" / "model.safetensors", LLAMA)
    assert "model.safetensors is a GGUF file" in refusal(tmp_path / "hf", CheckpointError).message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1,}'])
def test_json_of_a_source_is_not_that_of_a_checkpoint(tmp_path: Path, name: str, text: str) -> None:
    write_hf(tmp_path / "hf", LLAMA, shards=2)
    (tmp_path / "hf" / name).write_text(text)
    error = refusal(tmp_path / "hf", CheckpointError)
    assert error.hint == "correct the file, or get it again from where the model came"
