"""Checkpoints to GGUF files, against llama.cpp's own converter, the gguf package, and our reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from helpers import GOLDEN_CASES
from test_export_hf import flip
from tiny_models import DTYPES, LLAMA, LLAMA4, MIXTRAL, assert_equal, loaded, random_leaves, write_hf

from llama_jax.checkpoint import open_checkpoint, save
from llama_jax.config import config_from_hf
from llama_jax.convert import GGUF_TYPES, convert, export_gguf
from llama_jax.convert.gguf import GgufModel, half_rotation, pair_rotation
from llama_jax.convert.gguf_config import PERMUTED, ROPE_FACTORS, llama3_factors
from llama_jax.convert.gguf_pre_tokenizers import PRE_TOKENIZERS
from llama_jax.convert.gguf_tokenizer import tokenizer_files
from llama_jax.errors import CheckpointError, RequestError, StorageError, UnsupportedModel
from llama_jax.model.rope import rope_frequencies
from llama_jax.params import init_params, param_specs, unflatten
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "data"
TOKENIZERS = DATA / "tokenizer"
EXPECTED = json.loads((TOKENIZERS / "expected_small.json").read_text())
REFERENCE = json.loads((DATA / "gguf_reference.json").read_text())
"""The goldens as converted by llama.cpp's convert_hf_to_gguf.py (scripts/make_gguf_reference.py)."""
REFUSED = {
    "llama-gelu": "activation",
    "llama-rope-dynamic": "rope",
    "llama-rope-yarn-attention-factor": "rope",
    "llama-rope-yarn-mscale": "rope",
    "llama4-interleaved": "layers",
    "llama4-scout-like": "layers",
    "llama4-text": "layers",
    "qwen2-windows": "sliding_window",
    "qwen3-bias": "o_bias",
    "smollm3-window": "sliding_window",
}
"""Models that llama.cpp would compute otherwise, and what of them it does not have."""
PUBLISHED_LLAMA4 = LLAMA4 | {"attention_chunk_size": 8192, "num_hidden_layers": 4, "head_dim": 16}
"""The sizes that llama.cpp has built in."""


