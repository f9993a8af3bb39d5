"""flash_attention by cuDNN, through JAX: the calls that it can express, on NVIDIA GPUs.

cuDNN knows causal order by index and not by position, so it takes only calls that are known to be in order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.reference import Visibility
from llama_jax.targets import Target

MAX_HEAD_DIM = 128


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    page_table: jax.Array | None = None,
    in_order: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`."""
    window = (visibility.window - 1, 0) if visibility.kind == "sliding" else None
    return jax.nn.dot_product_attention(
        q,
        jnp.swapaxes(k, 1, 2),
        jnp.swapaxes(v, 1, 2),
        scale=scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )


def unsupported(
    target: Target,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    *,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    page_table: jax.Array | None = None,
    in_order: bool = False,
    **kwargs: Any,
) -> str | None:
    """Why cuDNN cannot run these arguments on that target, or None."""
    if target.vendor != "nvidia":
        return "cuDNN is for NVIDIA GPUs"
    if not in_order:
        return "positions are not known to be in order without padding (in_order), and cuDNN reads none"
    if page_table is not None:
        return "JAX's call of it takes no pages"
    if q.shape[1] != k.shape[2]:
        return f"{q.shape[1]} queries and {k.shape[2]} slots are not the same tokens"
    if visibility.kind == "chunked":
        return "it has no chunked windows"
    if q_segments is not None and kv_segments is not None:
        return "segments would need a mask as large as the logits"
    if soft_cap is not None or sinks is not None:
        return "JAX's call of it has neither soft cap nor sinks"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16 alone, not {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 8:
        return f"head_dim {q.shape[3]} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    return None
