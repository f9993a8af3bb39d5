"""Products on CPUs by a library in C++ (`cpp/`), which reads the codes as they lie: AVX2, AVX-512 with VNNI, NEON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax.kernels.integer_matmul import library
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.quantized import Layout
from llama_jax.targets import Target

BLOCK = 32
"""Codes that the library multiplies at once."""


def unsupported(
    target: Target, x: jax.Array, members: Mapping[str, jax.Array], *, layout: Layout, **kwargs: Any
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor != "cpu":
        return "it runs on CPUs only"
    width = x.shape[-1]
    if width % BLOCK or (layout.group or BLOCK) % BLOCK:
        return f"rows of {width} numbers in groups of {layout.group or width}; it takes multiples of {BLOCK}"
    if not math.prod(x.shape[:-1]) or not members[layout.name].size:
        return "there are no rows"
    return library.missing()


def run(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout,
    dtype: DTypeLike | None = None,
    instructions: str = "",
) -> jax.Array:
    """See `llama_jax.kernels.integer_matmul.integer_matmul`.

    Args:
      instructions: one of `library.instructions()`; by default the first.
    """
    target = library.register()
    weight = Weight.of(layout, members)
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    out = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((len(flat), len(weight.codes)), jnp.float32))(
        flat,
        weight.codes,
        weight.scales,
        weight.scales if weight.offsets is None else weight.offsets,
        bits=np.int64(layout.bits),
        group=np.int64(layout.group or x.shape[-1]),
        offset=layout.offset or "",
        instructions=instructions,
    )
    return out.reshape(*x.shape[:-1], *members[layout.name].shape[:-1]).astype(dtype or x.dtype)