def fields(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def checkpoint(folder: Path, hf: dict[str, Any], files: dict[str, Any] | None = None) -> Path:
    """A converted random model, without a tokenizer unless `files` holds one."""
    write_hf(folder / "hf", hf)
    (folder / "hf" / "tokenizer.json").unlink()
    for name, content in (files or {}).items():
        (folder / "hf" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return convert(folder / "hf", folder / "checkpoint")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(set(GOLDEN_CASES) - REFUSED.keys()))
def test_goldens_are_what_llama_cpp_makes_of_them(tmp_path: Path, goldens: Path, case: str) -> None:
    """Metadata, types, shapes and bytes of all tensors; and our reader gets the same model back."""
    source = convert(goldens / case, tmp_path / "c")
    made = export_gguf(source, tmp_path / "m.gguf", kind="f32")
    found, expected = fields(tmp_path / "m.gguf"), REFERENCE[case]
    ours = {key: found.get(key) for key in expected["metadata"]}
    assert ours == expected["metadata"]
    tensors = {
        tensor.name: [
            tensor.tensor_type.name,
            [int(n) for n in tensor.shape[::-1]],
            hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16],
        ]
        for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    wanted = dict(expected["tensors"])
    if ROPE_FACTORS in wanted:
        found_factors = next(t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == ROPE_FACTORS)
        np.testing.assert_allclose(found_factors, wanted.pop(ROPE_FACTORS)[2], rtol=1e-6)
        del tensors[ROPE_FACTORS]
    assert tensors == wanted
    assert made.tensors == len(expected["tensors"])

    opened = open_checkpoint(source)
    model = GgufModel(tmp_path / "m.gguf")
    assert set(model.config.eos_token_ids) == set(opened.config.eos_token_ids)
    same = {"family": opened.config.family, "dtype": opened.config.dtype, "eos_token_ids": opened.config.eos_token_ids}
    assert model.config.replace(**same) == opened.config
    leaves = loaded(source)
    for spec in param_specs(model.config):
        assert model.read(spec).tobytes() == leaves[spec.name].astype(np.float32).tobytes(), spec.name
    model.close()


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path: Path, goldens: Path, case: str) -> None:
    source = convert(goldens / case, tmp_path / "c")
    with pytest.raises(UnsupportedModel, match=f"cannot be exported to GGUF: .*{REFUSED[case]}"):
        export_gguf(source, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "hf",
    [
        PUBLISHED_LLAMA4,
        PUBLISHED_LLAMA4
        | {
            "interleave_moe_layer_step": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ],
    ids=["interleaved", "scout"],
)
def test_llama4(tmp_path: Path, hf: dict[str, Any]) -> None:
    source = checkpoint(tmp_path, hf)
    export_gguf(source, tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["general.architecture"] == "llama4"
    model = GgufModel(tmp_path / "m.gguf")
    model.close()
    # generation_config.json names one more id.
    assert model.config.replace(eos_token_ids=(2,)) == open_checkpoint(source).config
    assert_equal(convert(tmp_path / "m.gguf", tmp_path / "again"), loaded(source))


@pytest.mark.parametrize("change", [{"attention_chunk_size": 4096}, {"floor_scale": 100}, {"attention_bias": True}])
def test_other_llama4_models_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be exported to GGUF"):
        export_gguf(checkpoint(tmp_path, PUBLISHED_LLAMA4 | change), tmp_path / "m.gguf")


@pytest.mark.parametrize("hf", [LLAMA, MIXTRAL, PUBLISHED_LLAMA4], ids=["dense", "experts", "llama4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_type_no_number_changes(tmp_path: Path, hf: dict[str, Any], dtype: str) -> None:
    source = checkpoint(tmp_path, hf | {"dtype": dtype})
    made = export_gguf(source, tmp_path / "m.gguf")
    assert made.dtype == {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    model, leaves = GgufModel(tmp_path / "m.gguf"), loaded(source)
    for spec in param_specs(model.config):
        found = model.read(spec)
        if len(spec.shape) > 1 and "router" not in spec.name:
            assert found.dtype == leaves[spec.name].dtype, spec.name
        np.testing.assert_array_equal(found.astype(np.float32), leaves[spec.name].astype(np.float32))
    model.close()


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_types(tmp_path: Path, kind: str) -> None:
    """Each is what the gguf package makes of the whole tensor, in the order that llama.cpp rotates."""
    hf = MIXTRAL | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    source = checkpoint(tmp_path, hf)
    made = export_gguf(source, tmp_path / "m.gguf", kind=kind)
    assert fields(tmp_path / "m.gguf")["general.file_type"] == int(GGUF_TYPES[kind])
    config, leaves = open_checkpoint(source).config, loaded(source)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for spec in param_specs(config):
        wanted = gguf.GGMLQuantizationType[kind.upper()]
        if len(spec.shape) == 1 or "router" in spec.name:
            wanted = gguf.GGMLQuantizationType.F32
        elif spec.name in ("embed.weight", "lm_head.weight") and kind.startswith("q"):
            wanted = gguf.GGMLQuantizationType.Q8_0
        leaf = leaves[spec.name]
        for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if part in spec.name:
                leaf = leaf.reshape(heads, 2, -1, leaf.shape[-1]).swapaxes(1, 2).reshape(leaf.shape)
        tensor = found[spec.gguf]
        assert tensor.tensor_type == wanted, spec.name
        assert tensor.data.tobytes() == gguf.quantize(leaf, wanted).tobytes(), spec.name
    assert (made.dtype, made.notes) == (kind, ("the checkpoint has no tokenizer",))


def test_rows_that_do_not_divide_into_blocks_stay_f16(tmp_path: Path) -> None:
    made = export_gguf(
        checkpoint(tmp_path, LLAMA | {"hidden_size": 32, "head_dim": 8}), tmp_path / "m.gguf", kind="q8_0"
    )
    assert "2 tensors are stored as f16" in made.notes[-1]
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_large_tensors_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path, LLAMA | {"hidden_size": 64, "intermediate_size": 32})
    export_gguf(source, tmp_path / "a.gguf", kind="q4_0")
    monkeypatch.setattr("llama_jax.convert.casting._BLOCK_BYTES", 100)
    export_gguf(source, tmp_path / "b.gguf", kind="q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_ignored_windows_are_said(tmp_path: Path) -> None:
    window = LLAMA | {"model_type": "mistral", "sliding_window": 16}
    assert "beyond 16 tokens" in export_gguf(checkpoint(tmp_path, window), tmp_path / "m.gguf").notes[0]
    (tmp_path / "wide").mkdir()
    wide = LLAMA | {"model_type": "mistral", "sliding_window": 64}
    made = export_gguf(checkpoint(tmp_path / "wide", wide), tmp_path / "w.gguf")
    assert made.notes == ("the checkpoint has no tokenizer",)


@pytest.mark.parametrize(("factor", "high"), [(8.0, 4.0), (32.0, 4.0), (16.0, 1.0)])
def test_rope_factors_are_those_of_forward(factor: float, high: float) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": high, "original_max_position_embeddings": 8192}
    spec = config_from_hf(LLAMA | {"rope_parameters": rope}).rope
    plain = config_from_hf(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}).rope
    divided = rope_frequencies(plain, 128)[0] / llama3_factors(500000.0, 64, factor, high, 8192)
    np.testing.assert_allclose(divided, rope_frequencies(spec, 128)[0], rtol=1e-5)


def test_rotations_are_inverse() -> None:
    rng = np.random.default_rng(0)
    for shape in ((24, 5), (24,)):
        array = rng.standard_normal(shape)
        np.testing.assert_array_equal(half_rotation(pair_rotation(array, 3), 3), array)
        assert not np.array_equal(pair_rotation(array, 3), array)
    assert "llama4" not in PERMUTED


# --- tokenizers -------------------------------------------------------------------------------------------------------


def metadata_of(name: str, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((TOKENIZERS / f"{name}_gguf.json").read_text())
    return content | {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}


def exported(folder: Path, files: dict[str, Any], tokens: int, **hf: Any) -> tuple[dict[str, Any], Tokenizer]:
    """Metadata of the exported file, and the tokenizer that is read from it."""
    source = checkpoint(folder, LLAMA | {"vocab_size": tokens} | hf, files)
    export_gguf(source, folder / "m.gguf")
    return fields(folder / "m.gguf"), load_tokenizer(convert(folder / "m.gguf", folder / "again"))


@pytest.mark.slow
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "llama4", "starcoder"])
def test_byte_level_tokenizers_come_back(tmp_path: Path, pre: str) -> None:
    metadata = metadata_of("byte_level", ggml__pre=pre)
    found, tokenizer = exported(tmp_path, tokenizer_files(metadata), 3008)
    for key in ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert found[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
    name = {"starcoder": "smollm"}.get(pre, pre)  # two names of one split
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.add_bos_token"] is PRE_TOKENIZERS[pre].adds_bos
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"][name], strict=True):
        assert tokenizer.encode(text) == (ids[1:] if ids[:2] == [1, 1] else ids), text


@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer.model", "metaspace"])
def test_sentencepiece_tokenizers_come_back(tmp_path: Path, form: str) -> None:
    metadata = metadata_of("sentencepiece")
    files: dict[str, Any] = {"tokenizer.model": (TOKENIZERS / "sentencepiece.model").read_bytes()}
    if form != "tokenizer.model":
        files = tokenizer_files(metadata)
    if form == "metaspace":  # as transformers writes it
        content = json.loads(files["tokenizer.json"])
        content["normalizer"] = None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        files["tokenizer.json"] = json.dumps(content)
    found, tokenizer = exported(tmp_path, files, 900)
    for key in ("model", "pre", "tokens", "bos_token_id", "eos_token_id", "unknown_token_id"):
        assert found[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.add_space_prefix"] is True
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"]["llama"], strict=True):
        assert tokenizer.encode(text) == ids, text
    # llama.cpp joins by score alone: better scores must mean the same merges as before.
    scores, wanted = (np.array(m["tokenizer.ggml.scores"]) for m in (found, metadata))
    joined = [i for i, t in enumerate(metadata["tokenizer.ggml.tokens"]) if len(t) > 1 and wanted[i] < 0]
    np.testing.assert_array_equal(np.argsort(-scores[joined]), np.argsort(-wanted[joined]))


def test_ids_without_a_token_are_filled_up(tmp_path: Path) -> None:
    found, tokenizer = exported(tmp_path, tokenizer_files(metadata_of("byte_level")), 3010)
    assert found["tokenizer.ggml.tokens"][3008:] == ["[PAD3008]", "[PAD3009]"]
    assert found["tokenizer.ggml.token_type"][3008:] == [5, 5]
    assert tokenizer.encode("the quick") == load_tokenizer(tmp_path / "hf").encode("the quick")


def test_all_ids_that_end_a_text(tmp_path: Path) -> None:
    found, _ = exported(tmp_path, tokenizer_files(metadata_of("byte_level")), 3008, eos_token_id=[0, 2])
    # The tokenizer's own first, then those of config.json and of generation_config.json.
    assert [found[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")] == [2, 0, 3]
    assert set(open_checkpoint(tmp_path / "again").config.eos_token_ids) == {0, 2, 3}


def test_more_ends_than_gguf_names_are_said(tmp_path: Path) -> None:
    source = checkpoint(
        tmp_path,
        LLAMA | {"vocab_size": 3008, "eos_token_id": [0, 2, 5]},
        tokenizer_files(metadata_of("byte_level")),
    )
    assert "GGUF names 3 ids that end a text, this model has 4" in export_gguf(source, tmp_path / "m.gguf").notes


def test_chat_templates(tmp_path: Path) -> None:
    files = tokenizer_files(metadata_of("byte_level"))
    config = json.loads(files["tokenizer_config.json"])
    config["chat_template"] = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    files["tokenizer_config.json"] = json.dumps(config)
    source = checkpoint(tmp_path, LLAMA | {"vocab_size": 3008}, files)
    export_gguf(source, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.chat_template"] == "plain"
    assert found["tokenizer.chat_template.tool_use"] == "tools"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def test_normalisation_that_llama_cpp_lacks_is_said(tmp_path: Path) -> None:
    files = tokenizer_files(metadata_of("byte_level", ggml__pre="qwen2"))
    content = json.loads(files["tokenizer.json"]) | {"normalizer": {"type": "NFC"}}
    files["tokenizer.json"] = json.dumps(content)
    made = export_gguf(checkpoint(tmp_path, LLAMA | {"vocab_size": 3008}, files), tmp_path / "m.gguf")
    assert "NFC" in made.notes[0]


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, LLAMA)
    assert export_gguf(source, tmp_path / "m.gguf").notes == ("the checkpoint has no tokenizer",)
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.model"] == "none"
    again = convert(tmp_path / "m.gguf", tmp_path / "again")
    assert_equal(again, loaded(source))
    assert not (again / "tokenizer.json").exists()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def edit(files: dict[str, Any]) -> dict[str, Any]:
        content = json.loads(files["tokenizer.json"])
        change(content)
        return files | {"tokenizer.json": json.dumps(content)}

    return edit


UNSUPPORTED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "word pieces": (
        "byte_level",
        lambda c: c.update(model={"type": "WordLevel", "vocab": {"<|im_start|>": 1, "b": 2}, "unk_token": "b"}),
        "no WordLevel tokenizer",
    ),
    "unknown split": (
        "byte_level",
        lambda c: c.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
        ),
        "no name for how this tokenizer splits",
    ),
    "lower case": ("byte_level", lambda c: c.update(normalizer={"type": "Lowercase"}), "normaliser Lowercase"),
    "other spaces": (
        "sentencepiece",
        lambda c: c.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": True}),
        "how this tokenizer treats spaces",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_tokenizers_that_gguf_cannot_say_are_refused(tmp_path: Path, case: str) -> None:
    name, change, message = UNSUPPORTED[case]
    files = edited(change)(tokenizer_files(metadata_of(name)))
    source = checkpoint(tmp_path, LLAMA | {"vocab_size": 3008}, files)
    with pytest.raises(UnsupportedModel, match=message):
        export_gguf(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_that_reads_back_differently_is_refused(tmp_path: Path) -> None:
    """GGUF has scores instead of merges, so every way to build a piece joins."""

    def change(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        content["model"]["merges"] = [merge for i, merge in enumerate(merges) if i % 3 or len("".join(merge)) < 3]

    files = edited(change)(tokenizer_files(metadata_of("sentencepiece")))
    source = checkpoint(tmp_path, LLAMA | {"vocab_size": 900}, files)
    with pytest.raises(UnsupportedModel, match="would encode text differently"):
        export_gguf(source, tmp_path / "m.gguf")


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    config = config_from_hf(LLAMA | {"vocab_size": 3007})
    params = init_params(config, jax.random.key(0))
    # A conversion would have refused it.
    source = save(tmp_path / "checkpoint", params, config, files=tokenizer_files(metadata_of("byte_level")))
    with pytest.raises(CheckpointError, match="has the id 3007, the embedding only 3007 rows"):
        export_gguf(source, tmp_path / "m.gguf")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_wrong_arguments(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, LLAMA)
    with pytest.raises(RequestError, match=r"does not end in \.gguf"):
        export_gguf(source, tmp_path / "model")
    with pytest.raises(RequestError, match="q3_k"):
        export_gguf(source, tmp_path / "m.gguf", kind="q3_k")


def test_existing_files(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, LLAMA)
    export_gguf(source, tmp_path / "m.gguf")
    with pytest.raises(StorageError, match="exists"):
        export_gguf(source, tmp_path / "m.gguf")
    export_gguf(source, tmp_path / "m.gguf", kind="f16", overwrite=True)
    assert fields(tmp_path / "m.gguf")["general.file_type"] == 1
    (tmp_path / "n.gguf").write_text("my notes")
    (tmp_path / "d.gguf").mkdir()
    for name in ("n.gguf", "d.gguf"):
        with pytest.raises(StorageError, match="not an export"):
            export_gguf(source, tmp_path / name, overwrite=True)


def test_flipped_bit(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, LLAMA)
    flip(source)
    with pytest.raises(CheckpointError, match=r"tensor \S+ (has digest|cannot be read)"):
        export_gguf(source, tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_values_too_large_for_the_type(tmp_path: Path) -> None:
    config = config_from_hf(LLAMA)
    leaves = random_leaves(config)
    leaves["layers.1.mlp.up_proj.weight"][0, 0] = 7e4
    save(tmp_path / "c", unflatten(leaves), config)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight holds 1 values that are too large for float16"):
        export_gguf(tmp_path / "c", tmp_path / "m.gguf", kind="f16")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_leftover_of_a_killed_export_is_cleared_away(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, LLAMA)
    (tmp_path / "m.gguf.partial").write_bytes(b"GGUF and half a header")
    export_gguf(source, tmp_path / "m.gguf")
    (tmp_path / "n.gguf.partial").write_text("my notes")
    with pytest.raises(StorageError, match="in the way"):
        export_gguf(source, tmp_path / "n.gguf")
    assert (tmp_path / "n.gguf.partial").read_text() == "my notes"
