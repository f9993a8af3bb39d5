"""Failures of quantised weights in other projects, case by case.

Other modules hold these:

| Case | Test |
| --- | --- |
| a zero of 0, which version 1 of GPTQ cannot hold | test_convert_quantized::test_a_gptq_zero_of_0_... |
| act order split over devices | test_quantization::test_on_a_mesh; what cannot be split is refused below |
| fused projections with unequal scales | test_quantize_command::test_joint_projections_of_unequal_parts |
| scales cast to the dtype of the computation | test_quantize_command::test_scales_keep_their_dtype |
| a head in few bits without its scale | test_quantization::test_models_compute_with_what_is_stored |
| codes found before their scale was rounded | test_quantization::test_every_code_is_the_nearest |
| the fifth bits of Q5, i and i + 16 | test_convert_kept::test_codes_of_gguf_are_the_packages |
| right on one chip, wrong on another | test_kernels_checking: kernels are checked on the chip that they run on |
"""

from __future__ import annotations

import json
import tracemalloc
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from helpers import TINY, error, random_params, random_tokens, run
from safetensors.numpy import load_file, save_file
from test_convert_kept import decoded
from test_convert_quantized import (
    DATA,
    Q,
    copy_case,
    edit_config,
    weights,
    weights_group,
    write_experts_in_blocks,
    write_experts_of_fbgemm,
    write_fp8,
)
from tiny_models import LLAMA, write_gguf

from llama_jax.checkpoint import load_params, open_checkpoint
from llama_jax.config import preset
from llama_jax.convert import convert
from llama_jax.convert.opening import open_source
from llama_jax.convert.quantized.codes import packed_words, unpack
from llama_jax.errors import CheckpointError, RequestError
from llama_jax.layout import check
from llama_jax.model.fuse import fuse_params
from llama_jax.model.quantization import dequantize_params
from llama_jax.params import flatten
from llama_jax.schemes import scheme_named


