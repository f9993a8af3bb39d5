"""Attention over pages in plain jnp, a block of slots at a time, with a running softmax: on any device.

The reference lays out all pages of a row before it looks at any of them, whether there is anything in them or not. Here
a loop runs as far as the longest row of the call reaches, so that time and memory follow what is in the cache and not
what there is room for. What a call can see is in the slots that `visible_slots` names.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.decode.partition import visible_slots
from llama_jax.kernels.attention.records import KeysValues, Places, Rule, beyond_kernels, numbers, refuse_gradients
from llama_jax.kernels.attention.reference import MASKED, attention_reference, gather_pages, visible
from llama_jax.kernels.precision import matmul_precision
from llama_jax.targets import Target

BLOCK = 256
"""Slots of a step."""


def unsupported(
    target: Target, q: jax.Array, kv: KeysValues, places: Places, rule: Rule, *, sinks: jax.Array | None = None
) -> str | None:
    """The reason it cannot compute these arguments, or None."""
    if kv.page_table is None:
        return "it takes pages"
    return beyond_kernels(kv, places, rule)


def run(q: jax.Array, kv: KeysValues, places: Places, rule: Rule, *, sinks: jax.Array | None = None) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`; its gradient is the reference's."""
    return _attend(rule, q, kv, sinks, places)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q: jax.Array, kv: KeysValues, sinks: jax.Array | None, places: Places) -> jax.Array:
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[1]
    batch, q_len, q_heads, head_dim = q.shape
    pages = max(BLOCK // page_size, 1)  # of a step
    spare = -kv.page_table.shape[1] % pages
    table = jnp.pad(kv.page_table, ((0, 0), (0, spare)))
    precision = matmul_precision(q.dtype)
    # One batched product per key/value head: the queries of its group as rows.
    grouped = q.reshape(batch, q_len, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, kv_heads, -1, head_dim)
    group = q_heads // kv_heads

    def slots(x: Any, start: jax.Array, fill: int) -> Any:
        if x is None:
            return None
        padded = jnp.pad(x, ((0, 0), (0, spare * page_size)), constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(padded, start, pages * page_size, axis=1)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        of_step = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        k, v = gather_pages(kv.k, of_step), gather_pages(kv.v, of_step)
        k_scale, v_scale = (None if x is None else gather_pages(x, of_step) for x in (kv.k_scale, kv.v_scale))
        start = i * pages * page_size
        at = replace(
            places,
            kv_positions=slots(places.kv_positions, start, -1),
            kv_segments=slots(places.kv_segments, start, -1),
        )
        # Slots without a token may hold anything, and even NaN must have no weight.
        stored = at.kv_positions >= 0
        if v_scale is None:
            v = jnp.where(stored[:, None, :, None], v, 0)
        else:
            k, v, v_scale = numbers(k, q.dtype), numbers(v, q.dtype), jnp.where(stored[:, None], v_scale, 0)
        logits = jax.lax.dot_general(
            rows, k, (((3,), (3,)), ((0, 1), (0, 1))), precision=precision, preferred_element_type=jnp.float32
        )
        if k_scale is not None:
            logits = logits * k_scale[:, :, None]
        logits = logits * rule.scale
        if rule.soft_cap is not None:
            logits = rule.soft_cap * jnp.tanh(logits / rule.soft_cap)
        see = jnp.tile(visible(at, rule.visibility), (1, group, 1))[:, None]
        logits = jnp.where(see, logits, MASKED)
        above = jnp.maximum(top, jnp.max(logits, axis=-1))
        # What is masked weighs nothing, also in rows that have seen nothing yet.
        weights = jnp.where(see, jnp.exp(logits - above[..., None]), 0.0)
        decay = jnp.exp(top - above)
        weighted = weights if v_scale is None else weights * v_scale[:, :, None]
        values = jax.lax.dot_general(
            weighted.astype(v.dtype),
            v,
            (((3,), (2,)), ((0, 1), (0, 1))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return above, total * decay + jnp.sum(weights, axis=-1), acc * decay[..., None] + values

    first, end = visible_slots(places.q_positions, places.kv_positions, rule.visibility)
    width = pages * page_size
    seen = end > first
    begin = jnp.min(jnp.where(seen, first, places.kv_positions.shape[1])) // width
    stop = (jnp.max(jnp.where(seen, end, 0)) + width - 1) // width
    shape = rows.shape[:3]
    top, total = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    if sinks is not None:  # a slot that everyone sees, with a value of zeros
        per_row = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, group), q_len, axis=1)
        top, total = jnp.broadcast_to(per_row, shape), total + 1.0
    acc = jnp.zeros((*shape, head_dim), jnp.float32)
    _, total, acc = jax.lax.fori_loop(begin, stop, step, (top, total, acc))
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    return out.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _forward(rule: Rule, *arguments: Any) -> tuple[jax.Array, Any]:
    refuse_gradients(arguments[1])
    return _attend(rule, *arguments), arguments


def _backward(rule: Rule, arguments: Any, out_grad: jax.Array) -> tuple[Any, ...]:
    q, kv, sinks, places = arguments

    def reference(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        return attention_reference(q, replace(kv, k=k, v=v), places, rule, sinks=sinks)

    dq, dk, dv, d_sinks = jax.vjp(reference, q, kv.k, kv.v, sinks)[1](out_grad)
    return dq, replace(kv, k=dk, v=dv, page_table=None), d_sinks, None


_attend.defvjp(_forward, _backward)
