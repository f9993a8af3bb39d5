"""GGUF: every quantised type against llama.cpp's own decoder, models in several files, experts one by one."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tiny_models import LLAMA, MIXTRAL, assert_equal, write_gguf

from llama_jax.checkpoint import open_checkpoint
from llama_jax.convert import convert, gguf_file
from llama_jax.convert.gguf_file import GgufFile
from llama_jax.convert.gguf_parts import GgufParts, first_part, models_of
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.library import resolve

WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
PLAIN = {Kind.F32, Kind.F16, Kind.BF16}
INTEGERS = {Kind.I8, Kind.I16, Kind.I32, Kind.I64, Kind.F64}
NOT_DECODED = {Kind.Q8_1, Kind.Q8_K} | {Kind[name] for name in ("Q1_0",) if name in Kind.__members__}
"""Types that llama.cpp uses for intermediate results, or that its package cannot decode."""
QUANTISED = [kind for kind in Kind if kind not in PLAIN | INTEGERS | NOT_DECODED]

pytestmark = pytest.mark.usefixtures("without_tokenizer")


def write_tensor(path: Path, raw: np.ndarray, kind: Kind) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(kind: Kind, rows: int, blocks: int) -> np.ndarray:
    """[rows, bytes] uint8: random codes and scales."""
    rng = np.random.default_rng(kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        return gguf.quantize(rng.standard_normal((rows, blocks * block), np.float32), kind)
    except NotImplementedError:
        return rng.integers(0, 256, (rows, blocks * size), np.uint8)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_by_the_gguf_package(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of three rows, one of them cut short; random scales may be NaN, on both sides."""
    raw = random_blocks(kind, 10, 3)
    write_tensor(tmp_path / "m.gguf", raw, kind)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
    monkeypatch.setattr(gguf_file, "_BLOCK_ELEMENTS", 3 * expected.shape[1])
    file = GgufFile(tmp_path / "m.gguf")
    file.check_decodable()
    assert file.dtype("t") == np.float32
    found = file.read("t")
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).mean() > 0.5
    file.close()


