"""Weights that other programs have quantised: which scheme a checkpoint uses, and the floats behind its codes.

A scheme (`scheme.Scheme`) says which tensors represent one weight and what they must look like, before any of them is
read, and turns them into `codes.Codes`: the integers or small floats, and their scales. `Codes.dequantize_into`
decodes them to float32. A consumer that computes with the codes themselves needs only the first half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_jax.config.fields import Fields
from llama_jax.convert.quantized.awq import Awq
from llama_jax.convert.quantized.bitsandbytes import Bitsandbytes4, Bitsandbytes8
from llama_jax.convert.quantized.compressed_tensors import CompressedTensors
from llama_jax.convert.quantized.fp8 import BlockFp8, FbgemmFp8
from llama_jax.convert.quantized.gptq import Gptq
from llama_jax.convert.quantized.scheme import Scheme, unsupported

__all__ = ["Scheme", "scheme_from_hf"]


def scheme_from_hf(hf: Mapping[str, Any]) -> Scheme | None:
    """The quantisation scheme that a config.json describes; None if its weights are not quantised.

    Args:
      hf: the parsed file. Its `quantization_config` counts, or that of its `text_config`.

    Raises:
      UnsupportedModel: an unknown method, or a parameter of one that is not supported; names it.
    """
    text = hf.get("text_config")
    places = (("", hf), ("text_config.", text if isinstance(text, Mapping) else {}))
    for prefix, place in places:
        for key in ("quantization_config", "compression_config"):  # the second in old files of compressed-tensors
            if (found := place.get(key)) is not None:
                if not isinstance(found, Mapping):
                    raise unsupported(f"{prefix}{key}", found)
                return _scheme(Fields(found, f"{prefix}{key}."))
    return None


def _scheme(f: Fields) -> Scheme:
    method = f.string("quant_method", None)
    if method is None and (f.boolean("load_in_4bit", False) or f.boolean("load_in_8bit", False)):
        method = "bitsandbytes"  # which did not name itself at first
    match method:
        case "compressed-tensors":
            return CompressedTensors.read(f)
        case "fp8":
            return BlockFp8.read(f)
        case "fbgemm_fp8":
            return FbgemmFp8.read(f)
        case "awq":
            return Awq.read(f)
        case "gptq":
            return Gptq.read(f)
        case "bitsandbytes":
            return (Bitsandbytes4 if f.boolean("load_in_4bit", False) else Bitsandbytes8).read(f)
    raise unsupported(f.name("quant_method"), method, _METHODS)


_METHODS = "compressed-tensors, fp8, fbgemm_fp8, awq, gptq, bitsandbytes"
