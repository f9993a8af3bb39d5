"""flash_attention in Pallas-Triton, for AMD and NVIDIA GPUs; differentiable by q, k, v and sinks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import KernelError
from llama_jax.kernels.attention.flash.backward import Saved, backward
from llama_jax.kernels.attention.flash.blocks import LOG2_E, Places, Rule
from llama_jax.kernels.attention.flash.forward import forward
from llama_jax.kernels.attention.flash.tiles import Tiles, default_tiles
from llama_jax.kernels.attention.reference import Visibility, gather_pages
from llama_jax.kernels.pallas import MAX_ELEMENTS, rounds_to_bfloat16
from llama_jax.targets import Target, current

__all__ = ["Tiles", "default_tiles", "run", "unsupported"]

MAX_HEAD_DIM = 256


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
    del in_order  # the positions say so too
    target = current()
    if tiles is None:
        tiles = default_tiles(
            target, head_dim=q.shape[3], dtype=q.dtype, q_len=q.shape[1], group=q.shape[2] // k.shape[1]
        )
    if (q.shape[2] // k.shape[1]) % tiles.heads:
        raise KernelError(
            f"tiles of {tiles.heads} heads do not divide groups of {q.shape[2] // k.shape[1]} query heads",
            hint="set heads to a divisor of the group, or leave the tiles to default_tiles",
        )
    rule = Rule(visibility, scale, soft_cap, tiles, interpret, round_by_hand=not rounds_to_bfloat16(target))
    if q_segments is None or kv_segments is None:
        q_segments = kv_segments = None
    if page_table is not None:
        page_table = jnp.clip(page_table, 0, k.shape[0] - 1)
    places = Places(q_positions, kv_positions, q_segments, kv_segments, page_table)
    return _attend(rule, q, k, v, sinks, places)


def unsupported(
    target: Target, q: jax.Array, k: jax.Array, v: jax.Array, *args: Any, interpret: bool = False, **kwargs: Any
) -> str | None:
    """Why the kernels cannot run these arguments on that target, or None."""
    if target.vendor == "cpu" and not interpret:
        return "it compiles for GPUs only"
    if not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values are of different types ({q.dtype}, {k.dtype}, {v.dtype})"
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{q.dtype} is not one of bfloat16, float16, float32"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[3]} is larger than {MAX_HEAD_DIM}"
    if kwargs["scale"] <= 0:
        return f"scale {kwargs['scale']} is not positive"
    if max(q.size, k.size, v.size) > MAX_ELEMENTS:
        return f"an array has more than {MAX_ELEMENTS} elements"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, places: Places) -> jax.Array:
    return forward(rule, q, k, v, sinks, places, with_lse=False)[0]


def _attend_forward(
    rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, places: Places
) -> tuple[jax.Array, Any]:
    out, lse = forward(rule, q, k, v, sinks, places, with_lse=True)
    return out, (q, k, v, sinks, places, out, lse)


def _attend_backward(rule: Rule, saved: Any, out_grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, sinks, places, out, lse = saved
    delta = jnp.swapaxes(jnp.sum(out_grad.astype(jnp.float32) * out.astype(jnp.float32), axis=3), 1, 2)
    if places.page_table is None:
        dq, dk, dv = backward(rule, Saved(q, k, v, out_grad, lse, delta), places)
    else:
        # Only training differentiates, and training does not page: rows will do.
        (k_rows, v_rows), to_pages = jax.vjp(
            lambda *pages: tuple(gather_pages(x, places.page_table) for x in pages), k, v
        )
        rows = Saved(q, k_rows, v_rows, out_grad, lse, delta)
        dq, *d_rows = backward(rule, rows, places._replace(page_table=None))
        dk, dv = to_pages(tuple(d_rows))
    d_sinks = None
    if sinks is not None:
        weights = jnp.exp2(sinks.astype(jnp.float32)[None, :, None] * LOG2_E - lse)
        d_sinks = -jnp.sum(weights * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, d_sinks, None


_attend.defvjp(_attend_forward, _attend_backward)