@pytest.mark.parametrize("kind", sorted(INTEGERS | NOT_DECODED), ids=lambda kind: kind.name)
def test_other_types_are_refused_when_the_file_is_opened(tmp_path: Path, kind: Kind) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    hf = WIDE | {"hidden_size": 256, "intermediate_size": 256}
    name = "blk.1.ffn_up.weight"
    write_gguf(tmp_path / "m.gguf", hf, drop=name)
    raw = np.zeros((256, 256 // block * size), np.uint8)
    rewritten = gguf.GGUFReader(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
    for key, field in rewritten.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in rewritten.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=rf"n\.gguf: tensor {name} has type {kind.name}, which cannot"):
        convert(tmp_path / "n.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [Kind.IQ1_S, Kind.Q4_K, Kind.TQ1_0], ids=lambda kind: kind.name)
def test_memory_is_that_of_the_result(tmp_path: Path, kind: Kind) -> None:
    """64 MiB of numbers; the parts that are decoded at one time take a few tens of MiB beside them."""
    raw = np.tile(random_blocks(kind, 16, 16), (256, 1))
    write_tensor(tmp_path / "m.gguf", raw, kind)
    file = GgufFile(tmp_path / "m.gguf")
    file.check_decodable()  # makes the decoders' tables
    size = 4 * 4096 * 4096
    tracemalloc.start()
    try:
        assert file.read("t").nbytes == size
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()
        file.close()


def test_the_checkpoint_says_what_it_came_from(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", WIDE, quantisation=Kind.Q5_0)
    assert open_checkpoint(convert(tmp_path / "m.gguf", tmp_path / "out")).source.quantization == "GGUF Q5_0"
    write_gguf(tmp_path / "n.gguf", LLAMA)
    assert open_checkpoint(convert(tmp_path / "n.gguf", tmp_path / "out2")).source.quantization is None


# --- experts ----------------------------------------------------------------------------------------------------------


def test_experts_one_by_one(tmp_path: Path) -> None:
    """As the first GGUF files of Mixtral hold them."""
    leaves = write_gguf(tmp_path / "m.gguf", MIXTRAL, single_experts=True)
    assert_equal(convert(tmp_path / "m.gguf", tmp_path / "out"), leaves)
    assert b"blk.1.ffn_down.2.weight" in (tmp_path / "m.gguf").read_bytes()


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", MIXTRAL | {"num_local_experts": 2}, single_experts=True)
    raw = (tmp_path / "m.gguf").read_bytes()
    assert raw.count(b"blk.0.ffn_up.1.weight") == 1
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"blk.0.ffn_up.1.weight", b"blk.0.ffn_up.7.weight"))
    with pytest.raises(CheckpointError, match=r"lacks tensor blk\.0\.ffn_up\.1\.weight"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


# --- several files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    (tmp_path / "model").mkdir()
    leaves = write_gguf(tmp_path / "model" / "m.gguf", LLAMA, tensors_a_part=7)
    return sorted((tmp_path / "model").glob("m-*.gguf")), leaves


def test_several_files(parts: tuple[list[Path], dict[str, np.ndarray]], tmp_path: Path) -> None:
    files, leaves = parts
    assert [f.name for f in files] == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    path = convert(files[0], tmp_path / "out")
    assert_equal(path, leaves)
    assert open_checkpoint(path).source.name == files[0].name
    # Whichever part is named, it is the same model; and a folder of parts is one model.
    assert_equal(convert(files[2], tmp_path / "out2"), leaves)
    assert_equal(resolve(files[0].parent), leaves)


def test_models_of_a_folder() -> None:
    names = ["a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "b.gguf", "c-00001-of-00001.gguf"]
    expected = ["a-00001-of-00002.gguf", "b.gguf", "c-00001-of-00001.gguf"]
    assert models_of(map(Path, names)) == list(map(Path, expected))
    assert first_part(Path("x/a-00007-of-00010.gguf")) == Path("x/a-00001-of-00010.gguf")


def set_number(path: Path, key: str, value: int) -> None:
    """Overwrites an integer of the metadata in place."""
    field = gguf.GGUFReader(path, "r+").get_field(key)
    assert field is not None
    field.parts[field.data[0]][0] = value


def spoil(what: str, files: list[Path]) -> None:
    match what:
        case "missing part":
            files[1].unlink()
        case "missing first part":
            files[0].unlink()
        case "truncated part":
            os.truncate(files[2], files[2].stat().st_size - 40)
        case "doubled part":
            files[2].write_bytes(files[1].read_bytes())
        case "swapped parts":
            files[1].rename(files[1].with_suffix(".tmp"))
            files[2].rename(files[1])
            files[1].with_suffix(".tmp").rename(files[2])
        case "other name":
            files[0].rename(files[0].with_name("other.gguf"))
        case "other count":
            set_number(files[0], "split.count", 4)
        case "huge count":
            set_number(files[0], "split.count", 65_535)
        case "other total":
            set_number(files[0], "split.tensors.count", 99)


SPOILT: dict[str, str] = {
    "missing part": r"00002-of-00003\.gguf is missing",
    "missing first part": r"00001-of-00003\.gguf is missing, the first part",
    "truncated part": r"00003-of-00003\.gguf: tensor .* it is truncated",
    "doubled part": r"stands both in|is not part 3 of 3",
    "swapped parts": r"00002-of-00003\.gguf is not part 2 of 3 by its metadata, but part 3 of 3",
    "other name": r"other\.gguf is the first of 3 parts .* not by its name",
    "other count": r"first of 4 parts .* not by its name",
    "huge count": r"first of 65535 parts .* not by its name",
    "other total": r"the parts hold \d+ tensors, the metadata says 99",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", SPOILT)
def test_parts_that_do_not_belong_together(parts: Any, tmp_path: Path, what: str) -> None:
    files, _ = parts
    spoil(what, files)
    named = files[0] if files[0].exists() else files[1]
    named = files[0].with_name("other.gguf") if what == "other name" else named
    with pytest.raises(CheckpointError, match=SPOILT[what]) as e:
        convert(named, tmp_path / "out")
    assert e.value.hint
    assert not (tmp_path / "out").exists()


def test_split_keys_of_the_wrong_type(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra={"split.count": "many"})
    with pytest.raises(CheckpointError, match=r"split\.count is 'many'"):
        GgufParts(tmp_path / "m.gguf")


def test_named_templates_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    vocabulary = [*(chr(c) for c in range(ord("!"), ord("!") + 47)), "Ġ"]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.chat_template": "A",
        "tokenizer.chat_template.tool_use": "B",
    }
    lists = {
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [1] * 48,
        "tokenizer.ggml.merges": ["! !"],
    }
    write_gguf(tmp_path / "m.gguf", LLAMA, extra=keys | lists)
    path = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert (path / "chat_template.jinja").read_text() == "A"
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == [{"name": "tool_use", "template": "B"}]


def test_more_tokens_than_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_jax.convert.gguf_tokenizer as module

    content = json.dumps({"model": {"vocab": {f"t{i}": i for i in range(49)}}})
    monkeypatch.setattr(module, "tokenizer_files", lambda metadata: {"tokenizer.json": content})
    write_gguf(tmp_path / "m.gguf", LLAMA)
    with pytest.raises(CheckpointError, match="ids up to 48, the model's vocabulary ends at 47"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
