"""Quantised checkpoints: the weights that their own libraries make of them, and refusals that name what is wrong.

The checkpoints in tests/data/quantized and the digests of what they stand for come from the libraries that define the
formats (scripts/make_quantized_checkpoints.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import DTYPES, LLAMA4, MIXTRAL, hf_tensors, loaded, random_leaves, write_hf

from llama_jax.checkpoint import open_checkpoint
from llama_jax.config import config_from_hf
from llama_jax.convert import convert
from llama_jax.convert.opening import open_source
from llama_jax.convert.quantized import scheme_from_hf
from llama_jax.convert.quantized.codes import Codes, unpack
from llama_jax.convert.quantized.settings import pattern
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.params import param_specs

DATA = Path(__file__).parent / "data" / "quantized"
LABELS = {
    "awq": "awq int4, groups of 32",
    "bnb-fp4": "bitsandbytes fp4",
    "bnb-int8": "bitsandbytes int8, per channel",
    "bnb-nf4": "bitsandbytes nf4",
    "bnb-nf4-nested": "bitsandbytes nf4",
    "ct-fp8-block": "compressed-tensors fp8, blocks of 16x32",
    "ct-fp8-channel": "compressed-tensors fp8, per channel",
    "ct-fp8-tensor": "compressed-tensors fp8, per tensor",
    "ct-int3-channel-asymmetric": "compressed-tensors int3, per channel, asymmetric",
    "ct-int4-group": "compressed-tensors int4, groups of 32",
    "ct-int4-group-asymmetric": "compressed-tensors int4, groups of 32, asymmetric",
    "ct-int8-channel": "compressed-tensors int8, per channel",
    "ct-int8-tensor-asymmetric": "compressed-tensors int8, per tensor, asymmetric",
    "ct-two-groups": "compressed-tensors int4, groups of 32; int8, per channel",
    "fbgemm-fp8": "fbgemm_fp8, per channel",
    "fp8-block": "fp8, blocks of 32x16",
    "fp8-tensor": "fp8, per tensor",
    "gptq-int2": "gptq int2, groups of 16",
    "gptq-int3": "gptq int3, groups of 32",
    "gptq-int4": "gptq int4, groups of 32",
    "gptq-int4-act-order": "gptq int4, groups of 32, act order",
    "gptq-int8": "gptq int8, per channel",
}
LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"


def test_every_case_is_here() -> None:
    assert sorted(LABELS) == sorted(p.name for p in DATA.iterdir())


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Everything that a folder holds, by Hugging Face's names."""
    source = open_source(folder)
    try:
        return {spec.hf: source.read(spec) for spec in param_specs(source.config)}
    finally:
        source.close()


@pytest.mark.parametrize("case", LABELS)
def test_weights_are_those_of_the_library(case: str) -> None:
    """Bit for bit, in the checkpoint's dtype."""
    expected = json.loads((DATA / case / "expected.json").read_text())
    dtype = json.loads((DATA / case / "config.json").read_text())["torch_dtype"]
    found = weights(DATA / case)
    assert {array.dtype.name for array in found.values()} == {dtype}
    assert {name: hashlib.sha256(a.tobytes()).hexdigest()[:16] for name, a in found.items()} == expected


def test_the_checkpoint_says_what_it_came_from(tmp_path: Path) -> None:
    out = convert(DATA / "gptq-int4-act-order", tmp_path / "out")
    assert open_checkpoint(out).source.quantization == LABELS["gptq-int4-act-order"]
    for case, label in LABELS.items():
        source = open_source(DATA / case)
        source.close()
        assert source.source.quantization == label


