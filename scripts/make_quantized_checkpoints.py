"""Writes the quantised checkpoints of tests/data/quantized, with the libraries that define the formats.

    uv venv /tmp/quantizers
    uv pip install --python /tmp/quantizers/bin/python torch transformers compressed-tensors bitsandbytes
    pip download --no-deps --python-version 3.11 --only-binary :all: auto-gptq==0.7.1 autoawq==0.2.7.post3
    /tmp/quantizers/bin/python scripts/make_quantized_checkpoints.py tests/data/quantized auto_gptq*.whl autoawq*.whl

AutoGPTQ and AutoAWQ are not maintained and do not install beside today's torch; of each, the one module that packs and
unpacks is loaded out of its wheel.

A case is a folder with config.json, model.safetensors, and expected.json: for every tensor of the unquantised model the
sha256 of what the library itself dequantises to, in the checkpoint's dtype.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

Tensors = dict[str, torch.Tensor]
Quantize = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Name of a module and its weight to what is stored for it, by the rest of the name, and the dequantised weight."""

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def model(config: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
    """Random weights, among them rows and groups of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    hidden, mlp, kv = config["hidden_size"], config["intermediate_size"], 2 * config["head_dim"]
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": (config["vocab_size"], hidden),
        f"{layer}.input_layernorm": (hidden,),
        f"{layer}.self_attn.q_proj": (4 * config["head_dim"], hidden),
        f"{layer}.self_attn.k_proj": (kv, hidden),
        f"{layer}.self_attn.v_proj": (kv, hidden),
        f"{layer}.self_attn.o_proj": (hidden, 4 * config["head_dim"]),
        f"{layer}.post_attention_layernorm": (hidden,),
        f"{layer}.mlp.gate_proj": (mlp, hidden),
        f"{layer}.mlp.up_proj": (mlp, hidden),
        f"{layer}.mlp.down_proj": (hidden, mlp),
        "model.norm": (hidden,),
    }
    tensors = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            weight *= torch.exp(torch.randn(shape[0], 1, generator=generator)) * 0.1
        tensors[f"{name}.weight"] = weight.to(dtype)
    return tensors


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def compressed(stored: str, **args: Any) -> Quantize:
    arguments = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(stored)

    def quantize(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, cols = weight.shape
        match arguments.strategy:
            case "tensor":
                low, high = weight.min().reshape(1), weight.max().reshape(1)
            case "channel":
                low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            case "group":
                groups = weight.reshape(rows, -1, arguments.group_size)
                low, high = groups.amin(-1), groups.amax(-1)
            case _:
                a, b = arguments.block_structure
                blocks = weight.reshape(rows // a, a, cols // b, b)
                low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        scale, zero = calculate_qparams(low, high, arguments)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        packed = compressor.compress(state, scheme)
        return packed, compressor.decompress(packed, scheme)["weight"]

    return quantize


def compressed_config(stored: str, *groups: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{i}": {"targets": group.pop("targets", ["Linear"]), "weights": group}
            for i, group in enumerate(map(dict, groups))
        },
    } | top


# --- float8 -----------------------------------------------------------------------------------------------------------


def block_fp8(block: tuple[int, int] | None) -> Quantize:
    def quantize(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, cols = weight.shape
        a, b = block or (rows, cols)
        blocks = weight.float().reshape(rows // a, a, cols // b, b)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scale[:, None, :, None]).reshape(rows, cols).to(torch.float8_e4m3fn)
        scale = scale if block else scale.reshape(())
        grid = scale if block else scale.reshape(1, 1)
        back = Fp8Dequantize(None)._dequantize_one(codes, grid, output_dtype=weight.dtype)
        return {"weight": codes, "weight_scale_inv": scale}, back

    return quantize


def row_fp8(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """`torch.ops.fbgemm.quantize_fp8_per_row`, which needs a GPU, as its documentation has it."""
    scale = weight.float().abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, (codes.float() * scale).to(weight.dtype)


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------------


def module_of(wheel: Path, path: str) -> ModuleType:
    """One module of a wheel, without its package."""
    folder = Path(tempfile.mkdtemp())
    with zipfile.ZipFile(wheel) as file:
        source = file.extract(path, folder)
    spec = importlib.util.spec_from_file_location(Path(path).stem, source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(path).stem] = module
    spec.loader.exec_module(module)
    return module


def affine(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each group, [rows, groups]; zeros from 1 on, since version 1 of GPTQ stores them less 1."""
    groups = weight.float().reshape(weight.shape[0], -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low).clamp(min=1e-5) / (2**bits - 1)
    return scale.half(), torch.round(-low / scale).clamp(1, 2**bits - 1)


def gptq(layer: ModuleType, bits: int, group_size: int, *, act_order: bool = False) -> Quantize:
    """Quantises in groups of `group_size` columns; -1 is one group of all."""

    def quantize(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, cols = weight.shape
        group = group_size if group_size > 0 else cols
        index = torch.arange(cols) // group
        if act_order:
            index = index[torch.randperm(cols, generator=torch.Generator().manual_seed(len(name)))]
        order = torch.argsort(index, stable=True)
        scale, zero = affine(weight[:, order], bits, group)
        linear = torch.nn.Linear(cols, rows, bias=False)
        linear.weight.data = weight.float()
        packed = layer.QuantLinear(bits, group, cols, rows, False)
        packed.pack(linear, scale.float(), zero.clone(), index.to(torch.int32))
        packed.wf = packed.wf.to(torch.int32)
        back = packed(torch.eye(cols, dtype=torch.float32).to(packed.scales.dtype)).T.contiguous()
        state = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales, "g_idx": packed.g_idx}
        # Old versions of AutoGPTQ give every layer a bias.
        state["bias"] = torch.zeros(rows, dtype=torch.float16)
        return state, back.to(weight.dtype)

    return quantize


def awq(packing: ModuleType, group: int) -> Quantize:
    def quantize(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale, zero = affine(weight, 4, group)
        wide = scale.repeat_interleave(group, 1).float(), zero.repeat_interleave(group, 1)
        codes = (torch.round(weight.float() / wide[0]) + wide[1]).clamp(0, 15).to(torch.int32).T
        state = {
            "qweight": pack_awq(packing, codes),
            "qzeros": pack_awq(packing, zero.T.to(torch.int32)),
            "scales": scale.T.contiguous(),
        }
        back = packing.dequantize_gemm(state["qweight"], state["qzeros"], state["scales"], 4, group)
        return state, back.T.contiguous().to(weight.dtype)

    return quantize


def pack_awq(packing: ModuleType, codes: torch.Tensor) -> torch.Tensor:
    """As `WQLinear_GEMM.from_linear` of AutoAWQ."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for i, column in enumerate(packing.AWQ_ORDER):
        words |= codes[:, column::8] << (4 * i)
    return words


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def bnb4(kind: str, *, nested: bool) -> Quantize:
    def quantize(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        stored = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
        # Not `dequantize_4bit`: on a CPU 0.50.2 takes every row for whole blocks. This is what CUDA does.
        back = _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, 64, weight.shape, weight.dtype)
        return stored, back

    return quantize


def bnb8(_: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    stored = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, bnb.int8_vectorwise_dequant(codes, scale).to(weight.dtype)


# ----------------------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    quantization: dict[str, Any],
    quantize: Quantize | Mapping[str, Quantize],
    *,
    dtype: str = "bfloat16",
    skip: tuple[str, ...] = (),
    **keys: Any,
) -> None:
    """Writes one case; `quantize` is one for all, or one for each last part of a module's name, "" for the others."""
    config = CONFIG | keys | {"torch_dtype": dtype, "quantization_config": quantization}
    stored: Tensors = {}
    expected = {}
    for name, weight in model(config, getattr(torch, dtype)).items():
        module, short = name.removesuffix(".weight"), name.split(".")[-2]
        back = weight
        if weight.ndim == 2 and "embed" not in name and short not in skip:
            chosen = quantize.get(short, quantize[""]) if isinstance(quantize, Mapping) else quantize
            state, back = chosen(module, weight)
            stored |= {f"{module}.{part}": tensor.contiguous() for part, tensor in state.items()}
        else:
            stored[name] = weight
        raw = back.contiguous().view(torch.uint8).numpy().tobytes()
        expected[name] = hashlib.sha256(raw).hexdigest()[:16]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({n: t.clone() for n, t in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(folder.name, sum(f.stat().st_size for f in folder.iterdir()) // 1000, "kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes quantised checkpoints for the tests.")
    parser.add_argument("out", type=Path, help="folder for the cases")
    parser.add_argument("gptq", type=Path, help="wheel of auto-gptq")
    parser.add_argument("awq", type=Path, help="wheel of autoawq")
    args = parser.parse_args()
    out: Path = args.out

    int4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    int4_asymmetric = int4 | {"symmetric": False}
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    int8_tensor = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor"}
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    fp8_tensor = fp8 | {"strategy": "tensor"}
    fp8_block = fp8 | {"strategy": "block", "block_structure": [16, 32]}
    int3 = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "channel"}
    for name, stored, group in (
        ("ct-int8-channel", "int-quantized", int8),
        ("ct-int8-tensor-asymmetric", "int-quantized", int8_tensor),
        ("ct-fp8-channel", "float-quantized", fp8),
        ("ct-fp8-tensor", "float-quantized", fp8_tensor),
        ("ct-fp8-block", "float-quantized", fp8_block),
        ("ct-int4-group", "pack-quantized", int4),
        ("ct-int4-group-asymmetric", "pack-quantized", int4_asymmetric),
        ("ct-int3-channel-asymmetric", "pack-quantized", int3),
    ):
        write(out / name, compressed_config(stored, group), compressed(stored, **group))
    groups = (int4 | {"targets": ["Linear"]}, int8 | {"targets": [r"re:.*mlp\.down_proj$"]})
    write(
        out / "ct-two-groups",
        compressed_config("pack-quantized", *groups, ignore=["model.layers.0.self_attn.o_proj"]),
        {"": compressed("pack-quantized", **int4), "down_proj": compressed("pack-quantized", **int8)},
        skip=("o_proj",),
    )

    method: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    write(out / "fp8-block", method | {"weight_block_size": [32, 16]}, block_fp8((32, 16)))
    write(out / "fp8-tensor", method | {"weight_block_size": None}, block_fp8(None), dtype="float16")
    not_converted = {"modules_to_not_convert": ["model.layers.0.self_attn.k_proj"]}
    write(out / "fbgemm-fp8", {"quant_method": "fbgemm_fp8"} | not_converted, row_fp8, skip=("k_proj",))

    plain = module_of(args.gptq, "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    for bits, columns in ((4, 32), (8, -1), (3, 32), (2, 16)):
        method = {"quant_method": "gptq", "bits": bits, "group_size": columns, "desc_act": False, "sym": False}
        write(out / f"gptq-int{bits}", method, gptq(plain, bits, columns), dtype="float16")
    method = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    write(out / "gptq-int4-act-order", method, gptq(plain, 4, 32, act_order=True), dtype="float16")

    packing = module_of(args.awq, "awq/utils/packing_utils.py")
    method = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    write(out / "awq", method, awq(packing, 32), dtype="float16")

    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    write(out / "bnb-nf4", method | {"bnb_4bit_quant_type": "nf4"}, bnb4("nf4", nested=False))
    nested = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    write(out / "bnb-nf4-nested", method | nested, bnb4("nf4", nested=True), intermediate_size=320)
    write(out / "bnb-fp4", method | {"bnb_4bit_quant_type": "fp4"}, bnb4("fp4", nested=False), dtype="float32")
    write(out / "bnb-int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8, dtype="float16")


if __name__ == "__main__":
    main()
