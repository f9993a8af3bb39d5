"""How XLA multiplies by weights, where its defaults lose time.

Weights in groups are decoded by default before a product, and written to memory. A flag has XLA decode them within
the product. [28672, 4096] in int4, groups of 128, took an H200 211 microseconds at one row without the flag and 41 with
it; in bfloat16 64. Compiled for gfx942, a layer of Llama-3.1-8B needs 0.6 MB of temporary memory in place of 118. In a
whole model on the H200 XLA wrote them all the same; what the kernels of `kernels.quantized_matmul` multiply is not
concerned.

For products XLA tries kernels of its own beside those of NVIDIA's library, some dozens for each. Of many rows the
library's are as fast, and without the trials the programs of an engine for the 8B shape were compiled in 49 s in place
of 65.
"""

from __future__ import annotations

from llama_jax.config import LlamaConfig
from llama_jax.decode.graphs import CompilerOptions, unless_set
from llama_jax.quantized import layout_named
from llama_jax.targets import current

MOST_ROWS = 64
"""Rows up to which a product takes the time to read its weight. Beyond, each block of rows would decode it anew."""

_DECODE_WITHIN: CompilerOptions = {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True}
_LIBRARY_ALONE: CompilerOptions = {"xla_gpu_enable_triton_gemm": False}


def weight_options(config: LlamaConfig, rows: int) -> CompilerOptions:
    """Compiler options for a program that multiplies `rows` rows at a time by a model's weights.

    Empty where they make no difference, and on AMD GPUs for many rows, where nothing was measured. A flag that the user
    has set in XLA_FLAGS is left to the user.
    """
    vendor = current().vendor
    layouts = [layout for _, name in config.schemes if (layout := layout_named(name))]
    if rows <= MOST_ROWS:
        grouped = any(layout.group is not None and layout.kind != "fp8" for layout in layouts)
        return unless_set(_DECODE_WITHIN) if grouped and vendor != "cpu" else {}
    return unless_set(_LIBRARY_ALONE) if vendor == "nvidia" and not layouts else {}
