"""Compiler options for products with grouped quantised weights, which XLA by default decodes to memory first.

A flag makes it decode them within the product. On an H200, [28672, 4096] in int4 with groups of 128 took 211
microseconds for one row without the flag and 41 with it; 64 in bfloat16. Compiled for gfx942, a layer of Llama-3.1-8B
needs 0.6 MB of temporary memory instead of 118. In a whole model on the H200, XLA wrote the weights to memory
anyway; products of `kernels.quantized_matmul` are not affected.
"""

from __future__ import annotations

from llama_jax.config import LlamaConfig
from llama_jax.decode.graphs import CompilerOptions, unless_set
from llama_jax.quantized import stored_layout
from llama_jax.targets import current

MOST_ROWS = 64
"""Up to this many rows a product is bound by reading its weight. Beyond, each block of rows would decode it again."""

_FLAG = "xla_gpu_experimental_enable_subchannel_dequantisation_fusion"


def weight_options(config: LlamaConfig, rows: int) -> CompilerOptions:
    """Compiler options for a program that multiplies `rows` rows at a time by a model's weights.

    Empty where it makes no difference: on a CPU, for many rows, and without grouped integers. Flags that the user has
    set in XLA_FLAGS are left alone.
    """
    layouts = [layout for _, name in config.schemes if (layout := stored_layout(name))]
    grouped = any(layout.group is not None and layout.kind != "fp8" for layout in layouts)
    return unless_set({_FLAG: True}) if grouped and rows <= MOST_ROWS and current().vendor != "cpu" else {}