def change_tensors(folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Changes tensors of the query projection by their parts' names; None removes one. Gives what there was."""
    file = folder / "model.safetensors"
    before = load_file(file)
    after = before | {f"{Q}.{part}": array for part, array in changes.items()}
    save_file({name: array for name, array in after.items() if array is not None}, file)
    return before


def kept_and_decoded(source: Path) -> tuple[dict[str, str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Schemes that a source keeps, and its weights decoded from them and read directly."""
    with closing(open_source(source)) as plain, closing(open_source(source, dequantize=False)) as kept:
        return dict(kept.config.schemes), decoded(kept), decoded(plain)


def assert_same(source: Path) -> dict[str, str]:
    """Checks that weights are the same either way; gives what is kept."""
    schemes, found, expected = kept_and_decoded(source)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    return schemes


def test_01_zeros_of_the_other_version(tmp_path: Path) -> None:
    """A file of version 2 that says it is of version 1 decodes to weights that are all off by a scale: symmetric codes
    show it."""
    folder = copy_case(tmp_path, "gptq-int4")
    middle = np.full((2, 8), 0x88888888, np.uint32).view(np.int32)
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if name.endswith(".qzeros")]
    less = middle - 0x11111111
    for stored, version, ok in ((middle, "gptq_v2", True), (middle, "gptq", False), (less, "gptq", True)):
        zeros = {n: np.full_like(tensors[n], stored.flat[0]) for n in names}
        save_file(tensors | zeros, folder / "model.safetensors")
        edit_config(folder, checkpoint_format=version, sym=True)
        if ok:
            assert weights(folder)[f"{Q}.weight"].any()
            continue
        with pytest.raises(CheckpointError, match=r"zeros from 9 to 9, where symmetric codes have 8") as caught:
            weights(folder)
        assert '"gptq_v2"' in str(caught.value.hint)


def test_03_act_order_that_cannot_be_split() -> None:
    """Routed experts are computed on each device's own columns, among which the order of all does not lead."""
    for leaf, ok in (("layers.0.moe.experts.down_proj", False), ("layers.0.moe.experts.up_proj", True)):
        config = TINY["softmax-moe"].replace(schemes=((leaf, "int4_g2_zero_ordered"),))
        if ok:
            check(config, {"tensor": 2})
            continue
        with pytest.raises(RequestError, match=r"experts\.down_proj .* in an order of their own"):
            check(config, {"tensor": 2})
    check(TINY["plain"].replace(schemes=(("layers.0.mlp.down_proj", "int4_g4_zero_ordered"),)), {"tensor": 2})


@pytest.mark.parametrize(("width", "devices", "each"), [(11008, 4, "2752"), (29568, 2, "14784")])
def test_04_groups_that_a_split_cuts(width: int, devices: int, each: str) -> None:
    """Of Llama-2-7B and Qwen2-72B."""
    layers = tuple(replace(layer, mlp=width) for layer in preset("llama-3.1-70b").layers)
    config = preset("llama-3.1-70b").replace(layers=layers, schemes=(("layers.0.mlp.down_proj", "int4_g128"),))
    with pytest.raises(RequestError, match=rf"128 of its {width} .*{each} each"):
        check(config, {"tensor": devices})


def test_05_rows_that_groups_do_not_divide(tmp_path: Path) -> None:
    """The last group of a row is shorter: decoded, and the same."""
    folder = copy_case(tmp_path, "gptq-int4")
    config = json.loads((folder / "config.json").read_text())
    before = weights(folder)
    tensors = load_file(folder / "model.safetensors")
    # 64 inputs in groups of 48: of the first 48 one scale, of the last 16 another.
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        stem, groups = name.removesuffix("g_idx"), np.arange(tensors[name].size, dtype=np.int32) // 48
        tensors[name] = groups
        for part in ("qzeros", "scales"):
            tensors[f"{stem}{part}"] = tensors[f"{stem}{part}"][: groups[-1] + 1]
    config["quantization_config"]["group_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    schemes = assert_same(folder)
    assert "layers.0.attn.q_proj" not in schemes
    after = weights(folder)[f"{Q}.weight"]
    # Columns 32 to 47 now have the first group's scale and zero; the others keep their own.
    np.testing.assert_array_equal(after[:, :32], before[f"{Q}.weight"][:, :32])
    np.testing.assert_array_equal(after[:, 48:], before[f"{Q}.weight"][:, 48:])
    assert (after[:, 32:48] != before[f"{Q}.weight"][:, 32:48]).any()


def test_07_packed_zero_points(tmp_path: Path) -> None:
    """Packed or not they are the same; without them the codes mean nothing."""
    folder = copy_case(tmp_path, "ct-int4-group-asymmetric")
    expected = weights(folder)
    packed = load_file(folder / "model.safetensors")[f"{Q}.weight_zero_point"]
    plain = np.ascontiguousarray(unpack(packed.T, 4, 64).T.astype(np.int8) - np.int8(8))
    before = change_tensors(folder, weight_zero_point=plain)
    assert plain.shape != packed.shape
    for name, array in weights(folder).items():
        np.testing.assert_array_equal(array, expected[name])
    assert_same(folder)
    save_file(before, folder / "model.safetensors")
    change_tensors(folder, weight_zero_point=None)
    with pytest.raises(CheckpointError, match="lacks its tensor 'zero_point'"):
        weights(folder)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_08_bits_that_do_not_divide_words(bits: int, tmp_path: Path) -> None:
    """As a stream, or as many in a word as it holds whole: compressed-tensors has written both. weight_shape decides
    how many numbers there are, zero points are packed likewise."""
    rng, found = np.random.default_rng(bits), []
    codes, zeros = rng.integers(0, 2**bits, (64, 64)), rng.integers(0, 2**bits, (64, 1))
    scales = rng.uniform(0.1, 0.2, (64, 1)).astype(np.float16)
    for i, pack in enumerate((as_stream, as_whole)):
        (tmp_path / str(i)).mkdir()
        folder = copy_case(tmp_path / str(i), "ct-int3-channel-asymmetric")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = bits
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            stem, (rows, cols) = name.removesuffix("packed"), tensors[name.replace("packed", "shape")]
            wide = np.tile(codes, (2, 2))[:rows, :cols]
            tensors[name] = pack(wide, bits)
            tensors[f"{stem}scale"] = np.tile(scales, (2, 1))[:rows]
            tensors[f"{stem}zero_point"] = np.ascontiguousarray(pack(np.tile(zeros, (2, 1))[:rows].T, bits).T)
        save_file(tensors, folder / "model.safetensors")
        found.append(weights(folder)[f"{Q}.weight"])
        assert set(assert_same(folder).values()) == {"int4_zero" if bits < 4 else "int8_zero"}
    expected = (codes - zeros).astype(np.float32) * scales.astype(np.float32)
    for array in found:
        np.testing.assert_array_equal(array, expected.astype(array.dtype))


def as_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Lowest bits first, across the ends of words: int32 [rows, words]."""
    each = codes[..., None] >> np.arange(bits) & 1
    stream = np.zeros((len(codes), 32 * packed_words(bits, codes.shape[1])[0]), np.uint8)
    stream[:, : each[0].size] = each.reshape(len(codes), -1)
    return np.packbits(stream, axis=-1, bitorder="little").view(np.int32)


def as_whole(codes: np.ndarray, bits: int) -> np.ndarray:
    """As many numbers in each word as it holds whole."""
    in_word = 32 // bits
    words = np.zeros((len(codes), -(-codes.shape[1] // in_word)), np.uint32)
    for j in range(codes.shape[1]):
        words[:, j // in_word] |= codes[:, j].astype(np.uint32) << np.uint32(bits * (j % in_word))
    return words.view(np.int32)


def assert_computes_as_decoded(path: Path) -> None:
    """Logits of a checkpoint's quantised weights are those of the decoded ones."""
    params, stored = load_params(path, dtype="float32"), open_checkpoint(path).config
    plain, floats = dequantize_params(params, stored, jnp.float32)
    tokens = random_tokens(stored, 1, 4)
    assert error(run(params, stored, tokens)[0], run(plain, floats, tokens)[0]) < 2e-5


def test_09_a_head_of_its_own(tmp_path: Path) -> None:
    """Quantised like any other layer, with its scales, and multiplied so."""
    folder = copy_case(tmp_path, "gptq-int4")
    config = json.loads((folder / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace(Q, "lm_head"): a for name, a in tensors.items() if name.startswith(f"{Q}.")}
    tensors["model.embed_tokens.weight"] = np.tile(tensors["model.embed_tokens.weight"], (2, 1))
    save_file(tensors, folder / "model.safetensors")
    assert assert_same(folder)["lm_head"].startswith("int4_g32_zero")
    assert_computes_as_decoded(convert(folder, tmp_path / "m"))


@pytest.mark.parametrize("case", ["twice", "differs"])
def test_10_a_tied_head_that_is_stored(case: str, tmp_path: Path) -> None:
    """Beside a plain embedding a plain copy is left out; a quantised one is no copy, and refused by name."""
    folder = copy_case(tmp_path, "gptq-int4")
    tensors = load_file(folder / "model.safetensors")
    if case == "twice":
        save_file(
            tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, folder / "model.safetensors"
        )
        assert "lm_head.weight" not in weights(folder)
        return
    head = {name.replace(Q, "lm_head"): a for name, a in tensors.items() if name.startswith(f"{Q}.")}
    save_file(tensors | head, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says tie_word_embeddings, but tensor lm_head\.weight differs"):
        weights(folder)


def test_10_a_quantised_embedding(tmp_path: Path) -> None:
    """Its rows are looked up, and as a tied head multiplied with, as they are decoded."""
    folder = copy_case(tmp_path, "ct-int8-channel")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    config["quantization_config"].pop("ignore", None)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    floats = tensors["model.embed_tokens.weight"].astype(np.float32)
    scale = np.abs(floats).max(1, keepdims=True) / 127
    tensors["model.embed_tokens.weight"] = np.round(floats / scale).astype(np.int8)
    tensors["model.embed_tokens.weight_scale"] = scale.astype(tensors[f"{Q}.weight_scale"].dtype)
    save_file(tensors, folder / "model.safetensors")
    assert assert_same(folder)["embed"].startswith("int8")
    assert_computes_as_decoded(convert(folder, tmp_path / "m"))


@pytest.mark.parametrize("case", ["fbgemm-row", "fbgemm-column", "blocks"])
def test_11_stacked_experts(case: str, tmp_path: Path) -> None:
    """Turned round or taken apart, with their scales: kept, and the same; none is left unmapped."""
    if case == "blocks":
        write_experts_in_blocks(tmp_path / "hf")
    else:
        write_experts_of_fbgemm(tmp_path / "hf", case.removeprefix("fbgemm-"))
    schemes = assert_same(tmp_path / "hf")
    kept = {leaf.rpartition(".")[2] for leaf in schemes if ".experts." in leaf}
    # Rows of 24 do not divide into blocks of 16.
    assert kept == {"gate_proj", "up_proj"} | (set() if case == "blocks" else {"down_proj"})


def test_12_every_byte_of_an_8_bit_float(tmp_path: Path) -> None:
    """0x80 is -0, which fnuz would take for NaN; what is NaN here is refused."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    codes = np.where(np.isnan(codes.astype(np.float32)), ml_dtypes.float8_e4m3fn(1), codes)
    hf, tensors = fp8_model(np.tile(codes, (64, 1))[:, :64], np.tile(codes, (64, 1))[:, 64:128])
    write_fp8(tmp_path / "a", hf, tensors)
    assert assert_same(tmp_path / "a")["layers.0.mlp.up_proj"] == "fp8"
    found = weights(tmp_path / "a")["model.layers.0.mlp.up_proj.weight"]
    assert np.isfinite(found.astype(np.float32)).all()
    hf, tensors = fp8_model(np.tile(codes, (64, 1))[:, 128:192], np.full((64, 64), 0x7F, np.uint8).view(codes.dtype))
    write_fp8(tmp_path / "b", hf, tensors)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        convert(tmp_path / "b", tmp_path / "out")


def fp8_model(gate: np.ndarray, up: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A Hugging Face model whose MLP has these codes, with scales of tensors."""
    from tiny_models import hf_tensors, random_leaves

    from llama_jax.config import config_from_hf

    hf = LLAMA | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    config = config_from_hf(hf)
    tensors = hf_tensors(config, random_leaves(config))
    for name, codes in (("gate_proj", gate), ("up_proj", up)):
        full = f"model.layers.0.mlp.{name}.weight"
        tensors |= {full: codes, f"{full}_scale_inv": np.float32([0.5])}
    return hf | {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, tensors


@pytest.mark.usefixtures("without_tokenizer")
def test_14_types_that_differ_within_a_fused_matrix(tmp_path: Path) -> None:
    """llama.cpp's Q4_K_M has values in Q6_K beside queries and keys in Q4_K: each keeps its own, and none is joined
    with what is unlike it."""
    hf = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    kinds = {"attn_v": Kind.Q6_K, "ffn_down": Kind.Q6_K, "ffn_up": Kind.Q5_K}
    write_mixed(tmp_path / "m.gguf", hf, lambda name: kinds.get(name.split(".")[-2], Kind.Q4_K))
    schemes = assert_same(tmp_path / "m.gguf")
    assert schemes["layers.0.attn.q_proj"] == "int4_g32_min_f32"
    assert schemes["layers.0.attn.v_proj"] == schemes["layers.0.mlp.down_proj"] == "int8_g16_f32"
    assert schemes["layers.0.mlp.up_proj"] == "int8_g32_min_f32"
    path = convert(tmp_path / "m.gguf", tmp_path / "out")
    params, stored = load_params(path, dtype="float32"), open_checkpoint(path).config
    fused = fuse_params(params, stored)
    assert "qkv_proj" not in fused["layers"]["0"]["attn"]
    plain, floats = dequantize_params(params, stored, jnp.float32)
    tokens = random_tokens(stored, 1, 4)
    assert error(run(fused, stored, tokens)[0], run(plain, floats, tokens)[0]) < 2e-5


@pytest.mark.usefixtures("without_tokenizer")
def test_15_rows_without_a_k_type(tmp_path: Path) -> None:
    """Rows of 576 do not divide into blocks of 256: llama.cpp writes them in Q5_0 or Q8_0, which are kept, too; a file
    that claims otherwise is damaged."""
    hf = LLAMA | {"hidden_size": 576, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
    write_mixed(tmp_path / "m.gguf", hf, lambda name: Kind.Q6_K if "ffn_down" in name else Kind.Q5_0)
    schemes = assert_same(tmp_path / "m.gguf")
    assert schemes["layers.0.attn.q_proj"] == "int8_g32"
    assert schemes["layers.0.mlp.down_proj"] == "int8_g16_f32"
    raw = (tmp_path / "m.gguf").read_bytes()
    at = raw.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    assert raw[at] == Kind.Q5_0
    (tmp_path / "n.gguf").write_bytes(raw[:at] + bytes([Kind.Q6_K]) + raw[at + 1 :])
    with pytest.raises(CheckpointError, match="rows do not divide into blocks of 256"):
        open_source(tmp_path / "n.gguf")


def write_mixed(path: Path, hf: dict[str, Any], kind_of: Any) -> None:
    """A GGUF model of which each matrix of a layer has a type of its own, with random blocks."""
    write_gguf(path.with_suffix(".plain"), hf)
    reader, rng = gguf.GGUFReader(path.with_suffix(".plain")), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            kind = kind_of(tensor.name)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            raw = rng.integers(0, 256, (tensor.shape[1], tensor.shape[0] // block * size), np.uint8)
            for at in SCALES[kind]:  # small numbers in float16, of a sign at random
                high = raw.reshape(-1, size)[:, at + 1]
                high[:] = high & 0x80 | 0x10
            writer.add_tensor(tensor.name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q5_0: (0,)}
"""Bytes of a block at which a scale in float16 lies."""


def test_17_groups_of_odd_size(tmp_path: Path) -> None:
    """Two codes in a byte would belong to two groups: decoded, and the same."""
    folder = copy_case(tmp_path, "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 11
    (folder / "config.json").write_text(json.dumps(config))
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(".qweight")]:
        stem, (inputs, words) = name.removesuffix("qweight"), tensors[name].shape
        groups = -(-inputs // 11)
        tensors[f"{stem}qzeros"] = rng.integers(-(2**31), 2**31, (groups, words), np.int32)
        tensors[f"{stem}scales"] = rng.uniform(0.1, 0.2, (groups, 8 * words)).astype(tensors[f"{stem}scales"].dtype)
    save_file(tensors, folder / "model.safetensors")
    assert not assert_same(folder)
    assert scheme_named("int4_g32_zero").layout is not None
    with pytest.raises(Exception, match="int4_g11_zero"):
        scheme_named("int4_g11_zero")


def test_mxfp4(tmp_path: Path) -> None:
    """Four-bit floats with powers of two as scales, in the layout of compressed-tensors' `mxfp4/base.py`: their
    doubles are whole numbers, so they are kept, and the same. A scale of 255 is NaN."""
    folder = copy_case(tmp_path, "ct-int4-group")
    edit_config(folder, format="mxfp4-pack-quantized", **weights_group(type="float"))
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        stem, (rows, words) = name.removesuffix("packed"), tensors[name].shape
        tensors[name] = rng.integers(0, 256, (rows, 4 * words), np.uint8)
        tensors[f"{stem}scale"] = rng.integers(120, 130, (rows, words // 4), np.uint8)
        del tensors[f"{stem}shape"]
    save_file(tensors, folder / "model.safetensors")
    assert set(assert_same(folder).values()) == {"int8_g32_bf16"}
    packed, exponents = tensors[f"{Q}.weight_packed"], tensors[f"{Q}.weight_scale"].astype(int) - 127
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(64, 64)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes > 7, -1, 1)
    found = weights(folder)[f"{Q}.weight"]
    np.testing.assert_array_equal(found, (numbers * np.repeat(2.0**exponents, 32, axis=1)).astype(found.dtype))
    tensors[f"{Q}.weight_scale"][3, 1] = 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        convert(folder, tmp_path / "out")


def test_groups_far_beyond_those_there_are(tmp_path: Path) -> None:
    """A damaged number of a group is named; memory for as many groups is not asked for."""
    folder = copy_case(tmp_path, "gptq-int4-act-order")
    change_tensors(folder, g_idx=np.full(64, 1 << 24, np.int32))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="groups from 16777216 to 16777216, there are 2"):
            convert(folder, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_members_of_an_order(tmp_path: Path) -> None:
    """A column order is stored beside the codes, survives a checkpoint, and leaves products as they are."""
    path = convert(DATA / "gptq-int4-act-order", tmp_path / "m")
    params, stored = load_params(path, dtype="float32"), open_checkpoint(path).config
    leaf = params["layers"]["0"]["mlp"]["down_proj"]
    assert sorted(np.asarray(leaf["order"])) == list(range(96))
    assert (np.asarray(leaf["order"]) != np.arange(96)).any()
    plain, floats = dequantize_params(params, stored, jnp.float32)
    tokens = random_tokens(stored, 2, 5)
    assert error(run(fuse_params(params, stored), stored, tokens)[0], run(plain, floats, tokens)[0]) < 2e-5
    assert flatten(plain).keys() == flatten(random_params(floats)).keys()
