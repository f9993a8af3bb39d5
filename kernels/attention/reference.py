"""The contract of attention, in plain jnp: float32 logits and softmax, differentiable, any device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.records import KeysValues, Places, Rule, Visibility, by_row, numbers
from llama_jax.kernels.precision import matmul_precision

# Finite, so that a row with nothing to see (padding) gives numbers and not NaN. A power of two, so that its product
# with a factor is exact: a compiler may fuse MASKED * factor - MASKED * factor, of which rounding would leave 1e22.
MASKED = -(2.0**100)


def sees(q_position: jax.Array, kv_position: jax.Array, visibility: Visibility) -> jax.Array:
    """Returns whether a query at one position sees the slot of another one, element by element."""
    if visibility.kind == "all":
        return jnp.broadcast_to(kv_position >= 0, jnp.broadcast_shapes(q_position.shape, kv_position.shape))
    see = (kv_position >= 0) & (kv_position <= q_position)
    if visibility.kind == "sliding":
        see &= q_position - kv_position < visibility.window
    elif visibility.kind == "chunked":
        see &= q_position // visibility.window == kv_position // visibility.window
    return see


def visible(places: Places, visibility: Visibility) -> jax.Array:
    """bool [batch, q_len, kv_len]: whether each query sees each slot."""

    def pairs(q: jax.Array, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        return q[:, :, None], kv[:, None, :]

    q_position, kv_position = pairs(places.q_positions, places.kv_positions)
    see = sees(q_position, kv_position, visibility)
    if places.q_spans is not None and places.kv_spans is not None:
        q_span, kv_span = pairs(places.q_spans, places.kv_spans)
        see |= (q_span >= 0) & (q_span == kv_span) & (kv_position >= 0)
    if places.q_segments is not None and places.kv_segments is not None:
        q_segment, kv_segment = pairs(places.q_segments, places.kv_segments)
        see &= q_segment == kv_segment
    return see


def gather_pages(pages: jax.Array, page_table: jax.Array) -> jax.Array:
    """Pages [pages, kv_heads, page_size, ...] laid out as rows [batch, kv_heads, kv_len, ...].

    Entries of the table outside of the pages give some page; their slots must be invisible.
    """
    rows = jnp.take(pages, page_table, axis=0, mode="clip")  # [batch, pages per row, kv_heads, page_size, ...]
    rows = jnp.moveaxis(rows, 2, 1)
    return rows.reshape(*rows.shape[:2], -1, *rows.shape[4:])


def _dequantised(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    return x if scale is None else (numbers(x, jnp.float32) * scale[..., None]).astype(dtype)


def attention_reference(
    q: jax.Array, kv: KeysValues, places: Places, rule: Rule, *, sinks: jax.Array | None = None
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`; positions alone decide, so `in_order` changes nothing."""
    if places.rows is not None:
        return attention_reference(*by_row(q, kv, places), rule, sinks=sinks)[:, 0][None]
    if (index := places.q_index) is not None:
        each = q[0].at[index].get(mode="fill", fill_value=0)
        out = attention_reference(each, kv, replace(places, q_index=None), rule, sinks=sinks)
        return jnp.zeros_like(q).at[0, index].set(out, mode="drop")
    if paged := kv.page_table is not None:
        kv = jax.tree.map(partial(gather_pages, page_table=kv.page_table), replace(kv, page_table=None))
    k, v = _dequantised(kv.k, kv.k_scale, q.dtype), _dequantised(kv.v, kv.v_scale, q.dtype)
    if paged:
        # Slots without a token may hold anything, and even NaN must have no weight.
        v = jnp.where((jnp.asarray(places.kv_positions) >= 0)[:, None, :, None], v, 0)
    batch, q_len, _, head_dim = q.shape
    kv_heads = k.shape[1]
    precision = matmul_precision(q.dtype)
    # Two batched products per key/value head, k and v as they lie in memory: only the queries are moved.
    grouped = q.reshape(batch, q_len, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, kv_heads, -1, head_dim)
    logits = jax.lax.dot_general(
        rows, k, (((3,), (3,)), ((0, 1), (0, 1))), precision=precision, preferred_element_type=jnp.float32
    ).reshape(*grouped.shape[:-1], -1)
    logits = logits * rule.scale
    if rule.soft_cap is not None:
        logits = rule.soft_cap * jnp.tanh(logits / rule.soft_cap)
    see = visible(places, rule.visibility)
    logits = jnp.where(see[:, None, None], logits, MASKED)
    if sinks is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1), (*logits.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([logits, sink], axis=-1), axis=-1)[..., :-1]
    out = jax.lax.dot_general(
        weights.astype(v.dtype).reshape(batch, kv_heads, -1, k.shape[2]),
        v,
        (((3,), (2,)), ((0, 1), (0, 1))),
        precision=precision,
    )
    return out.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
