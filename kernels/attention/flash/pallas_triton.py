"""flash_attention in Pallas-Triton, for AMD and NVIDIA GPUs; differentiable by q, k, v and sinks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import KernelError
from llama_jax.kernels.attention.codes import lacks
from llama_jax.kernels.attention.flash.backward import Saved, backward
from llama_jax.kernels.attention.flash.blocks import LOG2_E, Program
from llama_jax.kernels.attention.flash.forward import forward
from llama_jax.kernels.attention.flash.tiles import Tiles, default_tiles
from llama_jax.kernels.attention.records import KeysValues, Places, Rule, beyond_kernels, refuse_gradients
from llama_jax.kernels.attention.reference import gather_pages
from llama_jax.kernels.pallas import MAX_ELEMENTS, rounds_to_bfloat16
from llama_jax.targets import Target, current

__all__ = ["Tiles", "default_tiles", "run", "unsupported"]

MAX_HEAD_DIM = 256


def run(
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`. Rows of padding, and of queries that see nothing, are zeros.

    Args:
      tiles: how to cut up the work; by default what `default_tiles` gives for the target.
      interpret: run the kernels as plain JAX operations, on any device.

    Raises:
      KernelError: the tiles do not fit the call.
    """
    target, group = current(), q.shape[2] // kv.k.shape[1]
    if tiles is None:
        q_len, kv_len = places.q_positions.shape[1], places.kv_positions.shape[1]
        sizes = {"q_len": q_len, "kv_len": kv_len, "group": group, "text": q.shape[1]}
        tiles = default_tiles(target, head_dim=q.shape[3], dtype=q.dtype, **sizes)
    if group % tiles.heads:
        raise KernelError(
            f"tiles of {tiles.heads} heads do not divide groups of {group} query heads",
            hint="set heads to a divisor of the group, or leave the tiles to default_tiles",
        )
    program = Program(
        rule.visibility,
        rule.scale,
        rule.soft_cap,
        tiles=tiles,
        interpret=interpret,
        round_by_hand=not rounds_to_bfloat16(target),
    )
    if kv.page_table is not None:
        kv = replace(kv, page_table=jnp.clip(kv.page_table, 0, kv.k.shape[0] - 1))
    return _attend(program, q, kv, sinks, places)


def unsupported(
    target: Target,
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> str | None:
    """The reason the kernels cannot run these arguments on that target, or None."""
    if target.vendor == "cpu" and not interpret:
        return "it compiles for GPUs only"
    if not kv.quantised and not q.dtype == kv.k.dtype == kv.v.dtype:
        return f"queries, keys and values are of different types ({q.dtype}, {kv.k.dtype}, {kv.v.dtype})"
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{q.dtype} is not one of bfloat16, float16, float32"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[3]} is larger than {MAX_HEAD_DIM}"
    if rule.scale <= 0:
        return f"scale {rule.scale} is not positive"
    if max(q.size, kv.k.size, kv.v.size) > MAX_ELEMENTS:
        return f"an array has more than {MAX_ELEMENTS} elements"
    return (None if interpret else lacks(kv, q.shape[3], target)) or beyond_kernels(
        kv, replace(places, q_index=None), rule
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Program, q: jax.Array, kv: KeysValues, sinks: jax.Array | None, places: Places) -> jax.Array:
    return forward(rule, q, kv, sinks, places, with_lse=False)[0]


def _attend_forward(
    rule: Program, q: jax.Array, kv: KeysValues, sinks: jax.Array | None, places: Places
) -> tuple[jax.Array, Any]:
    refuse_gradients(kv)
    out, lse = forward(rule, q, kv, sinks, places, with_lse=True)
    return out, (q, kv, sinks, places, out, lse)


def _attend_backward(rule: Program, saved: Any, out_grad: jax.Array) -> tuple[Any, ...]:
    q, kv, sinks, places, out, lse = saved
    if (index := places.q_index) is not None:  # training packs by segments: a copy will do
        q, out, out_grad = (x[0].at[index].get(mode="fill", fill_value=0) for x in (q, out, out_grad))
        places = replace(places, q_index=None)
    delta = jnp.swapaxes(jnp.sum(out_grad.astype(jnp.float32) * out.astype(jnp.float32), axis=3), 1, 2)
    if kv.page_table is None:
        dq, dk, dv = backward(rule, Saved(q, kv.k, kv.v, out_grad, lse, delta), places)
    else:
        # Only training differentiates, and training does not page: rows will do.
        (k_rows, v_rows), to_pages = jax.vjp(
            lambda *pages: tuple(gather_pages(x, kv.page_table) for x in pages), kv.k, kv.v
        )
        dq, *d_rows = backward(rule, Saved(q, k_rows, v_rows, out_grad, lse, delta), places)
        dk, dv = to_pages(tuple(d_rows))
    if index is not None:
        dq = jnp.zeros_like(saved[0]).at[0, index].set(dq, mode="drop")
    d_sinks = None
    if sinks is not None:
        weights = jnp.exp2(sinks.astype(jnp.float32)[None, :, None] * LOG2_E - lse)
        d_sinks = -jnp.sum(weights * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, replace(kv, k=dk, v=dv, page_table=None), d_sinks, None


_attend.defvjp(_attend_forward, _attend_backward)