def test_plain_checkpoints_say_nothing(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", MIXTRAL)
    assert open_checkpoint(convert(tmp_path / "hf", tmp_path / "out")).source.quantization is None


CACHE = (
    f"{LAYER}.self_attn.kv_scale",
    *(f"{LAYER}.self_attn.{x}_scale" for x in "qkv"),
    *(f"{LAYER}.self_attn.{x}_proj.{x}_scale" for x in "qkv"),
    *(f"{LAYER}.self_attn.{x}_proj.output_scale" for x in "qkv"),
    f"{LAYER}.self_attn.attn.k_scale",
    f"{LAYER}.self_attn.prob_scale",
    f"{LAYER}.self_attn.prob_output_scale",
    f"{LAYER}.self_attn.k_zero_point",
    f"{LAYER}.self_attn.v_global_scale",
)


def add_scalars(file: Path, *names: str, rename: tuple[str, str] = ("", "")) -> None:
    """Adds numbers to a safetensors file, and renames what it holds; the library's numpy face knows no float8."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header = {name.replace(*rename) if rename[0] else name: entry for name, entry in header.items()}
    for name in names:
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += np.float32(1).tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("case", [*LABELS, "plain"])
def test_scales_of_a_quantised_cache_are_left_out(tmp_path: Path, case: str) -> None:
    """Whatever the method: they say nothing about weights, and what is left out is told."""
    if case == "plain":
        write_hf(tmp_path / "hf", MIXTRAL)
    else:
        shutil.copytree(DATA / case, tmp_path / "hf")
    before = weights(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    add_scalars(file, *CACHE)
    told: list[str] = []
    convert(tmp_path / "hf", tmp_path / "out", notify=told.append)
    assert f"Left out: {len(CACHE)} scales of a quantised key/value cache ({LAYER}.self_attn.attn.k_scale, " in told[0]
    after = weights(tmp_path / "hf")
    assert {name: a.tobytes() for name, a in before.items()} == {name: a.tobytes() for name, a in after.items()}
    extra = f"{LAYER}.self_attn.k_proj.other_scale"
    add_scalars(file, extra)
    with pytest.raises(CheckpointError, match=f"holds tensor {extra}"):
        open_source(tmp_path / "hf")


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_auto_fp8(tmp_path: Path, scheme: str) -> None:
    """The same numbers as `weight_scale_inv` of a whole tensor, and scales of activations."""
    shutil.copytree(DATA / "fp8-tensor", tmp_path / "hf")
    before = weights(tmp_path / "hf")
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    hf["quantization_config"] = {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head"]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf))
    file = tmp_path / "hf" / "model.safetensors"
    add_scalars(file, f"{Q}.input_scale", rename=("weight_scale_inv", "weight_scale"))
    assert b"weight_scale_inv" not in file.read_bytes()
    after = weights(tmp_path / "hf")
    assert {name: a.tobytes() for name, a in before.items()} == {name: a.tobytes() for name, a in after.items()}


# --- arithmetic -------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 8))
def test_unpack(data: st.DataObject, bits: int) -> None:
    """Against Python's integers: the words, lowest first, are one number."""
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100))
    stream = sum(number << (bits * i) for i, number in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    words = np.frombuffer(stream.to_bytes(4 * count, "little"), "<i4")
    assert unpack(words, bits, len(numbers)).tolist() == numbers
    assert unpack(np.stack([words, words]), bits, len(numbers)).tolist() == [numbers, numbers]


@given(st.data())
def test_codes(data: st.DataObject) -> None:
    """Against one multiplication at a time."""
    rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    block = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    grid = -(-rows // block[0]), -(-cols // block[1])
    values = rng.integers(-8, 8, (rows, cols), np.int8)
    scales = rng.standard_normal(grid).astype(np.float32)
    zeros = rng.integers(-8, 8, grid, np.int8) if data.draw(st.booleans()) else None
    groups = rng.integers(0, grid[1], cols) if data.draw(st.booleans()) else None
    first = data.draw(st.integers(0, rows - 1))
    out = np.empty((rows - first, cols), DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))])
    Codes(values, scales, block, zeros, groups).dequantize_into(out, first)
    for i in range(rows - first):
        for j in range(cols):
            at = (i + first) // block[0], j // block[1] if groups is None else groups[j]
            zero = 0 if zeros is None else int(zeros[at])
            number = np.float32(int(values[i + first, j]) - zero) * scales[at]
            assert out[i, j] == number.astype(out.dtype)


def test_large_matrices_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.convert.quantized.codes._BLOCK_ELEMENTS", 100)
    test_weights_are_those_of_the_library("ct-fp8-block")
    test_weights_are_those_of_the_library("gptq-int4-act-order")


