"""The contract of attention, in plain jnp: float32 logits and softmax, differentiable, any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax.kernels.precision import matmul_precision

# Finite, so that a row with nothing to see (padding) gives numbers and not NaN.
MASKED = -1e30


@dataclass(frozen=True)
class Visibility:
    """Which positions a query sees: always its own and earlier ones, at most.

    Attributes:
      kind: "full"; "sliding", the last `window` positions, its own included; "chunked", those of its own chunk of
        `window` positions.
    """

    kind: Literal["full", "sliding", "chunked"] = "full"
    window: int = 0


def visible(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
) -> jax.Array:
    """bool [batch, q_len, kv_len]: whether each query sees each slot."""
    q = q_positions[:, :, None]
    kv = kv_positions[:, None, :]
    see = (kv >= 0) & (kv <= q)
    if visibility.kind == "sliding":
        see &= q - kv < visibility.window
    elif visibility.kind == "chunked":
        see &= q // visibility.window == kv // visibility.window
    if q_segments is not None and kv_segments is not None:
        see &= q_segments[:, :, None] == kv_segments[:, None, :]
    return see


def attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`."""
    batch, q_len, _, head_dim = q.shape
    kv_heads = k.shape[1]
    precision = matmul_precision(q.dtype)
    # Two batched products per key/value head, k and v as they lie in memory: only the queries are moved.
    grouped = q.reshape(batch, q_len, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, kv_heads, -1, head_dim)
    logits = jax.lax.dot_general(
        rows, k, (((3,), (3,)), ((0, 1), (0, 1))), precision=precision, preferred_element_type=jnp.float32
    ).reshape(*grouped.shape[:-1], -1)
    see = visible(q_positions, kv_positions, visibility, q_segments, kv_segments)
    logits = jnp.where(see[:, None, None], logits * scale, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jax.lax.dot_general(
        weights.reshape(batch, kv_heads, -1, k.shape[2]), v, (((3,), (2,)), ((0, 1), (0, 1))), precision=precision
    )
    return out.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
