"""flash_attention by cuDNN, through JAX: the calls that it can express, on NVIDIA GPUs.

cuDNN knows causal order by index and not by position, so it takes only calls that are known to be in order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.records import KeysValues, Places, Rule, beyond_kernels
from llama_jax.targets import Target

MAX_HEAD_DIM = 128


def run(q: jax.Array, kv: KeysValues, places: Places, rule: Rule, *, sinks: jax.Array | None = None) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`."""
    window = (rule.visibility.window - 1, 0) if rule.visibility.kind == "sliding" else None
    return jax.nn.dot_product_attention(
        q,
        jnp.swapaxes(kv.k, 1, 2),
        jnp.swapaxes(kv.v, 1, 2),
        scale=rule.scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )


def unsupported(
    target: Target, q: jax.Array, kv: KeysValues, places: Places, rule: Rule, *, sinks: jax.Array | None = None
) -> str | None:
    """The reason cuDNN cannot run these arguments on that target, or None."""
    if target.vendor != "nvidia":
        return "cuDNN is for NVIDIA GPUs"
    if not rule.in_order:
        return "positions are not known to be in order without padding (in_order), and cuDNN reads none"
    if kv.page_table is not None:
        return "JAX's call of it takes no pages"
    if q.shape[1] != kv.k.shape[2]:
        return f"{q.shape[1]} queries and {kv.k.shape[2]} slots are not the same tokens"
    if rule.visibility.kind == "chunked":
        return "it has no chunked windows"
    if places.q_segments is not None:
        return "segments would need a mask as large as the logits"
    if rule.soft_cap is not None or sinks is not None:
        return "JAX's call of it has neither soft cap nor sinks"
    if not q.dtype == kv.k.dtype == kv.v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16 alone, not {q.dtype}, {kv.k.dtype}, {kv.v.dtype}"
    if q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 8:
        return f"head_dim {q.shape[3]} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    return beyond_kernels(kv, places, rule)