def test_a_gptq_zero_of_0_borrows_from_its_neighbour(tmp_path: Path) -> None:
    """GPTQModel subtracts 1 from all numbers of a word at one time, and adds it so when it reads."""
    folder = copy_case(tmp_path, "gptq-int4")
    tensors = load_file(folder / "model.safetensors")
    zeros = np.random.default_rng(0).integers(0, 16, (2, 64), np.uint32)
    words = sum(zeros[:, i::8] << np.uint32(4 * i) for i in range(8))
    tensors[f"{Q}.qzeros"] = (words - np.uint32(0x11111111)).view(np.int32)
    save_file(tensors, folder / "model.safetensors")
    codes = np.stack([tensors[f"{Q}.qweight"].view(np.uint32) >> np.uint32(4 * i) & 15 for i in range(8)], 1)
    codes = codes.reshape(64, 64).astype(np.float32)
    scales = tensors[f"{Q}.scales"].astype(np.float32)
    expected = (codes - np.repeat(zeros, 32, 0)) * np.repeat(scales, 32, 0)
    np.testing.assert_array_equal(weights(folder)[f"{Q}.weight"], expected.T.astype(np.float16))
    edit_config(folder, checkpoint_format="gptq_v2")
    tensors[f"{Q}.qzeros"] = words.view(np.int32)
    save_file(tensors, folder / "model.safetensors")
    np.testing.assert_array_equal(weights(folder)[f"{Q}.weight"], expected.T.astype(np.float16))


# --- experts ----------------------------------------------------------------------------------------------------------


def quantise_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float8 codes and a scale for each row, and the product."""
    scale = np.abs(weight).max(-1, keepdims=True) / np.float32(448)
    codes = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    return codes, scale, codes.astype(np.float32) * scale


@pytest.mark.parametrize("names", ["w1 w3 w2", "gate_proj up_proj down_proj"])
def test_single_experts(tmp_path: Path, names: str) -> None:
    """Mixtral, as its own checkpoints and as quantisers name experts."""
    leaves, expected, tensors = random_leaves(config_from_hf(MIXTRAL)), {}, {}
    w1, w3, w2 = names.split()
    for name, array in hf_tensors(config_from_hf(MIXTRAL), leaves).items():
        if "experts" not in name:
            tensors[name] = array
            continue
        stem, short = name.removesuffix(".weight").rsplit(".", 1)
        new = f"{stem}.{ {'w1': w1, 'w2': w2, 'w3': w3}[short] }".replace(" ", "")
        new = new if w1 == "w1" else new.replace("block_sparse_moe", "mlp")
        tensors[f"{new}.weight"], tensors[f"{new}.weight_scale"], expected[name] = quantise_rows(array)
    method = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
        },
    }
    hf = MIXTRAL | {"quantization_config": method}
    write_fp8(tmp_path / "hf", hf, tensors)
    found = loaded(convert(tmp_path / "hf", tmp_path / "out", dequantize=True))
    kept = loaded(convert(tmp_path / "hf", tmp_path / "kept"))
    for layer in range(2):
        for short, leaf in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            stack = [expected[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{short}.weight"] for e in range(3)]
            stored = f"layers.{layer}.moe.experts.{leaf}_proj"
            np.testing.assert_array_equal(found[f"{stored}.weight"], np.stack(stack))
            product = kept[f"{stored}.fp8"].astype(np.float32) * kept[f"{stored}.scales"][..., None]
            np.testing.assert_array_equal(product, np.stack(stack))


def write_experts_of_fbgemm(folder: Path, down_scale: str) -> dict[str, np.ndarray]:
    """`FbgemmFp8Llama4TextExperts` of transformers: [expert, in, out] and a scale for each output, in either shape."""
    leaves, tensors = random_leaves(config_from_hf(LLAMA4)), {}
    expected = dict(leaves)
    for name, array in hf_tensors(config_from_hf(LLAMA4), leaves).items():
        if ".experts." not in name:
            tensors[name] = array
            continue
        codes, scale, product = quantise_rows(array.swapaxes(1, 2))
        tensors[name] = np.ascontiguousarray(codes.swapaxes(1, 2))
        as_row = "down" not in name or down_scale == "row"
        tensors[f"{name}_scale"] = np.ascontiguousarray(scale.swapaxes(1, 2)) if as_row else scale
        leaf = "layers.1.moe.experts"
        if "down" in name:
            expected[f"{leaf}.down_proj.weight"] = product
        else:
            gate, up = np.split(product, 2, axis=1)
            expected |= {f"{leaf}.gate_proj.weight": gate, f"{leaf}.up_proj.weight": up}
    write_fp8(folder, LLAMA4 | {"quantization_config": {"quant_method": "fbgemm_fp8"}}, tensors)
    return expected


@pytest.mark.parametrize("down_scale", ["row", "column"])
def test_stacked_experts_of_fbgemm(tmp_path: Path, down_scale: str) -> None:
    expected = write_experts_of_fbgemm(tmp_path / "hf", down_scale)
    found = loaded(convert(tmp_path / "hf", tmp_path / "out", dequantize=True))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def write_experts_in_blocks(folder: Path) -> dict[str, np.ndarray]:
    """`FP8Experts` of transformers 5: gate_up_proj [expert, 2 * mlp, embed] with gate_up_proj_scale_inv."""
    config = config_from_hf(MIXTRAL)
    expected = random_leaves(config)
    tensors = {n: a for n, a in hf_tensors(config, expected).items() if ".experts." not in n}
    rng = np.random.default_rng(1)
    for i in range(2):
        for name, shape in (("gate_up_proj", (3, 48, 16)), ("down_proj", (3, 16, 24))):
            codes = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
            scale = rng.uniform(0.5, 2, (3, -(-shape[1] // 16), -(-shape[2] // 16))).astype(np.float32)
            wide = scale.repeat(16, 1).repeat(16, 2)[:, : shape[1], : shape[2]]
            full = f"model.layers.{i}.mlp.experts.{name}"
            tensors |= {full: codes, f"{full}_scale_inv": scale}
            product = codes.astype(np.float32) * wide
            halves = np.split(product, 2, axis=1) if name == "gate_up_proj" else [product]
            for part, half in zip(("gate", "up") if len(halves) > 1 else ("down",), halves, strict=True):
                expected[f"layers.{i}.moe.experts.{part}_proj.weight"] = half
    method = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    write_fp8(folder, MIXTRAL | {"quantization_config": method}, tensors)
    return expected


def test_stacked_experts_in_blocks(tmp_path: Path) -> None:
    expected = write_experts_in_blocks(tmp_path / "hf")
    found = loaded(convert(tmp_path / "hf", tmp_path / "out", dequantize=True))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def write_fp8(folder: Path, hf: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """safetensors' numpy face knows no float8: the header is written here."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "tokenizer.json").write_text("{}")
    kinds = {"float8_e4m3fn": "F8_E4M3", "float32": "F32"}
    header, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": kinds[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def copy_case(tmp_path: Path, case: str) -> Path:
    return Path(shutil.copytree(DATA / case, tmp_path / "hf"))


