"""How XLA multiplies by weights in groups: by default it writes each decoded weight to memory first.

A flag has it decode them within the product. [28672, 4096] in int4, groups of 128, took an H200 211 microseconds at one
row without the flag and 41 with it; in bfloat16 64. Compiled for gfx942, a layer of Llama-3.1-8B needs 0.6 MB of
temporary memory in place of 118. In a whole model on the H200 XLA wrote them all the same; what the kernels of
`kernels.quantized_matmul` multiply is not concerned.
"""

from __future__ import annotations

from llama_jax.config import LlamaConfig
from llama_jax.decode.graphs import CompilerOptions, unless_set
from llama_jax.quantized import stored_layout
from llama_jax.targets import current

MOST_ROWS = 64
"""Rows up to which a product takes the time to read its weight. Beyond, each block of rows would decode it anew."""

_FLAG = "xla_gpu_experimental_enable_subchannel_dequantisation_fusion"


def weight_options(config: LlamaConfig, rows: int) -> CompilerOptions:
    """Compiler options for a program that multiplies `rows` rows at a time by a model's weights.

    Empty where it makes no difference: on a CPU, for many rows, and without integers in groups. A flag that the user
    has set in XLA_FLAGS is left to the user.
    """
    layouts = [layout for _, name in config.schemes if (layout := stored_layout(name))]
    grouped = any(layout.group is not None and layout.kind != "fp8" for layout in layouts)
    return unless_set({_FLAG: True}) if grouped and rows <= MOST_ROWS and current().vendor != "cpu" else {}
