"""The contract of rotary embedding with the cache write; and the rotation alone, for where nothing is stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.records import KeysValues
from llama_jax.kernels.rope.coding import encoded

Stored = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""Queries, keys, values, and the scales of these two, None where they are no codes."""


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotates the pairs of x [batch, len, heads, head_dim] by cos, sin [batch, len, head_dim / 2], in float32."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    xf = x.astype(jnp.float32)
    if interleaved:
        a, b = xf[..., 0::2], xf[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(xf, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(x.dtype)


def split_heads(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [batch, len, heads, head_dim], keys and values [batch, len, kv_heads, head_dim] of
    [batch, len, kv_heads, group + 2, head_dim]."""
    q = qkv[..., :-2, :]
    return q.reshape(*qkv.shape[:2], -1, qkv.shape[-1]), qkv[..., -2, :], qkv[..., -1, :]


def rope_and_store_reference(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot: jax.Array,
    page: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    interleaved: bool,
) -> Stored:
    """See `llama_jax.kernels.rope.rope_and_store`."""
    queries, keys, values = split_heads(qkv)
    queries, keys = (rotate(x, cos, sin, interleaved=interleaved) for x in (queries, keys))

    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(into.dtype)
        if page is None:
            return jax.lax.dynamic_update_slice_in_dim(into, jnp.swapaxes(new, 1, 2), slot, axis=2)
        return into.at[page, :, slot].set(new, mode="drop", unique_indices=True)

    if k_scale is None or v_scale is None:
        return queries, put(k, keys), put(v, values), None, None
    queries, new = encoded(queries, keys, values, KeysValues(k, v, k_scale=k_scale).scheme)
    stored = [put(into, each) for into, each in zip((k, v, k_scale, v_scale), new, strict=True)]
    return queries, stored[0], stored[1], stored[2], stored[3]