def edit_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= keys
    (folder / "config.json").write_text(json.dumps(config))


def weights_group(**keys: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": weights | keys}}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {"quant_method": "hqq"}, "quant_method = 'hqq' is not supported"),
    ("awq", {"quant_method": None}, "quant_method = None"),
    ("awq", {"quant_method": ["awq"]}, "quant_method"),
    ("awq", {"version": "gemv"}, "version = 'gemv'"),
    ("awq", {"bits": 8}, "bits = 8"),
    ("awq", {"zero_point": False}, "zero_point = False"),
    ("awq", {"group_size": 0}, "group_size"),
    ("awq", {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list"),
    ("gptq-int4", {"bits": 5}, "bits = 5"),
    ("gptq-int4", {"bits": True}, "bits = True"),
    ("gptq-int4", {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    ("gptq-int4", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
    ("fp8-block", {"fmt": "e5m2"}, "fmt = 'e5m2'"),
    ("fp8-block", {"weight_block_size": [128]}, "weight_block_size"),
    ("fp8-block", {"weight_block_size": [0, 128]}, "weight_block_size"),
    ("bnb-nf4", {"bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type = 'nf3'"),
    ("bnb-int8", {"load_in_8bit": False}, "load_in_8bit = False"),
    ("ct-int4-group", {"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized'"),
    ("ct-int4-group", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ("ct-int4-group", {"transform_config": {"a": 1}}, "transform_config"),
    ("ct-int4-group", {"config_groups": {}}, "config_groups"),
    ("ct-int4-group", {"config_groups": {"W4A16": ["Linear"]}}, r"config_groups\.W4A16"),
    ("ct-int4-group", weights_group(type="float"), "num_bits = 4"),
    ("ct-int4-group", {"format": "mxfp4-pack-quantized"}, "num_bits = 4"),
    (
        "ct-int4-group",
        {"format": "mxfp4-pack-quantized", **weights_group(type="float", group_size=16)},
        "group_size = 16",
    ),
    ("ct-int4-group", weights_group(num_bits=9), "num_bits"),
    ("ct-int4-group", weights_group(strategy="tensor_group"), "strategy = 'tensor_group'"),
    ("ct-int4-group", weights_group(group_size=48), "group_size = 48"),
    ("ct-int4-group", weights_group(strategy="block", block_structure=[0, 1]), "block_structure"),
    ("ct-int4-group", weights_group(strategy="block", block_structure="4"), "block_structure"),
]


@pytest.mark.parametrize(("case", "keys", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, case: str, keys: dict[str, Any], message: str
) -> None:
    folder = copy_case(tmp_path, case)
    edit_config(folder, **keys)
    with pytest.raises(UnsupportedModel, match=message) as e:
        convert(folder, tmp_path / "out")
    assert e.value.hint
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", MIXTRAL)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(MIXTRAL | {"quantization_config": "int4"}))
    with pytest.raises(UnsupportedModel, match="quantization_config = 'int4'"):
        convert(tmp_path / "hf", tmp_path / "out")


def poke(tensor: np.ndarray, value: Any) -> np.ndarray:
    tensor = tensor.copy()
    tensor.reshape(-1)[0] = value
    return tensor


def state(**keys: Any) -> Callable[[np.ndarray], np.ndarray]:
    def edit(tensor: np.ndarray) -> np.ndarray:
        text = json.dumps(json.loads(tensor.tobytes()) | keys).encode()
        return np.frombuffer(text, np.uint8)

    return edit


NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
DAMAGE: list[tuple[str, str, Callable[[np.ndarray], np.ndarray | None], str]] = [
    ("ct-int4-group", "weight_scale", lambda t: None, "lacks its tensor 'scale'"),
    ("ct-int4-group", "weight_packed", lambda t: None, "lacks its tensor 'packed'"),
    ("ct-int4-group", "weight_packed", lambda t: t[:, 1:], r"weight_packed has shape \[64, 7\].*asks for \[64, 8\]"),
    ("ct-int4-group", "weight_packed", lambda t: t.astype(np.int64), "weight_packed has dtype I64.*asks for I32"),
    ("ct-int4-group", "weight_shape", lambda t: poke(t, 63), r"weight_shape says \[63, 64\]"),
    (
        "ct-int4-group",
        "weight_scale",
        lambda t: poke(t, np.nan),
        "weight_scale holds 1 scales that are NaN or infinite",
    ),
    ("ct-int4-group-asymmetric", "weight_zero_point", lambda t: None, "lacks its tensor 'zero_point'"),
    ("gptq-int4", "g_idx", lambda t: poke(t, 2), "g_idx holds groups from 0 to 2, there are 2"),
    ("gptq-int4", "g_idx", lambda t: poke(t, -1), "g_idx holds groups from -1"),
    ("gptq-int4", "scales", lambda t: t[:1], r"scales has shape \[1, 64\]"),
    ("gptq-int4", "scales", lambda t: poke(t, np.inf), "scales holds 1 scales that are NaN or infinite"),
    ("gptq-int4", "bias", lambda t: poke(t, 1), "q_proj.bias, which config.json does not ask for"),
    ("gptq-int4-act-order", "g_idx", lambda t: None, "lacks its tensor 'g_idx'"),
    ("awq", "qzeros", lambda t: None, "lacks its tensor 'qzeros'"),
    ("awq", "qweight", lambda t: t.T.copy(), r"qweight has shape \[8, 64\]"),
    ("bnb-int8", "SCB", lambda t: t[1:], r"SCB has shape \[63\]"),
    ("bnb-int8", "weight_format", lambda t: np.array(2, np.uint8), "tensor cores"),
    ("bnb-nf4", NF4_STATE, lambda t: None, "lacks its tensor 'quant_state"),
    ("bnb-nf4", NF4_STATE, lambda t: t[:-3], "is malformed"),
    ("bnb-nf4", NF4_STATE, state(shape=[32, 128]), "does not describe a nf4 weight of"),
    ("bnb-nf4", NF4_STATE, state(blocksize=0), "blocksize"),
    ("bnb-nf4", NF4_STATE, state(blocksize=2**40), "blocksize"),
    ("bnb-nf4", NF4_STATE, state(blocksize=128), r"absmax has shape \[64\].*asks for \[32\]"),
    ("bnb-nf4", NF4_STATE, state(quant_type="fp4"), "does not describe"),
    ("bnb-nf4", NF4_STATE, lambda t: np.zeros(5000, np.uint8), "no state"),
    ("bnb-nf4", "weight.absmax", lambda t: poke(t, np.inf), "absmax holds 1 scales"),
    ("bnb-nf4", "weight.quant_map", lambda t: t[:15], r"quant_map has shape \[15\]"),
    ("bnb-nf4-nested", "weight.nested_absmax", lambda t: None, "lacks its tensor 'nested_absmax'"),
]


@pytest.mark.parametrize(("case", "part", "change", "message"), DAMAGE, ids=lambda v: v if isinstance(v, str) else "")
def test_damage_is_named(
    tmp_path: Path, case: str, part: str, change: Callable[[np.ndarray], np.ndarray | None], message: str
) -> None:
    folder = copy_case(tmp_path, case)
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(f"{Q}.{part}"))
    if changed is not None:
        tensors[f"{Q}.{part}"] = np.ascontiguousarray(changed)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises((CheckpointError, UnsupportedModel), match=message) as e:
        convert(folder, tmp_path / "out")
    assert "q_proj" in e.value.message
    assert "model.safetensors" in e.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("case", ["fp8-block", "fbgemm-fp8", "ct-fp8-channel"])
def test_bad_scales_of_float8(tmp_path: Path, case: str, value: float) -> None:
    folder = copy_case(tmp_path, case)
    name = f"{Q}.weight_scale{'_inv' if case == 'fp8-block' else ''}"
    raw = bytearray((folder / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8 : 8 + length])[name]
    dtype = np.dtype({"F32": np.float32, "BF16": ml_dtypes.bfloat16}[found["dtype"]])
    at = 8 + length + found["data_offsets"][0]
    raw[at : at + dtype.itemsize] = np.array(value).astype(dtype).tobytes()
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds 1 scales that are 0, NaN or infinite"):
        convert(folder, tmp_path / "out", allow_nonfinite=True)


def test_what_config_json_calls_unquantised_must_be(tmp_path: Path) -> None:
    for case, key in (("awq", "modules_to_not_convert"), ("ct-int4-group", "ignore")):
        folder = copy_case(tmp_path / case, case)
        edit_config(folder, **{key: ["lm_head", f"{LAYER}.self_attn"]})
        with pytest.raises(CheckpointError, match=r"self_attn\.\w+ is quantised, but config\.json lists it as not"):
            convert(folder, tmp_path / "out")


def test_a_quantised_weight_without_a_method(tmp_path: Path) -> None:
    folder = copy_case(tmp_path, "bnb-int8")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"holds tensor .*SCB, .*which config.json does not ask for"):
        convert(folder, tmp_path / "out")


def test_no_group_names_a_quantised_module(tmp_path: Path) -> None:
    folder = copy_case(tmp_path, "ct-two-groups")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no group of config\.json's quantization_config names it"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("text", ["(a+)+b", "(.*)*x", "(a|b)*a(a|b){60}", "a*a*a*a*a*b", "[", r"(a)\1", "x" * 501])
def test_patterns_that_could_run_for_ever(text: str) -> None:
    with pytest.raises(UnsupportedModel, match="targets"):
        pattern("targets", text)


def test_patterns_of_published_checkpoints() -> None:
    for text in (r".*self_attn\.(q|k|v|o)_proj$", r"model\.layers\.\d+\.mlp.*", r".*language_model.*experts.*_proj"):
        assert pattern("targets", text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["4x4", "re:.*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(LABELS)), st.data())
def test_any_config_is_read_or_refused(case: str, data: st.DataObject) -> None:
    """No exception but ours, whatever is in quantization_config or in its first group's weights."""
    config = json.loads((DATA / case / "config.json").read_text())["quantization_config"]
    place = config
    if case.startswith("ct-") and data.draw(st.booleans()):
        place = config["config_groups"]["group_0"]
        place = place["weights"] if data.draw(st.booleans()) else place
    extra = ["dynamic", "ignore", "sparsity_config", "block_structure", "checkpoint_format", "modules_to_not_convert"]
    key = data.draw(st.sampled_from(sorted(place) + extra))
    place[key] = data.draw(JSON)
    try:
        scheme = scheme_from_hf({"quantization_config": config})
    except UnsupportedModel:
        return
    assert scheme is not None
    assert scheme.label
