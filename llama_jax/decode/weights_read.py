"""Compiler options for products with a model's weights.

Grouped quantised weights are by default decoded to memory first. A flag makes XLA decode them within the product. On an
H200, [28672, 4096] in int4 with groups of 128 took 211 microseconds for one row without the flag and 41 with it; 64 in
bfloat16. Compiled for gfx942, a layer of Llama-3.1-8B needs 0.6 MB of temporary memory instead of 118. In a whole model
on the H200, XLA wrote the weights to memory anyway; products of `kernels.quantized_matmul` are not affected.

For products with unquantised weights on NVIDIA GPUs XLA compiles dozens of Triton kernels, and times them against
cuBLAS's: a third of the work until an engine is ready. For a few rows they gain most: a step of Llama-3.1-8B with one
row took 4.23 ms on an H200, 5.63 with cuBLAS alone. With 64 rows it took 5.27 and 5.14, prompts of 512, 1024 and 2048
tokens 17.4, 27.9 and 50.3 ms and 17.9, 27.2 and 48.7. Where cuBLAS alone is no slower, XLA tries no others.
"""

from __future__ import annotations

from llama_jax.config import LlamaConfig
from llama_jax.decode.graphs import CompilerOptions, unless_set
from llama_jax.quantized import stored_layout
from llama_jax.targets import current

MOST_ROWS = 64
"""Up to this many rows a product is bound by reading its weight. Beyond, each block of rows would decode it again."""

DECODED_ROWS, PROMPT_ROWS = 64, 1024
"""Rows of a decode step, and of a step with prompts, from which on cuBLAS alone computes products."""

_FLAG = "xla_gpu_experimental_enable_subchannel_dequantisation_fusion"
_TRITON = "xla_gpu_enable_triton_gemm"


def weight_options(config: LlamaConfig, rows: int, *, library: int = DECODED_ROWS) -> CompilerOptions:
    """Compiler options for a program that multiplies `rows` rows at a time by a model's weights.

    Empty where it makes no difference or none has been measured. Flags that the user has set in XLA_FLAGS are left
    alone.

    Args:
      library: from this many rows on, cuBLAS computes products with unquantised weights.
    """
    if not config.schemes:
        return unless_set({_TRITON: False}) if rows >= library and current().vendor == "nvidia" else {}
    layouts = [layout for _, name in config.schemes if (layout := stored_layout(name))]
    grouped = any(layout.group is not None and layout.kind != "fp8" for layout in layouts)
    return unless_set({_FLAG: True}) if grouped and rows <= MOST_ROWS and current().vendor != "cpu" else {}
